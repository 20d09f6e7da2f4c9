"""Arrays on disk that are written row by row and read in any order, with a checksum for each row.

An array is in ``<name>.npy``, and next to it ``<name>.crc32.npy`` has the CRC-32 of each of its rows, or of each view
of a row for arrays that hold several.
"""

import errno
import math
import os
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt32
from numpy.lib.format import open_memmap

from codi_jax.io.atomic import write_json
from codi_jax.io.json_files import JsonError, read_object

_CHECKSUMS = ".crc32"


class DamagedRowsError(ValueError):
    """Files that differ from what was written."""


@dataclass(frozen=True)
class RowFile:
    """An array that is read row by row.

    Attributes:
      file: the path.
      array: memory-mapped.
      checksums: checksums with the leading axes of the array; ``None`` if it was written without.
    """

    file: Path
    array: Shaped[np.ndarray, "rows ..."]
    checksums: UInt32[np.ndarray, "rows ..."] | None

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: Shaped[np.ndarray, " b"], views: Shaped[np.ndarray, " b"] | None = None) -> np.ndarray:
        """Copies some rows, or one view of each.

        Raises:
          DamagedRowsError: naming the first row that differs from what was written.
        """
        index = (rows,) if views is None else (rows, views)
        taken = np.asarray(self.array[index])
        if self.checksums is not None:
            wrong = np.flatnonzero(_crc32(taken, 1) != self.checksums[index])
            if len(wrong):
                raise DamagedRowsError(
                    f"{self.file} is damaged at row {rows[wrong[0]]}: remove the folder {self.file.parent} to compute "
                    "what it holds again."
                )
        return taken


def open_rows(folder: Path) -> dict[str, RowFile]:
    """The arrays in a folder by name.

    Raises:
      DamagedRowsError: if a file is truncated, or its checksums do not match its rows.
    """
    arrays = {file.name.removesuffix(".npy"): _map(file) for file in sorted(folder.glob("*.npy"))}
    found = {}
    for name, array in arrays.items():
        if name.endswith(_CHECKSUMS):
            continue
        checksums, file = arrays.get(name + _CHECKSUMS), folder / f"{name}.npy"
        if checksums is not None and checksums.shape != array.shape[: checksums.ndim]:
            raise DamagedRowsError(f"{file} and its checksums are not of one size")
        found[name] = RowFile(file, array, checksums)
    return found


def save_rows(file: Path, array: Shaped[np.ndarray, "rows ..."]) -> None:
    """Writes a complete array as `RowWriter` does."""
    np.save(file, array)
    np.save(file.with_suffix(f"{_CHECKSUMS}.npy"), _crc32(array, 1))


def create(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new array of zeros whose disk space is allocated at once.

    Otherwise a full disk would end the process with SIGBUS when the memory-mapped file is written.

    Raises:
      OSError: if the disk is full.
    """
    try:
        array = open_memmap(file, "w+", dtype, shape)
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise OSError(
            f"the disk has no space for the {size / 1e9:.3g} GB of {file}: free some, or choose another disk with "
            "--cache_latents_dir."
        ) from error
    return array


class RowWriter:
    """Writes arrays of a known number of rows in order; after an interruption it knows how many are written.

    Args:
      folder: the files' folder.
      name: the name of the group of arrays that are written together.
      length: number of rows of each.
      views: names of the arrays whose second axis holds views, which are read one at a time.
    """

    def __init__(self, folder: Path, name: str, length: int, views: tuple[str, ...] = ()) -> None:
        self._folder, self._length, self._views = folder, length, views
        self._progress = folder / f"{name}.progress"
        self._arrays: dict[str, np.memmap] = {}
        kept = _read_progress(self._progress)
        self.rows: int = kept["rows"]
        self.notes: dict[str, str] = kept["notes"]

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes some rows."""
        for name, rows in self._with_checksums(arrays):
            if name not in self._arrays:
                self._arrays[name] = self._open(self._folder / f"{name}.npy", rows)
            self._arrays[name][self.rows : self.rows + len(rows)] = rows
        self.rows += len(next(iter(arrays.values())))

    def keep(self) -> None:
        """Flushes the rows, so that an interruption cannot lose them."""
        for array in self._arrays.values():
            array.flush()
        write_json(self._progress, {"rows": self.rows, "notes": self.notes, "checksums": True}, indent=None)

    def _with_checksums(self, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for name, rows in arrays.items():
            yield name, rows
            yield name + _CHECKSUMS, _crc32(rows, 2 if name in self._views else 1)

    def _open(self, file: Path, rows: np.ndarray) -> np.memmap:
        shape = (self._length, *rows.shape[1:])
        return open_memmap(file, "r+") if self.rows else create(file, rows.dtype, shape)


def _crc32(array: Shaped[np.ndarray, "rows ..."], axes: int) -> UInt32[np.ndarray, "rows ..."]:
    """The CRC-32 of the data behind the leading axes."""
    shape = array.shape[:axes]
    items = np.ascontiguousarray(array).reshape(math.prod(shape), -1).view(np.uint8)
    return np.array([zlib.crc32(item.data) for item in items], np.uint32).reshape(shape)


def _map(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:  # its header is parsed as Python
        raise DamagedRowsError(f"{file} cannot be read ({error})") from None


def _read_progress(file: Path) -> dict[str, Any]:
    """The progress that `RowWriter.keep` wrote; none if the file does not exist or is damaged."""
    try:
        kept = read_object(file, "the rows are computed again")
    except (OSError, JsonError):
        kept = {}
    if kept.get("checksums") and isinstance(kept.get("rows"), int) and isinstance(kept.get("notes"), dict):
        return kept
    return {"rows": 0, "notes": {}}
