"""The samples of avatars as data tools write them, see `codi_jax.data.avatars.samples`."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from codi_jax.data.avatars.looks import Split
from codi_jax.data.avatars.samples import Task, random_sample
from codi_jax.data.preparation.conditions import PairFlags, make_condition
from codi_jax.data.preparation.pictures import encode, encode_exactly
from codi_jax.data.preparation.rows import InputRow
from codi_jax.data.preparation.samples import Sample


def numbered_rows() -> Iterator[InputRow]:
    """Rows without an end that have nothing but their number."""
    return (InputRow(position, str(position), {}) for position in itertools.count())


@dataclass(frozen=True)
class DrawAvatar:
    """Draws the pictures of a row and, for captions, the condition image.

    Attributes:
      task: captions or edits.
      flags: how pictures and conditions are made.
      split: the split.
      kinds: the kinds of avatars.
      seed: the seed of all random choices, together with the row's number.
    """

    task: Task
    flags: PairFlags
    split: Split
    kinds: tuple[str, ...]
    seed: int

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Draws them; there are no files."""
        rng = row.rng(self.seed)
        drawn = random_sample(rng, self.task, self.split, self.flags.resolution, self.kinds)
        pictures = {column: encode(pixels, self.flags) for column, pixels in drawn.pictures.items()}
        condition = make_condition(self.flags) if self.task == "text" else None
        if condition is not None:
            pictures["conditioning_image"] = encode_exactly(condition(drawn.pictures["image"], rng))
        return [Sample(row.position, row.key, pictures, drawn.texts)]
