"""Pairs of a picture and a condition image, made from it or read along with it: the samples of a ControlNet."""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from jaxtyping import UInt8

from codi_jax.cli.flags import Topic
from codi_jax.data.images import Condition, current_condition_name, low_resolution, masked
from codi_jax.data.preparation.pictures import Picture, PictureFlags, encode, encode_exactly, read_beside, read_picture
from codi_jax.data.preparation.rows import InputRow
from codi_jax.data.preparation.samples import Sample
from codi_jax.io.images import canny as edges_of

_FROM_FILE = "depth_from_file"


@dataclass(frozen=True, kw_only=True)
class PairFlags(PictureFlags):
    """Which condition images are made."""

    topic: ClassVar[Topic] = Topic.PICTURES

    condition: str = "canny"
    """canny: thin edges; soft_edges: gradients of three scales (as HED's edges look, without its network); grayscale;
    super_resolution: a quarter of the resolution; inpainting: a gray hole to paint; depth_from_file: whatever is in
    --conditioning_image_column; none; or package.module:function, of pixels (uint8 [h, w, 3]) and a NumPy generator.
    canny, super_resolution and inpainting match --task of training."""
    canny_low: tuple[int, int] = (100, 100)
    """Smallest and largest lower threshold of canny, drawn per picture; equal values fix it."""
    canny_high: tuple[int, int] = (200, 200)
    """Smallest and largest upper threshold of canny."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition", current_condition_name(self.condition))

    def check(self) -> None:
        super().check()
        make_condition(self)
        for flag in ("canny_low", "canny_high"):
            low, high = getattr(self, flag)
            self.require(flag, 0 <= low <= high, "two numbers from 0 on, the smaller one first")
        in_order = all(low <= high for low, high in zip(self.canny_low, self.canny_high, strict=True))
        self.require("canny_low", in_order, f"at most --canny_high {' '.join(map(str, self.canny_high))}")


def make_condition(flags: PairFlags) -> Condition | None:
    """The condition that the flags name; ``None`` for "none", and for conditions that are read from files.

    Raises:
      ValueError: if the condition does not exist.
    """
    conditions: dict[str, Condition | None] = {
        "canny": functools.partial(random_canny, low=flags.canny_low, high=flags.canny_high),
        "soft_edges": soft_edges,
        "grayscale": grayscale,
        "super_resolution": low_resolution,
        "inpainting": masked,
        _FROM_FILE: None,
        "none": None,
    }
    if flags.condition in conditions:
        return conditions[flags.condition]
    module, _, name = flags.condition.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(conditions)
        raise ValueError(
            f"--condition {flags.condition} is none of {known}, nor package.module:function ({error})."
        ) from None


@dataclass(frozen=True)
class Pair:
    """Makes the sample of a row: "image" and, if there is a condition, "conditioning_image".

    Attributes:
      flags: the user's flags.
      seed: the seed of all random choices, together with the row's id.
    """

    flags: PairFlags
    seed: int

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Makes the sample from the files of the row's pictures, by column.

        Raises:
          RejectedError: if they cannot be used.
        """
        pixels, placement = read_picture(files["image"], self.flags)
        pictures = {"image": encode(pixels, self.flags)}
        condition = make_condition(self.flags)
        if condition is not None:
            pictures["conditioning_image"] = encode_exactly(condition(pixels, row.rng(self.seed)))
        elif self.flags.condition == _FROM_FILE:
            pixels = read_beside(files["conditioning_image"], placement, self.flags)
            pictures["conditioning_image"] = encode_exactly(one_channel(pixels))
        return [Sample(row.position, row.key, pictures, row.texts)]


def random_canny(
    pixels: Picture, rng: np.random.Generator, low: tuple[int, int], high: tuple[int, int]
) -> UInt8[np.ndarray, "h w"]:
    """Edges, 255 on 0 (Canny, 1986), with thresholds drawn from the two ranges, inclusive."""
    thresholds = sorted(int(rng.integers(*between, endpoint=True)) for between in (low, high))
    return edges_of(pixels, *thresholds)


def soft_edges(pixels: Picture, rng: np.random.Generator) -> UInt8[np.ndarray, "h w"]:
    """Broad edges, brighter where they are stronger: the mean over three scales of the gradient's magnitude.

    It resembles holistically nested edges (Xie and Tu, 2015), but without a network, so that textures remain visible.
    """
    luminance = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    total = np.zeros_like(luminance)
    for sigma in (1.0, 2.0, 4.0):
        smooth = cv2.GaussianBlur(luminance, (0, 0), sigma)
        total += sigma * cv2.magnitude(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    strongest = float(np.percentile(total, 99.5))
    return np.clip(total * (255 / max(strongest, 1.0)), 0, 255).astype(np.uint8)


def grayscale(pixels: Picture, rng: np.random.Generator) -> UInt8[np.ndarray, "h w"]:
    """The luminance, for coloring."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def one_channel(pixels: Picture) -> UInt8[np.ndarray, "h w *c"]:
    """The picture with a single channel if all three are equal, as in depth maps."""
    red = pixels[:, :, 0]
    return red if np.array_equal(red, pixels[:, :, 1]) and np.array_equal(red, pixels[:, :, 2]) else pixels
