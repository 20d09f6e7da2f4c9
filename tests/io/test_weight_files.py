"""Every file format, written by the library that it belongs to and read by `codi_jax.io.weight_files`."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from codi_jax.io.weight_files import WeightFile, open_weights, write_safetensors
from codi_jax.models.config import WeightsError

ROOT = Path(__file__).resolve().parents[2]
TORCH_FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().contiguous().numpy()


def assert_same(weights: WeightFile, expected: dict[str, torch.Tensor]) -> None:
    assert set(weights) == set(expected)
    for name, array in weights.arrays():
        wanted = as_numpy(expected[name])
        assert (weights[name].shape, weights[name].dtype) == (wanted.shape, wanted.dtype)
        assert (array.dtype, array.tobytes()) == (wanted.dtype, wanted.tobytes())


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.randn(5, 3, 2, 2),
        "half": torch.randn(7).half(),
        "brain.float": torch.randn(4, 6).bfloat16(),
        "double": torch.randn(3).double(),
        "ids": torch.arange(11),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def test_safetensors(tensors: dict, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    weights = open_weights(path)
    assert weights.layout == "torch"
    assert_same(weights, tensors)


@TORCH_FORMATS
def test_torch(tensors: dict, tmp_path: Path, is_zip: bool):
    path = tmp_path / "model.bin"
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=is_zip)
    weights = open_weights(path)
    assert weights.layout == "torch"
    assert_same(weights, tensors)


@TORCH_FORMATS
def test_torch_state_dict_of_a_module_and_nested(tmp_path: Path, is_zip: bool):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    path = tmp_path / "model.pt"
    # A module's state dict carries _metadata, and Parameters are pickled by a function of their own.
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=is_zip)
    assert_same(open_weights(path), module.state_dict())
    torch.save(dict(module.named_parameters()), path, _use_new_zipfile_serialization=is_zip)
    assert_same(open_weights(path), {name: parameter.data for name, parameter in module.named_parameters()})


@TORCH_FORMATS
def test_torch_views_of_one_storage(tmp_path: Path, is_zip: bool):
    whole = torch.randn(6, 5, 4)
    views = {
        "whole": whole,
        "part": whole[2:4, 1],
        "transposed": whole.transpose(0, 2),
        "strided": whole[::2, 1::3, ::2],
        "expanded": whole[1, 2, 3].expand(3, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": whole[3:3],
    }
    path = tmp_path / "model.bin"
    torch.save(views, path, _use_new_zipfile_serialization=is_zip)
    weights = open_weights(path)
    assert_same(weights, views)
    assert weights["part"].spans[0][1] < whole.numel() * 4  # only what the view covers is read
    assert weights["part"].spans[0][0] > weights["whole"].spans[0][0]


def test_torch_legacy_storage_that_is_a_view(tmp_path: Path):
    """PyTorch 0.4 saved views of storages; today's writes none, so this file is written by hand."""

    class Reference:
        def __init__(self, offset: int, size: int) -> None:
            self.pid = ("storage", torch.FloatStorage, "7", "cpu", 10, (f"view{offset}", offset, size))

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: object) -> object:
            return obj.pid if isinstance(obj, Reference) else None

    class Tensor:
        def __init__(self, reference: Reference, shape: tuple) -> None:
            self.arguments = (reference, 1, shape, (1,), False, OrderedDict())

        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, self.arguments

    path = tmp_path / "model.bin"
    data = np.arange(10, dtype=np.float32)
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump({"a": Tensor(Reference(4, 6), (3,))})
        pickle.dump(["7"], file, protocol=2)
        file.write(struct.pack("<q", 10) + data.tobytes())
    np.testing.assert_array_equal(np.asarray(open_weights(path)["a"]), [5, 6, 7])


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
def test_shards(tensors: dict, tmp_path: Path, format_: str):
    names = list(tensors)
    parts = {f"model-00001-of-00002.{format_}": names[:3], f"model-00002-of-00002.{format_}": names[3:]}
    for file, members in parts.items():
        part = {name: tensors[name] for name in members}
        save = safetensors.torch.save_file if format_ == "safetensors" else torch.save
        save(part, tmp_path / file)
    index = tmp_path / f"model.{format_}.index.json"
    weight_map = {name: file for file, members in parts.items() for name in members}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(open_weights(index), tensors)

    index.write_text(json.dumps({"weight_map": {**weight_map, "more": next(iter(parts))}}))
    with pytest.raises(WeightsError, match="names 1 tensors that its shards lack, more first"):
        open_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": f"../secret.{format_}"}}))
    with pytest.raises(WeightsError, match="shards must be next to their index"):
        open_weights(index)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / names_second(parts)).unlink()
    with pytest.raises(WeightsError, match=f"needs shards that are missing: {names_second(parts)}"):
        open_weights(index)


def names_second(parts: dict[str, list[str]]) -> str:
    return list(parts)[1]


def test_msgpack(tmp_path: Path):
    tree = {
        "conv_in": {
            "kernel": torch.randn(3, 3, 4, 8).numpy(),
            "bias": jnp.arange(8, dtype=jnp.bfloat16),
        },
        "layers": {"0": {"scale": torch.randn(300).half().numpy()}, "1": {"scale": np.float32(3)}},
        "empty": {"x": np.zeros((0, 2), np.float32)},
    }
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    weights = open_weights(path)
    assert weights.layout == "flax"
    expected = {
        "conv_in/kernel": tree["conv_in"]["kernel"],
        "conv_in/bias": np.asarray(tree["conv_in"]["bias"]),
        "layers/0/scale": tree["layers"]["0"]["scale"],
        "layers/1/scale": np.asarray(tree["layers"]["1"]["scale"]),
        "empty/x": tree["empty"]["x"],
    }
    assert set(weights) == set(expected)
    for name, array in weights.arrays():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def test_msgpack_array_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    tree = {"big": {"kernel": torch.randn(40, 30).numpy(), "bias": np.ones(30, np.float32)}}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    weights = open_weights(path)
    assert len(weights["big/kernel"].spans) == 5
    np.testing.assert_array_equal(np.asarray(weights["big/kernel"]), tree["big"]["kernel"])
    np.testing.assert_array_equal(np.asarray(weights["big/bias"]), tree["big"]["bias"])


@pytest.mark.parametrize("size", [0, 1, 13, 16, 100, 70_000])
def test_msgpack_arrays_of_every_header_size(tmp_path: Path, size: int):
    path = tmp_path / "flax_model.msgpack"
    array = np.arange(size, dtype=np.uint8)
    path.write_bytes(flax.serialization.to_bytes({"a": array, "b": np.ones(1, np.float32)}))
    np.testing.assert_array_equal(np.asarray(open_weights(path)["a"]), array)


def write_everything(folder: Path) -> list[Path]:
    tensors = {"a.weight": torch.randn(50, 20), "b.weight": torch.randn(300)}
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    torch.save(tensors, folder / "zip.bin")
    torch.save(tensors, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    (folder / "flax.msgpack").write_bytes(
        flax.serialization.to_bytes({name: tensor.numpy() for name, tensor in tensors.items()})
    )
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_files(tmp_path: Path, kept: float):
    for path in write_everything(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(WeightsError, match="download it again") as error:
            open_weights(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"\x00" * 100, os.urandom(500), b"PK\x03\x04 not a zip"])
def test_files_of_something_else(tmp_path: Path, content: bytes):
    for name in ("a.safetensors", "a.bin", "a.msgpack", "a.safetensors.index.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"a\.\w+"):
            open_weights(tmp_path / name)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    for path in write_everything(tmp_path):
        weights = open_weights(path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(WeightsError, match="ended while it was read"):
            list(weights.arrays())


def test_missing_file_and_git_lfs_pointer(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"There is no weight file .*nothing\.bin"):
        open_weights(tmp_path / "nothing.bin")
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        open_weights(path)


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


def handmade(path: Path, program: bytes) -> Path:
    """A zip as torch writes it, around a pickle of hand-written opcodes and one storage of four floats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + program)
        archive.writestr("m/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def tensor_program(offset: int, shape: int, stride: int) -> bytes:
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in (offset,))
    size, step = (b"J" + struct.pack("<i", number) + b"\x85" for number in (shape, stride))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + numbers + size + step + b"\x89}tR"
    return b"}X\x01\x00\x00\x00a" + call + b"s."


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


# What takes more than ten seconds of CPU time is killed.
LIMITED = """
import resource, sys
from codi_jax.io.weight_files import open_weights
from codi_jax.models.config import WeightsError

resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        list(open_weights(path).arrays())
    except WeightsError as error:
        assert path in str(error) and str(error).isprintable() and len(str(error)) < 1000, str(error)[:2000]
    else:
        raise SystemExit(f"{path} was read")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{path} took {grown} KB"
"""


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


def test_files_that_promise_more_than_they_hold(tmp_path: Path):
    array = {"a": np.zeros(4, np.float32)}
    packed = flax.serialization.to_bytes(array)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}).encode()
    files = {
        "array.msgpack": b"\x81\xa1a\xdd\xff\xff\xff\xff",
        "arrays.msgpack": b"\x81\xa1a" + b"\xdd\x05\xf5\xe1\x00" * 200,
        "map.msgpack": b"\xdf\xff\xff\xff\xff",
        "maps.msgpack": b"\x81\xa1a" * 100_000,
        "keys.msgpack": b"\x81" * 100_000,
        "text.msgpack": b"\x81\xdb\xff\xff\xff\xff",
        "piece.msgpack": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        "text_shape.msgpack": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1 << 40, "ab"), "uint8", b"")))}),
        "negative.msgpack": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((-2, -2), "uint8", b"1234")))}),
        "object.msgpack": packed.replace(b"float32", b"object0"),
        "record.msgpack": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "O", b"12345678")))}),
        "header.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
        "large_header.safetensors": struct.pack("<Q", 99_000_000) + b"{}",
        "nested.safetensors": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "dimensions.safetensors": struct.pack("<Q", len(header)) + header + b"1234",
        "nested.safetensors.index.json": b'{"a":' * 100_000,
        "list.safetensors.index.json": b"[]",
        "numbers.safetensors.index.json": b'{"weight_map": {"a": 1}}',
        "itself.safetensors.index.json": b'{"weight_map": {"a": "itself.safetensors.index.json"}}',
    }
    paths = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
    for name, numel in (("storage.bin", 1 << 40), ("all.bin", (1 << 64) - 1)):
        torch.save({"a": torch.zeros(4)}, tmp_path / name, _use_new_zipfile_serialization=False)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-24] + struct.pack("<Q", numel) + content[-16:])
        paths.append(str(tmp_path / name))
    with zipfile.ZipFile(handmade(tmp_path / "member.bin", tensor_program(0, 1 << 28, 1)), "a") as archive:
        archive.getinfo("m/data/0").file_size = archive.getinfo("m/data/0").compress_size = 1 << 31
        archive.writestr("m/version", "3")  # the directory is written anew
    paths.append(str(tmp_path / "member.bin"))
    subprocess.run([sys.executable, "-c", LIMITED, *paths], check=True, cwd=ROOT)


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


def test_write_safetensors_is_read_by_the_library(tensors: dict, tmp_path: Path):
    arrays = {name: as_numpy(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.values())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_no_torch_and_no_flax_is_imported():
    code = "import sys, codi_jax.io.weight_files; assert not {'torch', 'flax', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
