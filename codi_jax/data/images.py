"""Turns a data set's pictures into arrays: upright, RGB, resized and cropped, all pictures of a sample alike.

Also the conditions that are made from a picture: its edges, its low resolution, a hole to inpaint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from codi_jax.data.access import Access
from codi_jax.io import decoding
from codi_jax.io.images import canny as edges_of

ConditionName = Literal["canny", "super_resolution", "inpainting"]
"""The conditions that training can make from a picture. Data tools make these and others."""

FORMER_CONDITION_NAMES = {"low_resolution": "super_resolution", "mask": "inpainting"}
"""Former names of conditions in the data tools; training and the tools still accept them."""

Condition = Callable[[UInt8[np.ndarray, "h w 3"], np.random.Generator], UInt8[np.ndarray, "h w 3"]]
"""Makes a condition from the target picture and a generator for its random choices."""

Interpolation = Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]
"""How a picture is resized; all except the last antialias when shrinking."""

GRAY = 128
"""The value that fills a hole."""

_LONG = 4  # pictures up to this aspect ratio are resized completely

_NOWHERE = Access()


class UnreadableImageError(ValueError):
    """One image of the data set is missing or damaged; it is skipped and does not stop training."""


@dataclass(frozen=True)
class Placement:
    """The place of a sample's crop, which all its pictures share.

    Attributes:
      original: height and width of the picture in its file.
      resized: height and width that the entire picture is resized to.
      corner: top and left edge of the crop, in the resized picture.
      resolution: side of the crop.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    resolution: int

    @property
    def is_random(self) -> bool:
        """Whether another crop was possible."""
        return self.resized != (self.resolution, self.resolution)

    def time_ids(self) -> Float[np.ndarray, "6"]:
        """SDXL's size conditioning (Podell et al., 2023, section 2.2): original size, crop corner, target size."""
        return np.array((*self.original, *self.corner, self.resolution, self.resolution), np.float32)


def read_image(
    cell: Any, access: Access = _NOWHERE, max_megapixels: float | int = decoding.MAX_MEGAPIXELS
) -> Image.Image:
    """Opens the picture of a data set's cell: upright, RGB, with transparent pixels on white.

    Args:
      cell: a PIL image, the bytes of a file, a path or an address, or a dict of "bytes" and "path" as in `datasets`.
      access: which paths and addresses are allowed.
      max_megapixels: larger pictures are not read.

    Raises:
      UnreadableImageError: if the file does not exist, must not be opened, or is not an image.
    """
    try:
        if isinstance(cell, Image.Image):  # one in memory stays open
            return decoding.to_rgb(ImageOps.exif_transpose(cell.copy()))
        return decoding.decode(_contents(cell, access), max_megapixels=max_megapixels)
    except (decoding.RejectedError, OSError, ValueError) as error:
        raise UnreadableImageError(f"{describe_cell(cell)}: {error}") from error


def file_of(cell: Any) -> Any:
    """The bytes of a cell, even if they are empty, or its path if it has no bytes."""
    if not isinstance(cell, dict):
        return cell
    return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")


def describe_cell(cell: Any) -> str:
    """A name for the picture of a cell, for messages."""
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("bytes")
    if isinstance(cell, bytes):
        return f"an image of {len(cell)} bytes"
    return str(cell) if isinstance(cell, str | Path) else f"a {type(cell).__name__} instead of an image"


def place(
    size: tuple[int, int], resolution: int, center_crop: bool, where: tuple[float, float] = (0.0, 0.0)
) -> Placement:
    """Chooses the crop: the shorter side is resized to the resolution, and the longer one cropped to a square.

    Args:
      size: height and width of the picture.
      resolution: side of the square.
      center_crop: whether to crop the center.
      where: vertical and horizontal position of another crop, in [0, 1).
    """
    shorter = min(size)
    height, width = (resolution if side == shorter else round(side * resolution / shorter) for side in size)
    slack = (height - resolution, width - resolution)
    if center_crop:
        top, left = (round(s / 2) for s in slack)
    else:
        top, left = (int(position * (s + 1)) for position, s in zip(where, slack, strict=True))
    return Placement(size, (height, width), (top, left), resolution)


def crop(
    image: Image.Image, placement: Placement, interpolation: Interpolation = "lanczos"
) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes and crops one picture of a sample.

    The result is the crop of the resized picture. If the picture is more than four times as long as wide, only the crop
    is resized. Pillow rounds its place to single precision and may swap the two passes, so that this may differ by a
    few levels at sharp edges, and by one pixel with "nearest" and "box".

    Raises:
      ValueError: if its aspect ratio differs from the picture's that the placement was made for.
    """
    height, width = placement.original
    # Sizes are integers: a picture of half the size may be off by one of its own pixels.
    if abs(image.width * height - image.height * width) > max(height, width):
        raise ValueError(
            f"it is {image.width}×{image.height} and the image that belongs to it {width}×{height}: "
            "they do not align; give both the same aspect ratio"
        )
    height, width = placement.resized
    top, left = placement.corner
    side = placement.resolution
    if image.size == (width, height):
        return np.asarray(image)[top : top + side, left : left + side]
    filtering = Image.Resampling[interpolation.upper()]
    if max(height, width) > _LONG * side:
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min((left + side) * x, image.width), min((top + side) * y, image.height))
        return np.asarray(image.resize((side, side), filtering, box))
    return np.asarray(image.resize((width, height), filtering))[top : top + side, left : left + side]


def current_condition_name(name: str) -> str:
    """The name of a condition, if it is given by a former one; any other text unchanged."""
    return FORMER_CONDITION_NAMES.get(name, name)


def condition_for(name: str) -> Condition:
    """The condition with this name (`ConditionName`, or a former one), made from the target picture.

    Raises:
      ValueError: if there is no such condition.
    """
    conditions: dict[str, Condition] = {
        "canny": canny,
        "super_resolution": low_resolution,
        "inpainting": masked,
    }
    current = current_condition_name(name)
    if current not in conditions:
        raise ValueError(f"no condition is called {name!r}: use one of {', '.join(get_args(ConditionName))}.")
    return conditions[current]


def is_random(condition: Condition) -> bool:
    """Whether a condition differs between epochs, which is assumed for functions not defined here."""
    return condition not in (canny, low_resolution)


def canny(pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """White edges on black (Canny, 1986), with the thresholds that ControlNets are trained with."""
    return np.repeat(edges_of(pixels, 100, 200)[:, :, None], 3, axis=2)


def low_resolution(
    pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int = 4
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture scaled down by a factor and up again, both bicubic with antialiasing."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    small = image.resize([max(1, side // factor) for side in image.size], Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def masked(pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with a gray hole to inpaint: a box, or strokes of a thick brush (Yu et al., 2019, algorithm 1)."""
    size = (pixels.shape[0], pixels.shape[1])
    hole = _box(size, rng) if rng.random() < 0.5 else _strokes(size, rng)
    return np.where(hole[:, :, None], np.uint8(GRAY), pixels)


def _box(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A box with sides between a quarter and three quarters of the picture's."""
    hole = np.zeros(size, bool)
    sides = [max(1, int(side * rng.uniform(0.25, 0.75))) for side in size]
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(size, sides, strict=True))
    hole[top : top + sides[0], left : left + sides[1]] = True
    return hole


def _strokes(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One to four brush strokes, each of some straight lines that turn."""
    hole = np.zeros(size, np.uint8)
    side = min(size)
    for _ in range(rng.integers(1, 5)):
        corners = [rng.random(2) * size[::-1]]
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(2, 7)):
            angle += np.pi + rng.uniform(-0.6, 0.6) * np.pi
            step = rng.uniform(0.1, 0.4) * side * np.array((np.cos(angle), np.sin(angle)))
            corners.append(np.clip(corners[-1] + step, 0, np.array(size[::-1]) - 1))
        points = np.array(corners).round().astype(np.int32)
        cv2.polylines(hole, [points], False, 1, thickness=max(1, int(side * rng.uniform(0.06, 0.16))))
    return hole.astype(bool)


def _contents(cell: Any, access: Access) -> bytes:
    cell = file_of(cell)
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str | Path) and str(cell):
        return access.read(str(cell))
    raise ValueError("there is no image")
