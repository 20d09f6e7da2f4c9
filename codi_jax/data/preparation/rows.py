"""The rows of the input, before anything is downloaded or decoded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Url:
    """A picture that has to be downloaded: untrusted text from a list."""

    address: str


@dataclass(frozen=True)
class File:
    """A picture in a user's file: a path, or a URL that `fsspec` opens."""

    path: str


Cell = Url | File | bytes
"""The location of a picture, or the bytes of its file."""


@dataclass(frozen=True)
class InputRow:
    """One sample of the input.

    Attributes:
      position: the position among the rows of the input, counted from 0. It names the written files, and contents of
        the input never do: no file can be written elsewhere, and rows with the same id stay separate.
      id: the input's id, which random choices depend on: rows with the same id get the same.
      pictures: pictures by the name of the column that they are written to.
      texts: texts by the name of the column that they are written to.
    """

    position: int
    id: str
    pictures: Mapping[str, Cell]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its files, without extension."""
        return f"image_{self.position:09}"

    def rng(self, seed: int) -> np.random.Generator:
        """The generator of all random choices of the row, a function of (seed, id)."""
        digest = hashlib.sha256(self.id.encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng((seed % 2**64, int.from_bytes(digest[:8], "big")))


@dataclass(frozen=True)
class Skipped:
    """A row that was rejected by its columns, before its pictures were read."""

    position: int
    reason: str


def clean_text(value: str | bytes | None) -> str:
    """A caption on one line, as valid Unicode: invalid characters become U+FFFD."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "replace")
    text = (value or "").encode("utf-8", "replace").decode("utf-8")
    return " ".join(text.replace("\0", " ").split())
