"""Pictures between files, PIL and arrays."""

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from codi_jax.cli.outputs import obstacle
from codi_jax.io.atomic import staged_files
from codi_jax.io.decoding import RejectedError, decode, to_rgb

Picture = Image.Image | np.ndarray
"""A PIL image, or an array [H, W, 3], uint8 or float in [0, 1]."""

FAST_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)
"""OpenCV's options for PNG files that are written quickly, and are a little larger."""
_LABEL_WIDTH, _LABEL_HEIGHT = 96, 14  # pixels
_LETTER_WIDTH = 7  # pixels of the mean letter in the first of the sizes, and a little more
_CAPTION_SIZES = (11, 10, 9, 8)
_CAPTION_LINES = 8
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def open_image(source: str | Path) -> Image.Image:
    """Opens an image file or URL as in training: upright, RGB, with transparent pixels on white.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not an image, is too large (see `codi_jax.io.decoding.decode`), or cannot be downloaded.
    """
    source = str(source)
    is_url = source.lower().startswith(("http://", "https://"))
    if not is_url and not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"There is no image {source}.")
    try:
        return decode(_download(source) if is_url else Path(source).expanduser())
    except RejectedError as error:
        raise ValueError(f"{source} could not be read as an image: {error}.") from error


def _download(address: str) -> bytes:
    """The file at an address given by the user, on any host."""
    from codi_jax.io.download import DownloadFlags, fetch  # slow to import, and not needed for files

    return fetch(address, DownloadFlags(allow_private_addresses=True, retries=0))


def to_pixels(picture: Picture, size: tuple[int, int] | None = None) -> Float[np.ndarray, "h w 3"]:
    """A picture as float32 in [0, 1], resized (Lanczos) to ``size`` (height, width) if necessary.

    Raises:
      ValueError: if an array is not an RGB picture.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"an image array must be [height, width, 3], but this one is {list(picture.shape)}.")
        if picture.dtype != np.uint8:
            picture = np.clip(picture * 255, 0, 255).round().astype(np.uint8)
        picture = Image.fromarray(picture)
    picture = to_rgb(picture)
    if size is not None and (picture.height, picture.width) != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def to_mask(picture: Picture, size: tuple[int, int]) -> Float[np.ndarray, "h w 1"]:
    """A picture as a mask: 1 where it is bright, to be repainted, 0 elsewhere."""
    pixels = to_pixels(picture, size)
    return (pixels.mean(axis=-1, keepdims=True) >= 0.5).astype(np.float32)


def encode_image(pixels: UInt8[np.ndarray, "h w *c"], ending: str = "png", options: Sequence[int] = FAST_PNG) -> bytes:
    """The file of an RGB or gray picture in memory.

    Args:
      pixels: the picture.
      ending: the extension of its format.
      options: OpenCV's options of the format.
    """
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    _, data = cv2.imencode(f".{ending}", pixels, options)
    return data.tobytes()


def canny(picture: Picture, low: int = 30, high: int = 90) -> UInt8[np.ndarray, "h w"]:
    """The edges of a picture (Canny, 1986): 255 on lines one pixel wide, 0 elsewhere.

    Args:
      picture: a picture of any size, at which edges are detected.
      low: gradient (3 x 3 Sobel, the sum of both directions' magnitudes) that continues an edge; the default is for
        small drawings, 100 is usual for photographs.
      high: gradient that begins an edge; 200 is usual for photographs.
    """
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8):
        picture = (to_pixels(picture) * 255).round().astype(np.uint8)
    return cv2.Canny(picture, low, high)


def as_list(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture, several, or an array [n, H, W, 3] of them, as a list.

    Raises:
      ValueError: if the list is empty, or the argument is a file name.
    """
    if isinstance(pictures, str | Path):
        raise ValueError(f"{pictures} is a file name: open the image first, with codi_jax.io.images.open_image.")
    if isinstance(pictures, np.ndarray):
        each: list[Picture] = list(pictures) if pictures.ndim == 4 else [pictures]
    else:
        each = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not each:
        raise ValueError("the list of images is empty.")
    return each


def stack_pictures(
    pictures: Picture | Sequence[Picture], batch: int, convert: Callable[[Picture], np.ndarray], name: str
) -> Float[np.ndarray, "b h w c"]:
    """One picture for the entire batch, or one per element, as one array.

    Args:
      pictures: see `as_list`.
      batch: the size of the batch.
      convert: `to_pixels` or `to_mask`, to one size.
      name: the argument's name, for error messages.

    Raises:
      ValueError: if the number of pictures is neither 1 nor ``batch``.
    """
    each = as_list(pictures)
    each = each * batch if len(each) == 1 else each
    if len(each) != batch:
        raise ValueError(f"{name} has {len(each)} images for {batch} prompts: give one, or one for each prompt.")
    return np.stack([convert(picture) for picture in each])


def grid(images: UInt8[np.ndarray, "n h w 3"]) -> Image.Image:
    """All images in an approximately square grid, whose unused cells are white."""
    from diffusers.utils.pil_utils import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images.shape[2:0:-1], "white")
    cells = [Image.fromarray(image) for image in images] + [blank] * (rows * columns - len(images))
    return make_image_grid(cells, rows, columns)


def save_images(path: str | Path, images: UInt8[np.ndarray, "n h w 3"]) -> list[Path]:
    """Writes one image to ``path``; several as a grid to ``path`` and as ``<stem>_0``, ``<stem>_1``, … next to it.

    After an error none of them is left, and files that existed before are unchanged.

    Returns:
      The files written, ``path`` first.
    """
    path = Path(path).expanduser()
    single = [Image.fromarray(image) for image in images]
    names = _single_names(path, len(images))
    pictures = {path: grid(images), **dict(zip(names, single, strict=True))} if names else {path: single[0]}
    with staged_files(list(pictures)) as stages:
        for stage, picture in zip(stages, pictures.values(), strict=True):
            picture.save(stage)
    return list(pictures)


def _single_names(path: Path, count: int) -> list[Path]:
    """The paths of several images, next to their grid; a single image has only one path."""
    return [path.with_stem(f"{path.stem}_{i}") for i in range(count)] if count > 1 else []


def check_output(path: str | Path, count: int = 1) -> None:
    """Rejects a path that `save_images` could not write, before any work is done.

    Args:
      path: the file's path.
      count: the number of images.

    Raises:
      ValueError: if the extension is not an image format's, or the folder cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{path} needs the extension of an image file: use one of {', '.join(_ENDINGS)}.")
    if folder := next((name for name in (path, *_single_names(path, count)) if name.is_dir()), None):
        raise ValueError(f"{folder} cannot be written: it is a folder.")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {parent} is not a folder that you may write to.")
    if reason := obstacle(path.parent):
        raise ValueError(f"{path} cannot be written ({reason}): name another file.")


def labeled_rows(
    rows: Mapping[str, Sequence[np.ndarray] | np.ndarray | None], captions: Sequence[str] = ()
) -> UInt8[np.ndarray, "height width 3"]:
    """Batches of images as one picture: one row each, preceded by its name; ``None`` gives no row.

    Args:
      rows: the batches, by name, which may have several lines; each has as many images of one width as the others.
      captions: the texts above the columns. Default: none.
    """
    shown = {name: np.concatenate(list(images), axis=1) for name, images in rows.items() if images is not None}
    font = ImageFont.load_default(_CAPTION_SIZES[0])
    left = max(_LABEL_WIDTH, *(math.ceil(font.getlength(line)) + 8 for name in shown for line in name.split("\n")))
    width = max(row.shape[1] for row in shown.values())
    column = width // max(1, len(captions))
    of_captions, longest = _font_for(captions, column)
    letters = max(1, longest, int(column / _LETTER_WIDTH * font.size / of_captions.size))
    texts = [textwrap.wrap(caption, letters, max_lines=_CAPTION_LINES, placeholder="…") for caption in captions]
    top = max((_LABEL_HEIGHT * len(lines) for lines in texts), default=0)
    height = top + sum(max(row.shape[0], _LABEL_HEIGHT) for row in shown.values())
    canvas = Image.new("RGB", (left + width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(texts):
        at = (left + i * width // len(texts) + 2, top - 2)
        draw.multiline_text(at, "\n".join(lines), fill="black", font=of_captions, spacing=2, anchor="ld")
    for name, row in shown.items():
        draw.text((4, top + row.shape[0] // 2), name, fill="black", anchor="lm", font=font)
        canvas.paste(Image.fromarray(row), (left, top))
        top += max(row.shape[0], _LABEL_HEIGHT)
    return np.asarray(canvas)


def _font_for(texts: Sequence[str], width: int) -> tuple[Any, int]:
    """The largest font with which no word is too wide, and the longest word's letters; 0 if there is no such font."""
    words = [word for text in texts for word in text.split()]
    for size in _CAPTION_SIZES:
        font = ImageFont.load_default(size)
        if all(font.getlength(word) <= width - 4 for word in words):
            return font, max(map(len, words), default=0)
    return ImageFont.load_default(_CAPTION_SIZES[0]), 0
