"""What goes in: one sample as it is found."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Url:
    """A picture that has to be downloaded: text from a list that someone else made, not to be trusted."""

    address: str


@dataclass(frozen=True)
class File:
    """A picture in a file that the user named: a path, or a URL that `fsspec` opens."""

    path: str


Cell = Url | File | bytes
"""Where a picture is, or the bytes of its file."""


@dataclass(frozen=True)
class InputRow:
    """One sample of the input.

    Attributes:
      position: among the rows of the input, counted from 0. It names the files that are written: nothing that stands in
        the input does, so no file can land elsewhere, and two rows with the same id stay two.
      id: the input's own, which decides what is random about the sample; two rows with one id get the same.
      pictures: by the name of the column that they are written to.
      texts: likewise.
    """

    position: int
    id: str
    pictures: Mapping[str, Cell]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its files, without an ending."""
        return f"image_{self.position:09}"

    def rng(self, seed: int) -> np.random.Generator:
        """The generator for all that is random about it: a function of (seed, id)."""
        digest = hashlib.sha256(self.id.encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng((seed % 2**64, int.from_bytes(digest[:8], "big")))


@dataclass(frozen=True)
class Skipped:
    """A row that was rejected by its columns alone."""

    position: int
    reason: str


def clean_text(value: str | bytes | None) -> str:
    """A caption on one line, as valid Unicode: what is broken becomes U+FFFD."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "replace")
    text = (value or "").encode("utf-8", "replace").decode("utf-8")
    return " ".join(text.replace("\0", " ").split())
