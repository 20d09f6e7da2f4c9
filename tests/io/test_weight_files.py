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
import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tensor_files import LIMITED, ROOT, TORCH_FORMATS, as_numpy, assert_same, handmade, tensor_program

from codi_jax.io.weight_files import open_weights, write_safetensors
from codi_jax.models.config import WeightsError


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
