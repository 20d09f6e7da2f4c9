"""Digests of files and parameters, and a folder's checksums, written next to its files to detect damage."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from codi_jax.io.atomic import write_json
from codi_jax.io.json_files import JsonError, read_object
from codi_jax.models import sharding

CHECKSUMS_NAME = "checksums.json"
_THREADS = 8


class DamagedError(ValueError):
    """A file is missing, or differs from what was written."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, pattern: str) -> str:
    """SHA-256 of the contents of all files in a folder that match a pattern, one after another, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def digest_of(tree: Any) -> str:
    """SHA-256 of parameters, including names; if they are split among processes, all of them must call it.

    Args:
      tree: a tree of arrays, on devices or in host memory.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(sharding.fetch(leaf).tobytes())
    return digest.hexdigest()


def update_with_values(digest: Any, tree: Any) -> None:
    """Feeds the values of a tree, in its own order and without names, to a digest of several things.

    The fingerprints of cached latents depend on it, so its result must never change.

    Args:
      digest: a `hashlib` digest.
      tree: a tree of arrays; all processes that these are split among must call it.
    """
    for leaf in jax.tree.leaves(tree):
        digest.update(sharding.fetch(leaf).tobytes())


def write_checksums(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Writes ``checksums.json``: the size and SHA-256 of every file below ``folder``.

    Args:
      folder: the files' folder.
      leave_out: names of files to skip, because they may still change.

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
    write_json(folder / CHECKSUMS_NAME, {"files": entries, "sha256": _entries_digest(entries)}, indent=1)


def verify_checksums(folder: Path) -> None:
    """Compares the files below ``folder`` with its ``checksums.json``, if that exists.

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
            raise DamagedError(f"{file} has {file.stat().st_size} bytes instead of {entries[name]['size']}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(names, pool.map(file_digest, [folder / name for name in names]), strict=True):
            if digest != entries[name]["sha256"]:
                raise DamagedError(f"{folder / name} is not what was written")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        contents = read_object(path, "restore it")
    except JsonError:
        contents = {}
    entries = contents.get("files")
    if not isinstance(entries, dict) or contents.get("sha256") != _entries_digest(entries):
        raise DamagedError(f"{path} is not what was written")
    return entries


def _entries_digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
