"""Pictures of a data set to arrays: upright, RGB, resized, cropped and flipped, all pictures of a sample alike.

Also the conditions that are made from a picture itself: edges, a low resolution, a hole to paint.
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
"""Names that data tools had for conditions before they shared those of training; both still take them."""

Condition = Callable[[UInt8[np.ndarray, "h w 3"], np.random.Generator], UInt8[np.ndarray, "h w 3"]]
"""A condition made from the picture that is to be generated, and a generator for what is random about it."""

Interpolation = Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]
"""How a picture is resized; all but the last average over what shrinks."""

GREY = 128
"""What a hole is filled with."""

_LONG = 4  # so many squares are resized whole

_NOWHERE = Access()


class UnreadableImageError(ValueError):
    """One image of the data set is missing or broken: reason enough to skip it, not to stop."""


@dataclass(frozen=True)
class Placement:
    """Where the crop of a sample lies; one for all its pictures.

    Attributes:
      original: height and width before anything was done.
      resized: height and width that the whole picture is resized to.
      corner: top and left edge of the crop, in the resized picture.
      resolution: side of the crop.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    resolution: int

    @property
    def is_random(self) -> bool:
        """Whether the crop could lie elsewhere."""
        return self.resized != (self.resolution, self.resolution)

    def time_ids(self) -> Float[np.ndarray, "6"]:
        """What SDXL is told of sizes (Podell et al., 2023, section 2.2): original, corner of the crop, target."""
        return np.array((*self.original, *self.corner, self.resolution, self.resolution), np.float32)


def read_image(
    cell: Any, access: Access = _NOWHERE, max_megapixels: float | int = decoding.MAX_MEGAPIXELS
) -> Image.Image:
    """Opens what a data set holds in place of a picture: upright, RGB, what is transparent on white.

    Args:
      cell: a PIL image, the bytes of a file, a path or an address, or a dict of "bytes" and "path" as in `datasets`.
      access: what paths and addresses may be.
      max_megapixels: larger pictures are not read.

    Raises:
      UnreadableImageError: if there is no such file, it must not be opened, or it is no image.
    """
    try:
        if isinstance(cell, Image.Image):  # one in memory stays open
            return decoding.to_rgb(ImageOps.exif_transpose(cell.copy()))
        return decoding.decode(_contents(cell, access), max_megapixels=max_megapixels)
    except (decoding.RejectedError, OSError, ValueError) as error:
        raise UnreadableImageError(f"{describe_cell(cell)}: {error}") from error


def file_of(cell: Any) -> Any:
    """The bytes of a cell, or the path where there are none: bytes are bytes even where they are empty."""
    if not isinstance(cell, dict):
        return cell
    return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")


def describe_cell(cell: Any) -> str:
    """The name of a picture, for messages."""
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("bytes")
    if isinstance(cell, bytes):
        return f"an image of {len(cell)} bytes"
    return str(cell) if isinstance(cell, str | Path) else f"a {type(cell).__name__} in place of an image"


def place(
    size: tuple[int, int], resolution: int, center_crop: bool, where: tuple[float, float] = (0.0, 0.0)
) -> Placement:
    """Chooses the crop: the shorter side becomes the resolution, and a square is cut from the longer one.

    Args:
      size: height and width of the picture.
      resolution: side of the square.
      center_crop: cut it from the middle.
      where: else, vertical and horizontal position in [0, 1).
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

    The result is the crop of the resized picture. Of one that is longer than four squares only the crop is resized: its
    place is rounded by Pillow to single precision, and the order of the two passes may be another, so that it may
    differ by a few levels at sharp edges, and by one pixel with "nearest" and "box".

    Raises:
      ValueError: if it has not the shape of the picture that the placement was made for.
    """
    height, width = placement.original
    # Sizes are whole pixels: a picture of half the size may be off by one of its own.
    if abs(image.width * height - image.height * width) > max(height, width):
        raise ValueError(
            f"it is {image.width}×{image.height} and the image that belongs to it {width}×{height}: "
            "one cannot be laid over the other; give both the same aspect ratio"
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
    """The condition of this name (`ConditionName`, or a former one), made from the picture that is to be generated.

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
    """Whether a condition differs from epoch to epoch; of one that is not known here, yes."""
    return condition not in (canny, low_resolution)


def canny(pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """White edges on black (Canny, 1986), with the thresholds that ControlNets are trained with."""
    return np.repeat(edges_of(pixels, 100, 200)[:, :, None], 3, axis=2)


def low_resolution(
    pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int = 4
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture made smaller by a factor and large again, both bicubic with antialiasing."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    small = image.resize([max(1, side // factor) for side in image.size], Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def masked(pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with a gray hole to paint: a box, or strokes of a thick brush (Yu et al., 2019, algorithm 1)."""
    size = (pixels.shape[0], pixels.shape[1])
    hole = _box(size, rng) if rng.random() < 0.5 else _strokes(size, rng)
    return np.where(hole[:, :, None], np.uint8(GREY), pixels)


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
