"""What a table may make this machine open: web addresses through the downloader, and files in its folder.

A table is untrusted input. An http or https address is opened by the downloader with its limits, and a file must be in
the folder that the user named, unless the user allows more.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
from fsspec.implementations.local import LocalFileSystem

from codi_jax.data.files import is_url
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags, fetch

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)(::|://)", re.IGNORECASE)
_BUILDERS = ("imagefolder",)  # of `datasets`: paths name files that they found or fetched, not table cells


@dataclass(frozen=True)
class Access:
    """What the cells of a table may name.

    Attributes:
      folder: the base of relative paths, a path or a URL; ``None`` for the working directory.
      inside: the folder that must hold all files; ``None`` for `folder`.
      anywhere: whether files may be elsewhere.
      downloads: how web addresses are downloaded.
    """

    folder: str | None = None
    inside: str | None = None
    anywhere: bool = False
    downloads: DownloadFlags = field(default_factory=DownloadFlags)

    def locate(self, name: str) -> str:
        """The address or the path that a cell of the table means.

        Raises:
          RejectedError: if it is not allowed.
        """
        scheme = _scheme(name)
        if scheme in ("file", "local"):
            return self._local(LocalFileSystem._strip_protocol(name))
        if is_web(name):
            return name
        if not scheme and self.folder is not None and is_url(self.folder) and not name.startswith("/"):
            name, scheme = f"{self.folder.rstrip('/')}/{name}", _scheme(self.folder)
        return self._remote(name) if scheme else self._local(name)

    def read(self, name: str) -> bytes:
        """The file that a cell of the table names.

        Raises:
          RejectedError: if the file is not allowed, or does not exist.
          OSError: if it cannot be read.
        """
        where = self.locate(name)
        if is_web(where):
            is_chosen = self._is_below(where)  # the user named the server, which may be this machine
            return fetch(where, replace(self.downloads, allow_private_addresses=True) if is_chosen else self.downloads)
        return read_file(where)

    def _local(self, name: str) -> str:
        base = "" if self.folder is None or is_url(self.folder) else self.folder
        path = Path(os.path.normpath(Path(base, name).absolute()))  # the checked path is the opened path
        root = self._root()
        if self.anywhere or (root is not None and not is_url(root) and _lies_in(path, Path(root))):
            return str(path)
        raise _outside()

    def _remote(self, name: str) -> str:
        if self.anywhere:
            return name
        if self._is_below(name):
            return _normalized(name)
        raise _outside()

    def _is_below(self, url: str) -> bool:
        root = self._root()
        if root is None or not is_url(root) or "::" in url:
            return False
        return _normalized(url).startswith(f"{_normalized(root)}/")

    def _root(self) -> str | None:
        return self.folder if self.inside is None else self.inside


def is_web(address: str) -> bool:
    """Whether it is a web address, which the downloader reads."""
    return _scheme(address) in ("http", "https")


def read_file(where: str) -> bytes:
    """A file of the user's: a path, or a URL that `fsspec` opens.

    Raises:
      RejectedError: if the file does not exist.
      OSError: if it cannot be read.
    """
    try:
        if _scheme(where):
            with fsspec.open(where, "rb", expand=False) as file:
                return file.read()  # type: ignore[union-attr]
        if Path(where).exists() and not Path(where).is_file():  # a device or a pipe would never end
            raise RejectedError("no such file", f"{where} is not a regular file")
        return Path(where).read_bytes()
    except FileNotFoundError as error:
        raise RejectedError("no such file", str(error)) from None
    except ValueError as error:  # for names that no file can have
        raise RejectedError("no such file", str(error)) from None


def names_own_files(rows: Any) -> bool:
    """Whether the paths in rows that `datasets` has just made name files that it found or fetched itself."""
    info: datasets.DatasetInfo | None = getattr(rows, "info", None)
    return info is not None and info.builder_name in _BUILDERS


def _scheme(name: str) -> str:
    found = _SCHEME.match(name) if is_url(name) else None
    return found[1].lower() if found else ""


def _lies_in(path: Path, root: Path) -> bool:
    """Whether a path is in a folder, with or without following symbolic links; links there are the user's."""
    return path.is_relative_to(os.path.normpath(root.absolute())) or path.resolve().is_relative_to(root.resolve())


def _normalized(url: str) -> str:
    scheme, _, path = url.partition("://")
    return f"{scheme.lower()}://{os.path.normpath(path)}"


def _outside() -> RejectedError:
    return RejectedError(
        "a path outside of the input's folder",
        "it is outside of the data's folder, where only --allow_outside_paths reads",
    )
