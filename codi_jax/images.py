"""Pictures between files, PIL and arrays."""

import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers.utils import load_image, make_image_grid
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

Picture = Image.Image | np.ndarray
"""A PIL image, or an array [H, W, 3], uint8 or float in [0, 1]."""


def open_image(source: str | Path) -> Image.Image:
    """Opens an image file or URL, turned upright, as RGB.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no image, or cannot be downloaded.
    """
    source = str(source)
    is_url = source.startswith(("http://", "https://"))
    if not is_url and not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"There is no image {source}.")
    try:
        return load_image(source if is_url else str(Path(source).expanduser()))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{source} could not be read as an image: {error}") from error


def to_pixels(picture: Picture, size: tuple[int, int] | None = None) -> Float[np.ndarray, "h w 3"]:
    """A picture as float32 in [0, 1], resized (Lanczos) if it is not of ``size`` (height, width) already.

    Raises:
      ValueError: if an array is not an RGB picture.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"an image array must be [height, width, 3], but this one is {list(picture.shape)}.")
        if picture.dtype != np.uint8:
            picture = np.clip(picture * 255, 0, 255).round().astype(np.uint8)
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def to_mask(picture: Picture, size: tuple[int, int]) -> Float[np.ndarray, "h w 1"]:
    """A picture as a mask: 1 where it is bright and is to be painted anew, 0 elsewhere."""
    pixels = to_pixels(picture, size)
    return (pixels.mean(axis=-1, keepdims=True) >= 0.5).astype(np.float32)


def grid(images: UInt8[np.ndarray, "n h w 3"]) -> Image.Image:
    """All images side by side, in a grid about as wide as high; cells that are left over are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images.shape[2:0:-1], "white")
    cells = [Image.fromarray(image) for image in images] + [blank] * (rows * columns - len(images))
    return make_image_grid(cells, rows, columns)


def save_images(path: str | Path, images: UInt8[np.ndarray, "n h w 3"]) -> list[Path]:
    """Writes one image to ``path``; several as a grid to ``path`` and as ``<stem>_0``, ``<stem>_1``, … beside it.

    Returns:
      The files written, ``path`` first.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(images) == 1:
        return [_save(path, Image.fromarray(images[0]))]
    single: Sequence[Path] = [path.with_stem(f"{path.stem}_{i}") for i in range(len(images))]
    written = [_save(path, grid(images))]
    return written + [_save(name, Image.fromarray(image)) for name, image in zip(single, images, strict=True)]


def check_output(path: str | Path) -> None:
    """Refuses a file name that `save_images` could not write, before any work is done.

    Raises:
      ValueError: if the ending is not that of an image format, or the folder cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} has no ending that is an image format: use .png, .jpg or .webp.")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {parent} is not a folder that you may write to.")


def _save(path: Path, image: Image.Image) -> Path:
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        image.save(unfinished)
        return unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
