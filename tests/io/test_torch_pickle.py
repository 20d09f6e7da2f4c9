"""PyTorch's pickles, which are read without being run: honest ones, and hostile ones."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from tensor_files import LIMITED, ROOT, STORAGE, TORCH_FORMATS, assert_same, handmade, tensor_program

from codi_jax.io.weight_files import open_weights
from codi_jax.models.config import WeightsError


class Attack:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def attacks(marker: Path) -> dict[str, tuple[object, str]]:
    """What pickles run when they are trusted, and the name that is to be reported."""
    command = f"touch {marker}"
    hidden = np.array([Attack(os.system, command)], dtype=object)
    return {
        "system": (Attack(os.system, command), "posix.system"),
        "eval": (Attack(eval, f"__import__('os').system({command!r})"), r"(builtins|__builtin__)\.eval"),
        "nested": ({"state_dict": {"a": [(Attack(os.system, command),)]}}, "posix.system"),
        "beside": ({"a": torch.zeros(2), "optimizer": Attack(os.system, command)}, "posix.system"),
        "numpy": ({"a": hidden}, r"numpy\._?core\.multiarray\._reconstruct"),
        "subprocess": (Attack(subprocess.Popen, ["touch", str(marker)]), r"(subprocess|commands)\.Popen"),
        "getattr": (Attack(getattr, OrderedDict, "__class__"), r"(builtins|__builtin__)\.getattr"),
        "load": (Attack(torch.storage._load_from_bytes, b""), r"torch\.storage\._load_from_bytes"),
        "module": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    }


# torch pickles tensors with protocol 2 and later only.
@pytest.mark.parametrize(
    ("name", "protocol"),
    [(name, protocol) for name in attacks(Path("x")) for protocol in (2, 4)] + [("system", 0), ("eval", 0)],
)
@TORCH_FORMATS
def test_pickles_that_want_to_run_code(tmp_path: Path, name: str, protocol: int, is_zip: bool):
    content, reported = attacks(tmp_path / "was_run")[name]
    path = tmp_path / "model.bin"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        WeightsError, match=rf"model\.bin tries to run code \({reported}\), which is refused: use a safetensors"
    ):
        open_weights(path)
    assert not (tmp_path / "was_run").exists()


def test_the_attacks_work_when_trusted(tmp_path: Path):
    """Without this, the test above could pass because its pickles were harmless."""
    for name in ("system", "eval", "nested", "numpy"):
        torch.save(attacks(tmp_path / name)[name][0], tmp_path / "model.bin")
        torch.load(tmp_path / "model.bin", weights_only=False)
        assert (tmp_path / name).exists()


def test_handmade_pickle_is_read(tmp_path: Path):
    """The programs of the next test fail for what they ask, not for how they are written."""
    weights = open_weights(handmade(tmp_path / "m.bin", tensor_program(1, 2, 2)))
    np.testing.assert_array_equal(np.asarray(weights["a"]), [1, 3])


@pytest.mark.parametrize(
    "program",
    [
        tensor_program(0, 5, 1),  # beyond the end
        tensor_program(3, 2, 1),
        tensor_program(-1, 2, 1),  # before the beginning
        tensor_program(3, 2, -1),
        tensor_program(0, -2, 1),
        tensor_program(0, 2, 1 << 30),
        b"}ccollections\nOrderedDict.__init__.__globals__\nX\x01\x00\x00\x00as.",  # dotted names
        b"ctorch\nFloatStorage\n}(X\x01\x00\x00\x00aK\x01ub.",  # sets attributes of what a name stands for
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x07\x00\x00\x00__doc__K\x01s\x86b.",  # of a function
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"ctorch._utils\n_rebuild_parameter\n)R.",  # too few arguments
        b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\ntQ.",  # unknown persistent id
        b"\x82\x01.",  # extension registry
        b"\x8a\xff" + b"\x01" * 255 + b".",
        b"]0.",
        b"",
    ],
)
def test_hostile_opcodes(tmp_path: Path, program: bytes):
    with pytest.raises(WeightsError, match=r"m\.bin"):
        open_weights(handmade(tmp_path / "m.bin", program))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def bombs() -> dict[str, bytes]:
    """Small pickles, without their protocol, that take memory or time without end."""
    doubled = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    deep = b")" + b"\x85" * 200_000
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE
    many = b"(" + b"K\x01" * 100_000 + b"tq\x00" + b"}" + b"h\x00Ns" * 100_000 + b"."
    items = b"ccollections\nOrderedDict\nq\x00](" + b"".join(text(f"{i}") + b"N\x86" for i in range(20_000))
    return {
        "memo index": b"}r\xff\xff\xff\x1f" + text("a") + b"Ns.",
        "memo index in text": b"}p99999999999\n" + text("a") + b"Ns.",
        "doubled tuples as a key": b"}" + doubled + b"Ns.",
        "doubled tuples in a set": b"\x8f(" + doubled + b"\x90.",
        "doubled tuples in a frozen set": b"(" + doubled + b"\x91.",
        "doubled tuples as a key of an ordered dictionary": b"ccollections\nOrderedDict\n]" + doubled + b"N\x86a\x85R.",
        "doubled tuples as attributes": b"}}" + doubled + b"Nsb.",
        "doubled tuples as a kind of storage": b"(" + doubled + b"NX\x01\x00\x00\x000NNtQ.",
        "doubled tuples as the key of a storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + doubled
        + b"NK\x04tQ.",
        "nested tuples as a key": b"}" + deep + b"Ns.",
        "nested tuples": b"}" + text("a") + deep + b"s.",
        "a long tuple as a key, again and again": many,
        "the same items, again and again": items + b"e\x85q\x01" + b"h\x00h\x01R0" * 20_000 + b".",
        "a text that is not there": b"}X\xff\xff\xff\x7f.",
        "a text of 2^62 bytes": b"}\x8d" + struct.pack("<Q", 1 << 62) + b".",
        "a number that is not there": b"}\x8b\xff\xff\xff\x7f.",
        "a text in place of a stride": b"}"
        + text("a")
        + tensor
        + b"K\x00J\xff\xff\xff\x7f\x85"
        + text("x" * 99)
        + b"\x85\x89}tRs.",
        "a text in place of a size": b"}"
        + text("a")
        + tensor
        + b"K\x00"
        + text("x")
        + b"J\xff\xff\xff\x7f\x86K\x01K\x01\x86\x89}tRs.",
        "sizes of many digits": b"}"
        + text("a")
        + tensor
        + b"K\x00("
        + (b"\x8a\xfa" + b"\x7f" * 250) * 1000
        + b"t)\x89}tRs.",
        "a hundred thousand dimensions": b"}"
        + text("a")
        + tensor
        + b"K\x00("
        + b"K\x01" * 100_000
        + b"tq\x01h\x01\x89}tRs.",
        "a view without end": b"}" + text("a") + tensor + b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89}tRs.",
        "a name without end": b"}" + text("a" * 1_000_000) + tensor + b"K\x00K\x01\x85K\x01\x85\x89}tRs.",
        "a name that cannot be printed": b"}X\x03\x00\x00\x00\xed\xa0\x80"
        + tensor
        + b"K\x00K\x01\x85K\x01\x85\x89}tRs.",
        "a dictionary in itself": b"}q\x00" + text("state_dict") + b"h\x00s.",
    }


def test_small_pickles_that_would_take_everything(tmp_path: Path):
    paths = []
    for number, (_, program) in enumerate(bombs().items()):
        paths.append(handmade(tmp_path / f"{number}.bin", program))
        legacy = tmp_path / f"{number}-legacy.bin"
        legacy.write_bytes(
            b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + b"\x80\x02" + program
        )
        paths.append(legacy)
    subprocess.run([sys.executable, "-c", LIMITED, *map(str, paths)], check=True, cwd=ROOT)


@TORCH_FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read_as_pytorch_reads_it(tensors: dict, tmp_path: Path, protocol: int, is_zip: bool):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    content = OrderedDict({**tensors, **module.state_dict(), **dict(module.named_parameters(prefix="p"))})
    path = tmp_path / "model.bin"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    assert_same(open_weights(path), torch.load(path, weights_only=False))


def test_ordered_dictionaries_of_python_2(tmp_path: Path):
    """There an OrderedDict was pickled as a call with a list of its items, and texts as bytes."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x01K\x02\x85K\x01\x85\x89}tR"
    program = b"ccollections\nOrderedDict\n](](U\x01a" + tensor + b"eeq\x01\x85R."
    path = handmade(tmp_path / "m.bin", program)
    np.testing.assert_array_equal(np.asarray(open_weights(path)["a"]), [1, 2])


def test_torch_files_without_a_state_dict(tmp_path: Path):
    for content, problem in (
        (torch.zeros(2), "holds a single tensor, not a state dict"),
        ([1, 2], "holds a list, not a state dict"),
        ({"a": torch.zeros(2), "step": 3}, "'step' is a int, not a tensor"),
        ({"unet": {"a": torch.zeros(2)}}, "'unet' is a dict, not a tensor"),
    ):
        torch.save(content, tmp_path / "model.bin")
        with pytest.raises(WeightsError, match=problem):
            open_weights(tmp_path / "model.bin")


def test_compressed_and_big_endian_archives(tmp_path: Path):
    torch.save({"a": torch.zeros(200)}, tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "model.bin") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "compressed.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match="is a compressed archive"):
        open_weights(tmp_path / "compressed.bin")
    with zipfile.ZipFile(tmp_path / "big.bin", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(WeightsError, match="big-endian"):
        open_weights(tmp_path / "big.bin")


def test_types_that_no_network_has(tmp_path: Path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "model.bin")
    with pytest.raises(WeightsError, match=r"torch\._utils\._rebuild_sparse_tensor"):
        open_weights(tmp_path / "model.bin")
    packed = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "int4", b"x")))})
    (tmp_path / "model.msgpack").write_bytes(packed)
    np.testing.assert_equal(open_weights(tmp_path / "model.msgpack")["a"].dtype, np.dtype("int4"))
    (tmp_path / "model.msgpack").write_bytes(packed.replace(b"int4", b"int5"))
    with pytest.raises(WeightsError, match="int5, which are not supported"):
        open_weights(tmp_path / "model.msgpack")
