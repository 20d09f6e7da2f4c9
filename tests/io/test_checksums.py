"""Digests that files on users' disks are compared with: their values must never change."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from codi_jax.io.checksums import (
    DamagedError,
    digest_of,
    folder_digest,
    update_with_values,
    verify_checksums,
    write_checksums,
)

TREE = {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.float32([1, 2])}


def test_the_digest_of_parameters_is_that_of_recorded_paths():
    expected = hashlib.sha256()
    for name, array in (("['a']", TREE["a"]), ("['b']['kernel']", TREE["b"]["kernel"])):
        expected.update(name.encode() + array.tobytes())
    assert digest_of(TREE) == expected.hexdigest()
    assert digest_of({"a": jnp.asarray(TREE["a"]), "b": TREE["b"]}) == digest_of(TREE)
    assert digest_of({"a": TREE["a"], "c": TREE["b"]}) != digest_of(TREE)
    assert digest_of({"a": TREE["a"] + np.float32([0, 1]), "b": TREE["b"]}) != digest_of(TREE)


def test_the_values_alone_are_what_the_fingerprints_of_cached_latents_hold():
    digest = hashlib.sha256(b"module")
    update_with_values(digest, TREE)
    assert digest.digest() == hashlib.sha256(b"module" + TREE["a"].tobytes() + TREE["b"]["kernel"].tobytes()).digest()


def test_the_digest_of_a_folder_is_of_its_files_in_order(tmp_path):
    for name, content in (("b.safetensors", b"2"), ("a.safetensors", b"1"), ("config.json", b"3")):
        (tmp_path / name).write_bytes(content)
    assert folder_digest(tmp_path, "*.safetensors") == hashlib.sha256(b"12").hexdigest()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": {}, "sha256": ""}', b"\xff"])
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "file").write_text("content")
    write_checksums(tmp_path)
    verify_checksums(tmp_path)
    (tmp_path / "checksums.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"checksums\.json is not what was written"):
        verify_checksums(tmp_path)
