"""Turns encoded pictures of unknown origin into pictures of one size, and back into files.

Optimized for throughput. If it suffices, a JPEG is decoded at a half, a quarter or an eighth of its size, which is
faster than decoding the full picture; the rest of the scaling averages over pixels.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codi_jax.cli.flags import Flags, Topic
from codi_jax.data.images import Placement, place
from codi_jax.io import decoding
from codi_jax.io.decoding import LARGEST_MEGAPIXELS, MAX_MEGAPIXELS, RejectedError
from codi_jax.io.images import encode_image

Picture = UInt8[np.ndarray, "h w 3"]

_ENDINGS = {"jpeg": "jpg", "webp": "webp"}  # and png
_ASPECT = 0.02  # relative difference of two aspect ratios that rounding of sizes can cause


@dataclass(frozen=True, kw_only=True)
class PictureFlags(Flags):
    """Which pictures are accepted, and how they are written."""

    topic: ClassVar[Topic] = Topic.PICTURES

    resolution: int = 512
    """Shorter side of the written pictures. Smaller ones are not enlarged."""
    center_crop: bool = False
    """Crop the center square, instead of leaving the crop to training."""
    min_side: int = 0
    """Reject pictures whose shorter side is smaller."""
    max_megapixels: float | int = MAX_MEGAPIXELS
    """Reject larger pictures: a small file can hold a picture that fills the memory."""
    image_format: Literal["jpeg", "png", "webp"] = "jpeg"
    """Format of the pictures. Conditions are always png, which keeps them exactly."""
    image_quality: int = 95
    """Quality of jpeg and webp, at most 100."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "resolution")
        self.require_at_least(0, "min_side")
        self.require_in(1, 100, "image_quality")
        possible = 0 < self.max_megapixels <= LARGEST_MEGAPIXELS
        self.require("max_megapixels", possible, f"above 0 and at most {LARGEST_MEGAPIXELS}")


@dataclass(frozen=True)
class Encoded:
    """The file of a picture.

    Attributes:
      data: the file's bytes.
      ending: the file's extension, without the dot.
    """

    data: bytes
    ending: str


def read_picture(data: bytes, flags: PictureFlags) -> tuple[Picture, Placement]:
    """Decodes and scales a picture.

    Args:
      data: a file in any of the usual formats.
      flags: the user's flags.

    Returns:
      The picture, upright, and its place in the picture of the file.

    Raises:
      RejectedError: if the file is not a picture, or is damaged, too large or too small.
    """
    image = decode(data, flags)
    placement = place((image.height, image.width), min(flags.resolution, *image.size), center_crop=True)
    return fit(image, placement, flags.center_crop), placement


def read_beside(data: bytes, placement: Placement, flags: PictureFlags) -> Picture:
    """Decodes and scales a picture that belongs to another one, so that both align.

    Args:
      data: the picture's file.
      placement: the other picture's placement.
      flags: the user's flags.

    Raises:
      RejectedError: as in `read_picture`, and if the aspect ratio differs.
    """
    image = decode(data, flags)
    height, width = placement.original
    if abs(image.width / image.height / (width / height) - 1) > _ASPECT:
        raise RejectedError("two pictures of different shapes")
    return fit(image, placement, flags.center_crop)


def decode(data: bytes, flags: PictureFlags) -> Image.Image:
    """The picture, upright and RGB, at least as large as needed; raises like `read_picture`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        limits = {"max_megapixels": flags.max_megapixels, "min_side": flags.min_side}
        return decoding.decode(data, **limits, enough=flags.resolution)


def fit(image: Image.Image, placement: Placement, center_crop: bool) -> Picture:
    """The picture scaled and, if requested, cropped to a placement of `codi_jax.data.images.place`."""
    height, width = placement.resized
    pixels = np.asarray(image)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    if not center_crop:
        return pixels
    (top, left), side = placement.corner, placement.resolution
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def encode(pixels: UInt8[np.ndarray, "h w *c"], flags: PictureFlags) -> Encoded:
    """The file of a picture in the format of the flags."""
    if flags.image_format == "png":
        return encode_exactly(pixels)
    quality = {"jpeg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY}[flags.image_format]
    ending = _ENDINGS[flags.image_format]
    return Encoded(encode_image(pixels, ending, [quality, flags.image_quality]), ending)


def encode_exactly(pixels: UInt8[np.ndarray, "h w *c"]) -> Encoded:
    """The file of a picture as png, grayscale if it has one channel."""
    return Encoded(encode_image(pixels), "png")
