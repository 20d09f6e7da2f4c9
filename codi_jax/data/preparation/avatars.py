"""The samples of avatars: captions and pictures, with condition images or not, or edits with their exact results."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from codi_jax.data.avatars.captions import caption, random_edit
from codi_jax.data.avatars.looks import Split, draw, random_look
from codi_jax.data.avatars.vocabulary import Look
from codi_jax.data.preparation.conditions import PairFlags, make_condition
from codi_jax.data.preparation.edits import AFTER, BEFORE, INSTRUCTION
from codi_jax.data.preparation.pictures import encode, encode_exactly
from codi_jax.data.preparation.rows import InputRow
from codi_jax.data.preparation.samples import Sample


def numbered_rows() -> Iterator[InputRow]:
    """Rows without an end that have nothing but their number."""
    position = 0
    while True:
        yield InputRow(position, str(position), {})
        position += 1


@dataclass(frozen=True)
class DrawAvatar:
    """Draws the picture of a row: "image", "text", "attributes" as JSON and, with a condition, "conditioning_image".

    Attributes:
      flags: how pictures and conditions are made.
      split: the split.
      kinds: the kinds of avatars.
      seed: the seed of all random choices, together with the row's number.
    """

    flags: PairFlags
    split: Split
    kinds: tuple[str, ...]
    seed: int

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Draws it; there are no files."""
        rng = row.rng(self.seed)
        look = random_look(rng, self.split, str(rng.choice(self.kinds)))
        texts = {"text": caption(look, rng), "attributes": _json(look)}
        pixels = draw(look, self.flags.resolution)
        pictures = {"image": encode(pixels, self.flags)}
        if (condition := make_condition(self.flags)) is not None:
            pictures["conditioning_image"] = encode_exactly(condition(pixels, rng))
        return [Sample(row.position, row.key, pictures, texts)]


@dataclass(frozen=True)
class DrawEdit(DrawAvatar):
    """Draws the triple of a row: both pictures, the instruction, and the attributes before and after it as JSON."""

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Draws it; there are no files."""
        rng = row.rng(self.seed)
        edit = random_edit(rng, self.split, str(rng.choice(self.kinds)))
        texts = {
            INSTRUCTION: edit.instruction,
            "attributes": _json(edit.before),
            "edited_attributes": _json(edit.after),
        }
        looks = {BEFORE: edit.before, AFTER: edit.after}
        pictures = {name: encode(draw(look, self.flags.resolution), self.flags) for name, look in looks.items()}
        return [Sample(row.position, row.key, pictures, texts)]


def _json(look: Look) -> str:
    return json.dumps(dict(look))
