"""One sample of a data set: its pictures cropped and flipped alike, one of its captions, and a condition.

All its random choices are functions of (seed, sample, epoch).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from codi_jax.data.columns import captions_of
from codi_jax.data.images import Condition, Interpolation, Placement, UnreadableImageError, crop, place, read_image
from codi_jax.data.shards import PROBLEM
from codi_jax.data.sources import Source, describe_row
from codi_jax.io.decoding import MAX_MEGAPIXELS

Batch = dict[str, Any]
"""Arrays with the same size along their first axis, by name; "input_ids" is a dict of them."""

Read = Callable[[Int[np.ndarray, "b"], Int[np.ndarray, "b"]], Batch]
"""Makes a batch of row numbers and their epochs, and lists in "unreadable" the rows that it replaced."""

MAX_IN_A_ROW = 20
"""The number of consecutive unreadable images that stops training."""


@dataclass(frozen=True)
class Transform:
    """The preprocessing of every sample.

    Attributes:
      resolution: side of the crop that is taken from the resized picture.
      center_crop: whether the crop is taken from the center, instead of a random place.
      random_flip: whether half of the samples are mirrored.
      proportion_empty_prompts: probability of replacing a caption by an empty one.
      interpolation: how images are resized.
      fixed_sizes: whether SDXL is conditioned as if every picture were uncropped and of the crop's size.
      max_megapixels: size limit of a picture.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float | int = 0.0
    interpolation: Interpolation = "lanczos"
    fixed_sizes: bool = False
    max_megapixels: float | int = MAX_MEGAPIXELS

    def time_ids(self, placement: Placement | None) -> Float[np.ndarray, "6"]:
        """SDXL's size conditioning of a sample; without a picture, it counts as uncropped with this resolution."""
        size = (self.resolution, self.resolution)
        whole = Placement(size, size, (0, 0), self.resolution)
        return (whole if self.fixed_sizes or placement is None else placement).time_ids()


class Choices:
    """The random choices of one sample in one epoch.

    Attributes:
      position: the crop's position, vertical and horizontal, in [0, 1).
      rng: the generator for the condition.
    """

    def __init__(self, seed: int, row: int, epoch: int) -> None:
        self.rng = np.random.default_rng((seed, row, epoch))
        top, left, self._flip, self._caption, self._empty = self.rng.random(5).tolist()
        self.position = (top, left)

    def flips(self, transform: Transform) -> bool:
        """Whether to mirror the sample."""
        return transform.random_flip and self._flip < 0.5

    def caption(self, count: int, transform: Transform) -> int | None:
        """The index of the caption to use, out of ``count``; ``None`` for an empty one."""
        return None if self._empty < transform.proportion_empty_prompts else int(self._caption * count)


def substitute(seed: int, row: int, epoch: int, attempt: int, length: int) -> int:
    """The row that replaces an unreadable one; attempts count from 1."""
    return int(np.random.default_rng((seed, row, epoch, attempt)).integers(length))


@dataclass(frozen=True)
class Reader:
    """Reads samples.

    Attributes:
      source: the source of the samples.
      transform: the preprocessing of each sample.
      condition: makes conditions from images, if no column holds them.
      seed: the seed of all random choices.
      time_ids: whether to add SDXL's sizes.
    """

    source: Source
    transform: Transform
    condition: Condition | None
    seed: int
    time_ids: bool = False

    def batch(self, rows: Int[np.ndarray, "b"], epochs: Int[np.ndarray, "b"]) -> Batch:
        """Reads some rows, see `Read`; those that cannot be read are replaced."""
        unreadable: list[tuple[str, str]] = []
        pairs = zip(rows.tolist(), epochs.tolist(), strict=True)
        samples = [self._sample_or_another(row, epoch, unreadable) for row, epoch in pairs]
        return {**stack(samples), "unreadable": unreadable}

    def sample(self, row: Mapping[str, Any], number: int, epoch: int) -> Batch:
        """Makes the arrays of one sample, and its caption under "captions" if the source has them.

        Args:
          row: a row of the source.
          number: the row's number.
          epoch: the epoch, which random choices depend on.

        Raises:
          UnreadableImageError: if one of its images is missing or damaged.
          ValueError: if the images do not fit each other.
        """
        choices = Choices(self.seed, number, epoch)
        arrays, placement = self.pictures(row, number, choices)
        if choices.flips(self.transform):
            arrays = {name: array[:, ::-1] for name, array in arrays.items()}
        sizes = {"time_ids": self.transform.time_ids(placement)} if self.time_ids else {}
        return {**arrays, **sizes, **self._caption(row, choices)}

    def pictures(
        self, row: Mapping[str, Any], number: int, choices: Choices
    ) -> tuple[dict[str, UInt8[np.ndarray, "r r 3"]], Placement | None]:
        """The pictures of a sample, cropped alike and not flipped, and the place of the crop; raises like `sample`."""
        columns = self.source.columns
        if row.get(PROBLEM) is not None:
            raise UnreadableImageError(row[PROBLEM])
        if columns.image is None:
            return {}, None
        image = self._read(row[columns.image])
        size = (image.height, image.width)
        placement = place(size, self.transform.resolution, self.transform.center_crop, choices.position)
        arrays = {"pixels": crop(image, placement, self.transform.interpolation)}
        if columns.condition is not None:
            condition = self._read(row[columns.condition])
            arrays["conditioning"] = self._crop_along(condition, placement, row, number)
        elif self.condition is not None:
            arrays["conditioning"] = self.condition(arrays["pixels"], choices.rng)
        return arrays, placement

    def _read(self, cell: Any) -> Image.Image:
        return read_image(cell, self.source.access, self.transform.max_megapixels)

    def _caption(self, row: Mapping[str, Any], choices: Choices) -> dict[str, str]:
        if self.source.columns.caption is None:
            return {}
        captions = captions_of(row[self.source.columns.caption])
        chosen = choices.caption(len(captions), self.transform)
        return {"captions": "" if chosen is None else captions[chosen]}

    def _crop_along(
        self, image: Image.Image, placement: Placement, row: Mapping[str, Any], number: int
    ) -> UInt8[np.ndarray, "r r 3"]:
        try:
            return crop(image, placement, self.transform.interpolation)
        except ValueError as error:
            name = describe_row(self.source, row, number)
            raise ValueError(f"the condition of {name} does not fit: {error}.") from None

    def _sample_or_another(self, number: int, epoch: int, unreadable: list[tuple[str, str]]) -> Batch:
        """One sample, or a random other one if it is unreadable, so that batches keep their size and number."""
        wanted, reason = number, ""
        for attempt in range(MAX_IN_A_ROW):
            if attempt:
                number = substitute(self.seed, wanted, epoch, attempt, len(self.source))
            try:
                return self.sample(self.source.row(number), number, epoch)
            except UnreadableImageError as error:
                reason = f"row {number} of {self.source.name}, {error}"
                unreadable.append((str(number), reason))
        raise ValueError(f"{MAX_IN_A_ROW} images in a row could not be read; the last was {reason}.")


def stack(samples: Sequence[Batch]) -> Batch:
    """Combines samples into a batch: arrays are stacked, captions listed."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: column if name == "captions" else np.stack(column) for name, column in columns.items()}
