"""What a table may make this machine open: addresses of the web by the downloader, and files in its own folder.

A table is someone else's word. Where it says http or https, the downloader with its limits is the only way there; where
it names a file, that lies in the folder that the user named, unless the user trusts the table with more.
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
_BUILDERS = ("imagefolder",)  # of `datasets`: their paths are of files that they found or fetched, not of a table


@dataclass(frozen=True)
class Access:
    """What the cells of a table may name.

    Attributes:
      folder: what relative paths are relative to, a path or a URL; ``None`` for the working directory.
      inside: the folder that files have to be in; ``None`` for `folder`.
      anywhere: whether files may be elsewhere.
      downloads: how addresses of the web are downloaded.
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
          RejectedError: if it is not allowed, or not there.
          OSError: if it cannot be read.
        """
        where = self.locate(name)
        if is_web(where):
            own = self._is_below(where)  # the user named the server, which may be this machine
            return fetch(where, replace(self.downloads, allow_private_addresses=True) if own else self.downloads)
        return read_file(where)

    def _local(self, name: str) -> str:
        base = "" if self.folder is None or is_url(self.folder) else self.folder
        path = Path(os.path.normpath(Path(base, name).absolute()))  # what is checked is what is opened
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
    """Whether it is an address of the web, which the downloader reads."""
    return _scheme(address) in ("http", "https")


def read_file(where: str) -> bytes:
    """A file of the user's: a path, or a URL that `fsspec` opens.

    Raises:
      RejectedError: if there is none.
      OSError: if it cannot be read.
    """
    try:
        if _scheme(where):
            with fsspec.open(where, "rb", expand=False) as file:
                return file.read()  # type: ignore[union-attr]
        if Path(where).exists() and not Path(where).is_file():  # a device or a pipe would never end
            raise RejectedError("no such file", f"{where} is no regular file")
        return Path(where).read_bytes()
    except FileNotFoundError as error:
        raise RejectedError("no such file", str(error)) from None
    except ValueError as error:  # of a name that can be none
        raise RejectedError("no such file", str(error)) from None


def names_own_files(rows: Any) -> bool:
    """Whether the paths in rows that `datasets` has just made are of files that it found itself, or fetched."""
    info: datasets.DatasetInfo | None = getattr(rows, "info", None)
    return info is not None and info.builder_name in _BUILDERS


def _scheme(name: str) -> str:
    found = _SCHEME.match(name) if is_url(name) else None
    return found[1].lower() if found else ""


def _lies_in(path: Path, root: Path) -> bool:
    """As they are written, or as symbolic links lead; links in the folder are the user's own."""
    return path.is_relative_to(os.path.normpath(root.absolute())) or path.resolve().is_relative_to(root.resolve())


def _normalized(url: str) -> str:
    scheme, _, path = url.partition("://")
    return f"{scheme.lower()}://{os.path.normpath(path)}"


def _outside() -> RejectedError:
    return RejectedError(
        "a path outside of the input's folder",
        "it lies outside of the folder of the data, where --allow_outside_paths alone reads",
    )
