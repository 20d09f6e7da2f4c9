"""Pictures of a data set to arrays: upright, RGB, resized, cropped and flipped, all pictures of a sample alike.

Also the conditions that are made from a picture itself: edges, a low resolution, a hole to paint.
"""

import io
import posixpath
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from codi_jax.data.files import is_url
from codi_jax.images import canny as edges_of
from codi_jax.images import to_eight_bits

Task = Literal["canny", "super_resolution", "inpainting"]
"""The conditions that can be made from a picture."""

Condition = Callable[[UInt8[np.ndarray, "h w 3"], np.random.Generator], UInt8[np.ndarray, "h w 3"]]
"""A condition made from the picture that is to be generated, and a generator for what is random about it."""

Interpolation = Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]
"""How a picture is resized; all but the last average over what shrinks."""

GREY = 128
"""What a hole is filled with."""

DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no pictures, or broken."""


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


def read_image(cell: Any, folder: str | Path | None = None) -> Image.Image:
    """Opens what a data set holds in place of a picture: upright, RGB, what is transparent on white.

    Args:
      cell: a PIL image, the bytes of a file, a path, or a dict of "bytes" and "path" as in `datasets`.
      folder: what paths are relative to: a path, or a URL.

    Raises:
      UnreadableImageError: if there is no such file, or it is no image.
    """
    try:
        with _open(cell, folder) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{describe_cell(cell)}: {error}") from error


def describe_cell(cell: Any) -> str:
    """The name of a picture, for messages."""
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("bytes")
    if isinstance(cell, bytes):
        return f"an image of {len(cell)} bytes"
    return str(cell) if isinstance(cell, str | Path) else f"a {type(cell).__name__} in place of an image"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any kind of picture as 8-bit RGB; what is transparent lies on white.

    Raises:
      ValueError: if its pixels have 32 bits.
    """
    image = to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return np.asarray(image)[top : top + placement.resolution, left : left + placement.resolution]


def condition_for(task: Task) -> Condition:
    """The condition of a task, made from the picture that is to be generated.

    Raises:
      ValueError: if there is no such task.
    """
    conditions: dict[str, Condition] = {
        "canny": canny,
        "super_resolution": low_resolution,
        "inpainting": masked,
    }
    if task not in conditions:
        raise ValueError(f"no condition is made for {task!r}: use one of {', '.join(get_args(Task))}.")
    return conditions[task]


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
    """The picture with a grey hole to paint: a box, or strokes of a thick brush (Yu et al., 2019, algorithm 1)."""
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


def _open(cell: Any, folder: str | Path | None) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell.copy()  # one in memory stays open
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return Image.open(io.BytesIO(cell))
    if isinstance(cell, str | Path) and str(cell):
        path = posixpath.join(str(folder or ""), str(cell))
        return _open_remote(path) if is_url(path) else Image.open(path)
    raise ValueError("there is no image")


def _open_remote(path: str) -> Image.Image:
    """A file on an object store, or inside an archive or on the hub, which `datasets` names by a chained URL."""
    import datasets

    return datasets.Image().decode_example({"path": path, "bytes": None})
