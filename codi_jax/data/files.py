"""Folders on this machine or on an object store, by path or by a URL that `fsspec` opens (``gs://``, ``s3://``, …)."""

import contextlib
import functools
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from codi_jax.io.json_files import parse_object


def is_url(path: str) -> bool:
    """Whether a path is a URL, not a local path."""
    return "://" in path


@functools.lru_cache
def _open_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened: {error}") from None


@dataclass(frozen=True)
class Folder:
    """A folder, which need not exist.

    Attributes:
      path: a local path, where ~ is the user's home, or a URL.

    Raises:
      ValueError: on first use, if no installed package opens URLs of this kind.
    """

    path: str

    def __post_init__(self) -> None:
        if not is_url(self.path):
            object.__setattr__(self, "path", str(Path(self.path).expanduser()))

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> "Folder":
        return Folder(posixpath.join(self.path, name))

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system of `fsspec`."""
        return _open_filesystem(self.path)[0]

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine."""
        return "file" in _protocols(self.fs)

    def locate(self, name: str = "") -> str:
        """The path of a file in the folder, as its file system names it."""
        root = _open_filesystem(self.path)[1]
        return posixpath.join(root, name) if name else root

    def url(self, name: str) -> str:
        """The full path or URL of a file in the folder."""
        return posixpath.join(self.path, name)

    def is_dir(self) -> bool:
        """Whether the folder exists."""
        return self.fs.isdir(self.locate())

    def has(self, name: str) -> bool:
        """Whether the folder has a file with that name."""
        return self.fs.isfile(self.locate(name))

    def names(self) -> list[str]:
        """The names of its entries; none if the folder does not exist."""
        if not self.is_dir():
            return []
        self.fs.invalidate_cache(self.locate())
        return sorted(posixpath.basename(path.rstrip("/")) for path in self.fs.ls(self.locate(), detail=False))

    def open(self, name: str, mode: str = "rb") -> Any:
        """Opens a file in the folder, in binary; writing makes the folder."""
        if "w" in mode:
            self.fs.makedirs(posixpath.dirname(self.locate(name)), exist_ok=True)
        return self.fs.open(self.locate(name), mode)

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        with self.open(name) as file:
            return file.read()

    def read_json(self, name: str, remedy: str) -> dict[str, Any]:
        """The JSON object in a file; for ``remedy`` see `codi_jax.io.json_files.read_object`.

        Raises:
          JsonError: naming the file, if it is not a JSON object.
        """
        return parse_object(self.read(name), self.url(name), remedy)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Any]:
        """A file to write to, in binary, which gets its name when the block ends, or is removed after an error.

        Leftovers of a killed attempt are overwritten by the next one.
        """
        folder, base = posixpath.split(name)
        partial = posixpath.join(folder, f".{base}.partial")
        try:
            with self.open(partial, "wb") as file:
                yield file
            self.fs.mv(self.locate(partial), self.locate(name))
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(self.locate(partial))
            raise

    def write(self, name: str, data: bytes) -> None:
        """Writes a file completely or not at all."""
        with self.staged(name) as file:
            file.write(data)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Writes many files, concurrently on an object store."""
        for parent in sorted({posixpath.dirname(self.locate(name)) for name in files}):
            self.fs.makedirs(parent, exist_ok=True)
        self.fs.pipe({self.locate(name): data for name, data in files.items()})

    def take(self, names: Iterable[str], source: "Folder") -> None:
        """Moves files from another folder of the same file system here; files that were already moved stay."""
        names = list(names)
        for parent in sorted({posixpath.dirname(self.locate(name)) for name in names}):
            self.fs.makedirs(parent, exist_ok=True)
        if not self.is_local:  # here moving is copying, and the entire source is removed later
            self.fs.copy([source.locate(name) for name in names], [self.locate(name) for name in names])
            return
        for name in names:
            try:
                Path(source.locate(name)).replace(self.locate(name))
            except FileNotFoundError:
                if not self.has(name):
                    raise

    def remove(self) -> None:
        """Removes the folder and its contents, if it exists."""
        if self.is_dir():
            self.fs.rm(self.locate(), recursive=True)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
