"""Checksums of the files of a folder, written beside them, so that damage is found before they are used."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKSUMS_NAME = "checksums.json"
_THREADS = 8


class DamagedError(ValueError):
    """A file that is missing, or is not what was written."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Writes ``checksums.json``: the size and SHA-256 of every file below ``folder``.

    Args:
      folder: of the files.
      leave_out: names of files that may still change.

    Raises:
      OSError: if a file cannot be read, or the list cannot be written.
    """
    files = [path for path in _files(folder) if path.name not in (CHECKSUMS_NAME, *leave_out)]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(file_digest, files)
        entries = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    text = json.dumps({"files": entries, "sha256": _of_entries(entries)}, indent=1)
    (folder / CHECKSUMS_NAME).write_text(text + "\n", encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Compares the files below ``folder`` with its ``checksums.json``; without one there is nothing to compare.

    Files that are not listed are ignored.

    Raises:
      DamagedError: naming the first file that is missing or differs.
    """
    path = folder / CHECKSUMS_NAME
    if not path.exists():
        return
    entries = _read(path)
    names = sorted(entries)
    for name in names:  # sizes first: that costs nothing
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        if file.stat().st_size != entries[name]["size"]:
            raise DamagedError(f"{file} has {file.stat().st_size} bytes in place of {entries[name]['size']}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(names, pool.map(file_digest, [folder / name for name in names]), strict=True):
            if digest != entries[name]["sha256"]:
                raise DamagedError(f"{folder / name} is not what was written")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if contents["sha256"] == _of_entries(contents["files"]):
            return contents["files"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DamagedError(f"{path} is not what was written")


def _of_entries(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
