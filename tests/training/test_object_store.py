"""Checkpoints on Google Cloud Storage: against a server that speaks its protocol, written by others."""

import contextlib
import dataclasses
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import fsspec
import jax
import jax.numpy as jnp
import pytest
import stand_in
from gcp_storage_emulator.server import RequestHandler
from object_store import serve_store
from several import end_of, start_all
from stand_in import State, fingerprint, init_state

from codi_jax.training import starting
from codi_jax.training.checkpoint import CheckpointError, Checkpoints, find_checkpoint, list_checkpoints
from codi_jax.training.starting import LoopFlags

CONFIG = {"learning_rate": 1e-2}
SCRIPT = stand_in.__file__


@pytest.fixture(scope="module")
def store() -> Iterator[fsspec.AbstractFileSystem]:
    with serve_store() as files:
        yield files


@pytest.fixture
def folder(store, request) -> str:
    """A folder of the store for one test."""
    return f"gs://bucket/{re.sub('[^a-z0-9]+', '-', request.node.name)}/run"


def save(folder: str, *steps: int, total_limit: int | None = None) -> State:
    with contextlib.closing(Checkpoints(folder, total_limit)) as checkpoints:
        state = init_state()
        for step in steps:
            state = dataclasses.replace(state, step=jnp.int32(step))
            checkpoints.save(step, state, {"position": step}, CONFIG)
    return state


def restored(folder: str, step: int, like: State) -> tuple[State, dict]:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.restore(f"{folder}/checkpoint-{step}", like)


def test_a_state_comes_back_bit_for_bit(folder):
    state = save(folder, 5)
    back, position = restored(folder, 5, state)
    assert fingerprint(back) == fingerprint(state)
    assert position == {"position": 5}


def test_old_ones_are_deleted(folder, store):
    save(folder, 1, 2, 3, total_limit=2)
    assert list_checkpoints(folder) == [2, 3]
    assert not store.find(f"{folder}/checkpoint-1")
    save(folder, 4, total_limit=2)
    assert list_checkpoints(folder) == [3, 4]


def test_what_was_not_finished_is_no_checkpoint_and_is_written_again(folder, store):
    state = save(folder, 1, 2)
    store.rm(f"{folder}/checkpoint-2/commit_success.txt")
    assert list_checkpoints(folder) == [1]
    assert str(find_checkpoint("latest", folder)) == f"{folder}/checkpoint-1"
    assert str(find_checkpoint("checkpoint-1", folder)) == f"{folder}/checkpoint-1"
    save(folder, 2)
    assert list_checkpoints(folder) == [1, 2]
    assert fingerprint(restored(folder, 2, state)[0]) == fingerprint(state)


def test_one_that_lacks_an_object_is_refused(folder, store):
    state = save(folder, 3)
    for name in store.find(f"{folder}/checkpoint-3/state"):
        if "/d/" in name:
            store.rm(name)
    with pytest.raises(CheckpointError, match="checkpoint-3 cannot be read"):
        restored(folder, 3, state)


@pytest.mark.parametrize(("death", "whole"), [({"kill_at_batch": 14}, [4, 8, 12]), ({"kill_in_save": 8}, [4])])
def test_a_machine_that_is_lost_costs_the_steps_since_the_last_checkpoint(folder, store, tmp_path, death, whole):
    undisturbed = stand_in.run(tmp_path / "undisturbed", max_train_steps=20, checkpointing_steps=0)
    given = {"max_train_steps": 20, "checkpoint_dir": folder, "resume_from_checkpoint": "latest"}
    ended = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path / "lost"), json.dumps(given | death)], capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list_checkpoints(folder) in (whole, whole[:-1])  # the last one is written while training goes on
    # Nothing is needed of its disk, nor is anything but the model and logs on the other's.
    assert fingerprint(stand_in.run(tmp_path / "another", **given)) == fingerprint(undisturbed)
    assert not list(tmp_path.glob("*/checkpoint-*"))
    assert list_checkpoints(folder) == [4, 8, 12, 16, 20]
    assert store.cat(f"{folder}/config.yaml") == (tmp_path / "another/config.yaml").read_bytes()


def test_two_processes_write_one_checkpoint_and_another_number_resumes_it(folder, tmp_path):
    given = {"max_train_steps": 8, "checkpoint_dir": folder, "train_batch_size": 4}
    # No disk is shared: each process has a folder of its own.
    ended = end_of(start_all([SCRIPT, str(tmp_path / "two"), json.dumps(given)], 2), timeout=120)
    assert [status for status, _ in ended] == [0, 0], ended
    assert list_checkpoints(folder) == [4, 8]
    state = init_state()
    two, position = restored(folder, 8, state)
    one = stand_in.run(tmp_path / "one", max_train_steps=8, checkpointing_steps=0)
    assert position == {"position": 64}
    for ours, theirs in zip(jax.tree.leaves(two.params), jax.tree.leaves(one.params), strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    stand_in.run(tmp_path / "more", **(given | {"max_train_steps": 12, "resume_from_checkpoint": "latest"}))
    assert list_checkpoints(folder) == [4, 8, 12]


def test_a_second_run_does_not_write_over_the_first(folder, tmp_path):
    save(folder, 4)
    with pytest.raises(CheckpointError, match=f"{folder} holds checkpoint-4 of an earlier run"):
        stand_in.run(tmp_path, checkpoint_dir=folder)
    with pytest.raises(CheckpointError, match="was made with"):
        stand_in.run(
            tmp_path, checkpoint_dir=folder, resume_from_checkpoint="latest", run_config={"learning_rate": 2e-2}
        )


def test_a_checkpoint_of_the_store_is_where_a_run_on_a_disk_begins(folder, tmp_path):
    undisturbed = stand_in.run(tmp_path / "undisturbed", checkpointing_steps=0)
    stand_in.run(tmp_path / "first", max_train_steps=4, checkpoint_dir=folder)
    second = stand_in.run(tmp_path / "second", resume_from_checkpoint=f"{folder}/checkpoint-4")
    assert fingerprint(second) == fingerprint(undisturbed)
    assert list_checkpoints(tmp_path / "second") == [8, 10]


def test_a_folder_on_another_disk(tmp_path):
    given = {"checkpoint_dir": str(tmp_path / "large")}
    stand_in.run(tmp_path / "run", **given)
    assert list_checkpoints(tmp_path / "large") == [4, 8, 10]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    resumed = stand_in.run(tmp_path / "run", max_train_steps=12, resume_from_checkpoint="checkpoint-10", **given)
    assert resumed.step == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint_dir": "gs://nowhere/run"}, "gs://nowhere/run cannot be used (.*): check the name of the bucket"),
        (
            {"checkpoint_dir": "s3://bucket/run"},
            r"--checkpoint_dir s3://bucket/run has to be a folder or on Google Cloud",
        ),
        ({"resume_from_checkpoint": "az://x/checkpoint-4"}, "--resume_from_checkpoint az://x/checkpoint-4 has to be"),
        ({"resume_from_checkpoint": "gs://bucket/checkpoint-4"}, "gs://bucket/checkpoint-4 is not a checkpoint"),
        (
            {"output_dir": "gs://bucket/run"},
            "--output_dir gs://bucket/run has to be on this machine: use --checkpoint_dir",
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(store, tmp_path, given, message):
    with pytest.raises((OSError, ValueError), match=message) as caught:
        starting.start(LoopFlags(**({"output_dir": str(tmp_path)} | given)))
    assert "\n" not in str(caught.value)


def test_a_store_that_may_not_be_written_is_noticed_before_training(folder, tmp_path, monkeypatch):
    def refuse(handler) -> None:
        handler.send_error(403)

    monkeypatch.setattr(RequestHandler, "do_POST", refuse)
    with pytest.raises(OSError, match=r"run cannot be used .*Forbidden.*check the name of the bucket"):
        stand_in.run(tmp_path, checkpoint_dir=folder)


@pytest.mark.parametrize("asked", ["/run/", "/checkpoint-4/"])
def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(folder, tmp_path, monkeypatch, asked):
    save(folder, 4)
    answer = RequestHandler.do_GET

    def fail(handler) -> None:
        prefix = parse_qs(urlsplit(handler.path).query).get("prefix", [""])[0]
        handler.send_error(403) if f"{prefix}/".endswith((asked, f"{asked}/")) else answer(handler)

    monkeypatch.setattr(RequestHandler, "do_GET", fail)
    with pytest.raises(OSError, match="cannot be used"):
        stand_in.run(tmp_path, checkpoint_dir=folder, resume_from_checkpoint="latest")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs: python3 -m pip install 'codi_jax\[gcs\]'"):
        starting.start(LoopFlags(output_dir=str(tmp_path), checkpoint_dir="gs://bucket/run"))
