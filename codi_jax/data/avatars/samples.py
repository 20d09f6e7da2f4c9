"""Samples of avatars, with the columns that training reads, and a stream of them without files.

``--dataset_name avatars:text`` or ``avatars:edit`` trains on the stream; a third part is the side of the pictures, as
in ``avatars:text:128``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset
from jaxtyping import UInt8

from codi_jax.data.avatars.captions import caption, random_edit
from codi_jax.data.avatars.looks import Split, draw, random_look, require_packages
from codi_jax.data.avatars.vocabulary import KINDS
from codi_jax.io.images import canny, encode_image

Task = Literal["text", "edit"]

SIZE = 64
"""The default side of the pictures, in pixels."""
_IN_AN_EPOCH, _PARTS = 2**20, 1024
_NAME = re.compile(r"avatars:(text|edit)(?::(\d{2,4}))?")


@dataclass(frozen=True)
class AvatarSample:
    """One sample.

    Attributes:
      pictures: pictures by column.
      texts: texts by column; attributes are JSON.
    """

    pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]]
    texts: Mapping[str, str]


def random_sample(
    rng: np.random.Generator, task: Task, split: Split, size: int, kinds: Sequence[str] = tuple(KINDS)
) -> AvatarSample:
    """A picture with its caption, or two pictures with an instruction.

    Args:
      rng: the generator of all choices.
      task: ``text`` or ``edit``.
      split: the split.
      size: the side of the pictures, in pixels.
      kinds: the kinds of avatars.
    """
    kind = str(rng.choice(kinds))
    if task == "text":
        look = random_look(rng, split, kind)
        texts = {"text": caption(look, rng), "attributes": json.dumps(dict(look))}
        return AvatarSample({"image": draw(look, size)}, texts)
    edit = random_edit(rng, split, kind)
    wording = int(rng.integers(2**32))  # the same for both captions
    texts = {
        "edit_prompt": edit.instruction,
        "original_prompt": caption(edit.before, np.random.default_rng(wording)),
        "edited_prompt": caption(edit.after, np.random.default_rng(wording)),
        "attributes": json.dumps(dict(edit.before)),
        "edited_attributes": json.dumps(dict(edit.after)),
    }
    return AvatarSample({"input_image": draw(edit.before, size), "edited_image": draw(edit.after, size)}, texts)


def names_avatars(name: str) -> bool:
    """Whether a data set's name is that of a stream of avatars."""
    return name.startswith("avatars:")


def stream(name: str) -> IterableDataset:
    """Rows of the training split, drawn when they are read.

    Args:
      name: such as ``avatars:text`` or ``avatars:edit:128``.

    Raises:
      ValueError: if the name is another, or the packages that draw are not installed.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(
            f"--dataset_name {name} is not possible: it must be avatars:text or avatars:edit, with a size or without, "
            "as in avatars:text:128."
        )
    require_packages()
    task, size = parts[1], int(parts[2] or SIZE)
    numbers = Dataset.from_dict({"number": range(_IN_AN_EPOCH)}).to_iterable_dataset(num_shards=_PARTS)
    return numbers.map(_row, remove_columns=["number"], fn_kwargs={"task": task, "size": size})


def _row(row: Mapping[str, int], task: Task, size: int) -> dict[str, Any]:
    sample = random_sample(np.random.default_rng(row["number"]), task, "train", size)
    pictures = dict(sample.pictures)
    if task == "text":
        pictures["conditioning_image"] = np.repeat(canny(pictures["image"])[..., None], 3, axis=-1)
    cells = {column: {"bytes": encode_image(pixels), "path": None} for column, pixels in pictures.items()}
    return {**cells, **sample.texts}
