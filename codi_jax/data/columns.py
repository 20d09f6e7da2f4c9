"""The columns that are read from a data set: how they are found by name, and what a caption may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from codi_jax.cli.messages import listed

FALLBACKS = {"image": ("file_name", "jpg", "png", "jpeg", "webp"), "text": ("caption", "txt")}
"""Other names of a column, tried if the flag has its default."""


_ENDINGS = (".jpg", ".png", ".jpeg", ".webp", ".txt")  # of the files in a WebDataset's samples, which are its columns


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read.

    Attributes:
      image: pictures to generate; ``None`` if they are not read.
      caption: their texts, one or a list per picture; ``None`` if they are not read.
      condition: pictures to condition on, if the data has them.
    """

    image: str | None
    caption: str | None
    condition: str | None = None

    def names(self) -> list[str]:
        """The names of all columns that are read."""
        return [name for name in (self.image, self.caption, self.condition) if name is not None]


def find_columns(wanted: Columns, names: Sequence[str], where: str, condition_is_optional: bool) -> Columns:
    """The columns that flags ask for, under the data set's names.

    Args:
      wanted: the names that the flags give.
      names: the names of all its columns.
      where: the data set, for messages.
      condition_is_optional: accept a missing condition column.

    Raises:
      ValueError: naming the flag of a column that is missing, and the columns that exist.
    """
    condition = wanted.condition
    if condition is not None and condition_is_optional and condition not in names:
        condition = None
    return Columns(
        None if wanted.image is None else _find_column(wanted.image, names, where, "--image_column"),
        None if wanted.caption is None else _find_column(wanted.caption, names, where, "--caption_column"),
        condition and _find_column(condition, names, where, "--conditioning_image_column"),
    )


def _find_column(name: str, names: Sequence[str], where: str, flag: str) -> str:
    others = (*FALLBACKS.get(name, ()), *(f"{name}{ending}" for ending in _ENDINGS))
    found = next((column for column in (name, *others) if column in names), None)
    if found is None:
        raise ValueError(f"{where} has no column {name!r}: set {flag} to one of {listed(list(names))}.")
    return found


def captions_of(cell: Any) -> list[str]:
    """The texts of a sample as a list: the cell's texts, or the empty text if it has none.

    Raises:
      ValueError: if the cell is neither a text nor a list of texts.
    """
    texts = [cell] if isinstance(cell, str) else [] if cell is None else cell
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a text or a list of texts, not {cell!r:.40}: check --caption_column.")
    return list(texts) or [""]


def check_captions(name: str, features: datasets.Features | None, where: str) -> None:
    """Raises `ValueError` if the column of captions holds neither texts nor lists of texts."""
    feature = features[name] if features is not None else None
    kind = getattr(feature, "feature", feature)  # for a list, its elements' type
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"column {name!r} of {where} holds {feature}, not texts or lists of texts: set --caption_column to another."
        )
