"""Weight files as named tensors: safetensors, PyTorch's pickles (read without running them) and Flax's msgpack.

Each format is reduced to one index (name -> position of the bytes) and one reader, `StoredTensor`. Opening a file reads
only the index. Nothing is memory-mapped: pages of a mapped file count as resident memory, which would peak at twice the
size of a model while it is loaded.
"""

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import msgpack
import numpy as np
from jaxtyping import Shaped
from safetensors import safe_open

from codi_jax.io import torch_pickle
from codi_jax.io.json_files import JsonError, read_object
from codi_jax.io.torch_pickle import PickledTensor, RefusedError, checked_shape
from codi_jax.models.config import WeightsError

Layout = Literal["torch", "flax"]
"""How kernels are stored: OIHW and [out, in], or HWIO and [in, out]."""

_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NUMBERS = frozenset({*_SAFETENSORS_DTYPES.values(), "complex128"}) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_TORCH_VERSION = 1001
# Keys, scalars and the header of an array: what the msgpack index reads at a time.
_MSGPACK_WINDOW = 4096
_MAX_NAME = 1000  # characters; modules that are nested ten deep take a hundred


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: known by shape and dtype, read when NumPy asks for it (``np.asarray(tensor)``).

    Attributes:
      path: the file.
      dtype: the elements' dtype.
      shape: the array's shape.
      spans: (offset, size) in bytes of the pieces of the file that hold the data, one after another.
      strides: the strides in elements, for a tensor that is not stored in C order; ``None`` if it is.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def squeezed(self) -> "StoredTensor":
        """The same tensor without its dimensions of size 1."""
        kept = [axis for axis, size in enumerate(self.shape) if size != 1]
        strides = self.strides and tuple(self.strides[axis] for axis in kept)
        return replace(self, shape=tuple(self.shape[axis] for axis in kept), strides=strides)

    def transposed(self) -> "StoredTensor":
        """The same tensor with its dimensions in reverse."""
        strides = self.strides or tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return replace(self, shape=self.shape[::-1], strides=strides[::-1])

    def rows(self, first: int, last: int) -> "StoredTensor":
        """The part of the tensor from one index of its first dimension up to another.

        Raises:
          WeightsError: if its rows are not stored one after another.
        """
        if self.strides is not None or len(self.spans) != 1:
            raise WeightsError(f"{self.path} holds a tensor of strided rows: load it in PyTorch and save it again.")
        ((offset, _),) = self.spans
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(
            self, shape=(last - first, *self.shape[1:]), spans=((offset + first * size, (last - first) * size),)
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        """Reads the tensor into new memory.

        Raises:
          WeightsError: if the file ends early.
        """
        array = self._read_bytes().view(self.dtype)
        if self.strides is None:
            array = array.reshape(self.shape)
        else:
            strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
            array = np.ascontiguousarray(np.lib.stride_tricks.as_strided(array, self.shape, strides))
        return array if dtype is None else array.astype(dtype, copy=False)

    def _read_bytes(self) -> Shaped[np.ndarray, "n"]:
        buffer = np.empty(sum(size for _, size in self.spans), np.uint8)
        start = 0
        with self.path.open("rb") as file:
            for offset, size in self.spans:
                file.seek(offset)
                if file.readinto(buffer[start : start + size].data) != size:
                    raise WeightsError(f"{self.path} ended while it was read: it is incomplete, download it again.")
                start += size
        return buffer


class WeightFile(Mapping[str, StoredTensor]):
    """The tensors of one weight file, or of all the shards of one index, by name.

    Attributes:
      path: the file, or the index of the shards.
      layout: ``"flax"`` for msgpack, with names such as ``conv_in/kernel``; else ``"torch"``, ``conv_in.weight``.
      metadata: texts by name that safetensors files may have.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.layout: Layout = layout
        self.metadata = dict(metadata or {})
        self._tensors = dict(tensors)
        for name in self._tensors:
            if len(name) > _MAX_NAME or not name.isprintable():
                raise WeightsError(f"{path} holds a tensor of the name {ascii(name)[:80]}, which no network has.")

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def arrays(self) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """Reads every tensor in turn, holding one at a time."""
        for name, tensor in self.items():
            yield name, np.asarray(tensor)


def open_weights(path: str | Path) -> WeightFile:
    """Indexes a weight file; data is read later, one tensor at a time.

    Args:
      path: ``*.safetensors``, ``*.msgpack``, a PyTorch file (``.bin``, ``.pt``, ``.pth``, ``.ckpt``; zip or the format
        before PyTorch 1.6) or the index of shards (``*.index.json``, ``*.index.fp16.json``).

    Returns:
      The names, shapes and dtypes.

    Raises:
      WeightsError: if the file is missing, incomplete, damaged, of an unknown format, or a pickle that asks for more
        than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no weight file {path}.")
    try:
        _refuse_pointers(path)
        if path.name.endswith(".json"):
            return _open_shards(path)
        if path.suffix == ".safetensors":
            return WeightFile(path, "torch", *_index_safetensors(path))
        if path.suffix == ".msgpack":
            return WeightFile(path, "flax", _index_msgpack(path))
        return WeightFile(path, "torch", _index_torch(path))
    except (WeightsError, PermissionError):
        raise
    except RefusedError as error:
        raise WeightsError(
            f"{path} tries to run code ({error}), which is refused: use a safetensors version."
        ) from None
    # A damaged file can make a parser fail in any way; the user needs one sentence, and the cause is chained.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"{path} is incomplete, damaged or not a weight file ({reason[:200]}): download it again."
        ) from error


def write_safetensors(
    path: Path,
    header: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, holding one tensor at a time, and waits until it is on disk.

    Args:
      path: the file.
      header: name -> (dtype, shape), in the order of ``arrays``.
      arrays: the tensors.
      metadata: texts by name.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    # "pt" makes transformers read the file as PyTorch's, the only kernel layout it knows.
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array, (dtype, shape) in zip(arrays, header.values(), strict=True):
            assert (array.dtype, array.shape) == (dtype, shape)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _refuse_pointers(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository.")


def shard_names(path: Path) -> list[str]:
    """The files that an index of shards names.

    Raises:
      WeightsError: if the file is not such an index, or a shard is outside its folder.
    """
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        if Path(name).name != name or name.endswith(".json"):
            raise WeightsError(f"{path} names the shard {name!r:.80}; shards must be next to their index.")
    return names


def _weight_map(path: Path) -> dict[str, str]:
    try:
        names = read_object(path, "download it again").get("weight_map")
    except JsonError as error:
        raise WeightsError(str(error)) from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{path} is not an index of shards: download it again.")
    return names


def _open_shards(path: Path) -> WeightFile:
    names = shard_names(path)
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise WeightsError(f"{path} needs shards that are missing: {', '.join(missing)}; download them.")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= open_weights(path.parent / name)
    if absent := _weight_map(path).keys() - tensors.keys():
        raise WeightsError(
            f"{path} names {len(absent)} tensors that its shards lack, {min(absent)} first: download them again."
        )
    return WeightFile(path, "torch", tensors)


def _dtype(path: Path, name: Any) -> np.dtype:
    """The numeric dtype with this name; NumPy's other dtypes (objects, texts, records) are refused."""
    if isinstance(name, str) and (name in _NUMBERS or hasattr(ml_dtypes, name)):
        return np.dtype(name)
    shown = name if isinstance(name, str) and name.isprintable() else type(name).__name__
    raise WeightsError(f"{path} holds tensors of type {shown[:40]}, which are not supported.")


def _index_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    # The library checks the header and that it covers the entire file; it does not expose where tensors begin.
    with safe_open(path, framework="np"):
        pass
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype = _dtype(path, _SAFETENSORS_DTYPES.get(str(entry["dtype"]), str(entry["dtype"])))
            start, end = entry["data_offsets"]
            span = (8 + header_size + start, end - start)
            tensors[name] = StoredTensor(path, dtype, checked_shape(entry["shape"]), (span,))
    return tensors, header.get("__metadata__", {})


# PyTorch: a pickle of nested dictionaries whose tensors are calls of `_rebuild_tensor_v2` on storages, and the bytes of
# the storages: as members of a zip archive, or (before 1.6) one after another behind the pickle.


def _index_torch(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        content, spans = (_open_torch_zip if is_zip else _open_torch_legacy)(file, path)
    content = _state_dict(path, content)
    file_size = path.stat().st_size
    return {name: _locate(path, tensor, spans[tensor.storage.key], file_size) for name, tensor in content.items()}


def _open_torch_zip(file: io.BufferedIOBase, path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise WeightsError(f"{path} is a compressed archive: load it in PyTorch and save it again.")
        (pickle_name,) = (name for name in members if re.fullmatch(r"([^/]*/)?data\.pkl", name))
        root = pickle_name.removesuffix("data.pkl")
        if f"{root}byteorder" in members and _read_member(archive, f"{root}byteorder") != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine, which is not supported.")
        pickled = _read_member(archive, pickle_name)
    content, storages = torch_pickle.load(io.BytesIO(pickled), len(pickled))
    return content, {key: _zip_member_span(file, members[f"{root}data/{key}"]) for key in storages}


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    if (size := archive.getinfo(name).file_size) > torch_pickle.MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes, more than the index of a model takes")
    return archive.read(name)


def _zip_member_span(file: io.BufferedIOBase, member: zipfile.ZipInfo) -> tuple[int, int]:
    # The local header is 30 bytes, the name, and a padding that aligns the data.
    file.seek(member.header_offset + 26)
    name_size, extra_size = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name_size + extra_size, member.file_size


def _open_torch_legacy(file: io.BufferedIOBase, path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    size = path.stat().st_size
    magic, version, _system = (torch_pickle.load(file, size)[0] for _ in range(3))
    if (magic, version) != (_LEGACY_TORCH_MAGIC, _LEGACY_TORCH_VERSION):
        raise ValueError("it does not begin as a PyTorch file does")
    content, storages = torch_pickle.load(file, size)
    keys, _ = torch_pickle.load(file, size)
    spans = {}
    for key in keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else ():
        numel = int.from_bytes(file.read(8), "little")
        spans[key] = (file.tell(), numel * np.dtype(storages[key]).itemsize)
        if sum(spans[key]) > size:
            raise EOFError("its last bytes are missing")
        file.seek(spans[key][1], 1)
    return content, spans


def _state_dict(path: Path, content: Any) -> dict[str, PickledTensor]:
    for inner in ("state_dict", "string_to_param"):  # of checkpoints, and of A1111's textual inversions
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        kind = "single tensor" if isinstance(content, PickledTensor) else type(content).__name__
        raise WeightsError(f"{path} holds a {kind}, not a state dict of named tensors.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
            raise WeightsError(f"{path} is not a state dict: {name!r:.80} is a {type(value).__name__}, not a tensor.")
    return content


def _locate(path: Path, tensor: PickledTensor, span: tuple[int, int], file_size: int) -> StoredTensor:
    dtype, shape, strides = _dtype(path, tensor.dtype), tensor.shape, tensor.strides
    # The part of the storage from the tensor's first element to its last.
    length = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    start = tensor.storage.start * _dtype(path, tensor.storage.dtype).itemsize + tensor.offset * dtype.itemsize
    if start + length * dtype.itemsize > span[1] or sum(span) > file_size:
        raise ValueError("a tensor reaches beyond its storage")
    # A view can repeat elements without end.
    if math.prod(shape) * dtype.itemsize > file_size:
        raise ValueError("a tensor is larger than its file")
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(
        path, dtype, shape, ((span[0] + start, length * dtype.itemsize),), None if strides == contiguous else strides
    )


# Flax: nested maps whose leaves are of extension type 1, itself msgpack of (shape, name of the dtype, bytes). An array
# over 1 GB is a map of pieces. Arrays are skipped over, so that only their headers are read.


def _index_msgpack(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        tree = _scan_msgpack(file, path)
        if file.tell() != path.stat().st_size:
            raise EOFError("its end is missing, or something follows it")
    return dict(_named_leaves(path, tree))


def _scan_msgpack(file: io.BufferedIOBase, path: Path) -> Any:
    """Reads the value at the position of the file and moves behind it; arrays become `StoredTensor`."""
    start = file.tell()
    window = file.read(_MSGPACK_WINDOW)
    if (head := _extension_header(window)) is not None:
        header_size, size, code = head
        if code not in (1, 3):  # ndarray, NumPy scalar
            raise ValueError(f"unknown extension type {code}")
        tensor = _flax_array(path, window[header_size:], start + header_size, size)
        file.seek(start + header_size + size)
        return tensor
    # Values that do not fit into the window are refused; no memory is allocated for them.
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=_MSGPACK_WINDOW)
    unpacker.feed(window)
    is_map = window[0] & 0xF0 == 0x80 or window[0] in (0xDE, 0xDF)
    value = unpacker.read_map_header() if is_map else unpacker.unpack()
    file.seek(start + unpacker.tell())
    if not is_map:
        return value
    return dict(_scan_msgpack_entry(file, path) for _ in range(value))


def _scan_msgpack_entry(file: io.BufferedIOBase, path: Path) -> tuple[str, Any]:
    name = _scan_msgpack(file, path)
    if not isinstance(name, str | int):
        raise ValueError("an array has no name")
    return str(name), _scan_msgpack(file, path)


def _extension_header(window: bytes) -> tuple[int, int, int] | None:
    """(size of the header, size of the payload, type) of a msgpack extension value; ``None`` for any other value."""
    first = window[0]
    if 0xD4 <= first <= 0xD8:
        return 2, 1 << (first - 0xD4), window[1]
    if 0xC7 <= first <= 0xC9:
        size_bytes = 1 << (first - 0xC7)
        return 2 + size_bytes, int.from_bytes(window[1 : 1 + size_bytes], "big"), window[1 + size_bytes]
    return None


def _flax_array(path: Path, window: bytes, start: int, size: int) -> StoredTensor:
    unpacker = msgpack.Unpacker(max_buffer_size=_MSGPACK_WINDOW)
    unpacker.feed(window)
    if unpacker.read_array_header() != 3:
        raise ValueError("an array is not (shape, dtype, bytes)")
    shape, dtype = checked_shape(unpacker.unpack()), _dtype(path, unpacker.unpack())
    position = unpacker.tell()
    position += {0xC4: 2, 0xC5: 3, 0xC6: 5}[window[position]]  # bin8, bin16, bin32
    data_size = math.prod(shape) * dtype.itemsize
    if position + data_size != size:
        raise ValueError(f"an array of shape {shape} has {size - position} bytes instead of {data_size}")
    return StoredTensor(path, dtype, shape, ((start + position, data_size),))


def _named_leaves(path: Path, tree: Any, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    if isinstance(tree, StoredTensor):
        yield prefix, tree
    elif isinstance(tree, dict) and tree.get("__msgpack_chunked_array__"):
        yield prefix, _join_chunks(tree)
    elif isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _named_leaves(path, branch, f"{prefix}/{name}" if prefix else str(name))
    else:
        raise WeightsError(f"{path} is not a tree of arrays: {prefix or 'its root'} is a {type(tree).__name__}.")


def _join_chunks(tree: Mapping[str, Any]) -> StoredTensor:
    shape, chunks = ([tree[key][str(i)] for i in range(len(tree[key]))] for key in ("shape", "chunks"))
    joined = replace(
        chunks[0], shape=checked_shape(shape), spans=tuple(span for chunk in chunks for span in chunk.spans)
    )
    if joined.size * joined.dtype.itemsize != sum(size for _, size in joined.spans):
        raise ValueError("an array lacks some of its pieces")
    return joined
