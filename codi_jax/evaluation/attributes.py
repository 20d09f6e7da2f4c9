"""Attribute accuracy: does a picture show the attributes that were asked for?

A small network, trained on renderings of `codi_jax.data.avatars`, reads them off the picture.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from codi_jax.data.avatars.vocabulary import KINDS, Look
from codi_jax.evaluation.features import in_batches
from codi_jax.io.weights import load_model
from codi_jax.models.attribute_reader import AttributeReader
from codi_jax.models.config import Params, WeightsError
from codi_jax.pipeline.conditions import to_signed

READER = Path(__file__).resolve().parents[2] / "assets" / "avatar-reader"
"""The folder of the trained reader."""


@dataclass(frozen=True)
class Question:
    """One choice among the reader's outputs.

    Attributes:
      kind: the kind of avatar that it is about; ``None``: any.
      attribute: the attribute's name.
      values: the possible answers.
      start: the number of the first answer's output.
    """

    kind: str | None
    attribute: str
    values: tuple[str, ...]
    start: int

    @property
    def outputs(self) -> slice:
        """The outputs that are compared."""
        return slice(self.start, self.start + len(self.values))


@functools.cache
def questions() -> tuple[Question, ...]:
    """All questions: the kind, then each attribute of each kind."""
    asked: list[Question] = []
    listed = [(None, "kind", tuple(KINDS))]
    listed += [(name, attribute, tuple(each.values)) for name, kind in KINDS.items()
               for attribute, each in kind.attributes.items()]  # fmt: skip
    start = 0
    for kind, attribute, values in listed:
        asked.append(Question(kind, attribute, values, start))
        start += len(values)
    return tuple(asked)


def labels() -> str:
    """The reader's outputs by name, such as ``monster/eyes/three``, separated by commas."""
    return ",".join(
        f"{each.kind or 'avatar'}/{each.attribute}/{value}" for each in questions() for value in each.values
    )


class Reader:
    """Reads attributes off pictures.

    Args:
      folder: the trained network's folder.
      batch_size: pictures at a time.

    Raises:
      WeightsError: if the network cannot be loaded, or was trained on other attributes.
    """

    def __init__(self, folder: Path = READER, batch_size: int = 64) -> None:
        network, params = load_model(folder)
        if not isinstance(network, AttributeReader) or network.config.labels != labels():
            raise WeightsError(f"{folder} was trained on other attributes: train it again with assets/recipes.")
        self._logits = in_batches(lambda batch: _logits(network, params, batch), batch_size)

    def read(self, pictures: UInt8[np.ndarray, "n h w 3"]) -> list[dict[str, str]]:
        """All attributes of the kind that each picture shows most likely."""
        kind, *_ = questions()
        answers = []
        for row in self._logits(pictures):
            look = {"kind": kind.values[int(row[kind.outputs].argmax())]}
            for each in questions():
                if each.kind == look["kind"]:
                    look[each.attribute] = each.values[int(row[each.outputs].argmax())]
            answers.append(look)
        return answers


@functools.partial(jax.jit, static_argnames="network")
def _logits(network: AttributeReader, params: Params, pictures: UInt8[Array, "b h w 3"]) -> Any:
    size = network.config.sample_size
    pixels = jax.image.resize(to_signed(pictures), (len(pictures), size, size, 3), "linear")
    return network.apply({"params": params}, pixels)


def shown_shares(shown: Sequence[Mapping[str, str]], asked: Sequence[Look]) -> Float[np.ndarray, " n"]:
    """For each picture, the share of the attributes asked for that it shows; none if it shows another kind.

    Args:
      shown: what each picture shows, from `Reader.read`.
      asked: what it should show.
    """
    return np.array([np.mean([*shows(*pair).values()]) for pair in zip(shown, asked, strict=True)])


def shows(seen: Mapping[str, str], look: Look) -> dict[str, bool]:
    """For each attribute of a look whether a picture shows it, which no picture of another kind does."""
    return {name: look["kind"] == seen["kind"] and seen.get(name) == value for name, value in look.items()}
