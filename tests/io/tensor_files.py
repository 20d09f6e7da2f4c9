"""Tensors of every kind, and hand-made files of them."""

import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from peak_memory import PEAK

from codi_jax.io.weight_files import WeightFile

ROOT = Path(__file__).resolve().parents[2]
TORCH_FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


# What takes more than ten seconds of CPU time is killed.
LIMITED = (
    PEAK
    + """
import resource, sys
from codi_jax.io.weight_files import open_weights
from codi_jax.models.config import WeightsError

resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
before = peak()
for path in sys.argv[1:]:
    try:
        list(open_weights(path).arrays())
    except WeightsError as error:
        assert path in str(error) and str(error).isprintable() and len(str(error)) < 1000, str(error)[:2000]
    else:
        raise SystemExit(f"{path} was read")
    grown = peak() - before
    assert grown < 100_000, f"{path} took {grown} KB"
"""
)


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
