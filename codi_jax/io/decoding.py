"""Decodes image files: the reader that training, the data tools, validation and generation share.

Every file goes through `decode`, so that all of them agree on formats, largest size, orientation, and the background of
transparent pixels. A file is rejected by its header, before any pixel is decoded.
"""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""The accepted formats. Pillow knows more, but starts programs to read some of them, such as Ghostscript for EPS."""

MAX_MEGAPIXELS = 100.0
"""The default limit of a picture's size: a small file can hold a picture that fills the memory."""

LARGEST_MEGAPIXELS = 178
"""Pillow's own limit of a picture's size."""

MAX_ASPECT_RATIO = 50
"""The largest accepted ratio of a picture's longer side to its shorter one."""

# What Pillow raises for files that are not pictures, or damaged. The warning is an error if the user makes it one.
_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class RejectedError(Exception):
    """A picture or a sample that cannot be used: it is counted, and does not stop the work.

    Attributes:
      reason: a phrase that all pictures rejected for this reason share.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def decode(
    file: bytes | Path, *, max_megapixels: float | int = MAX_MEGAPIXELS, min_side: int = 0, enough: int | None = None
) -> Image.Image:
    """Opens a picture file: upright, 8-bit RGB, with transparent pixels on white.

    Args:
      file: its contents, or its path.
      max_megapixels: larger pictures are rejected.
      min_side: pictures whose shorter side is smaller are rejected.
      enough: pixels that suffice on the shorter side. A JPEG is then decoded at a half, a quarter or an eighth of its
        size, which is faster.

    Raises:
      RejectedError: if the file is not a picture, or is damaged, too large, too small or too elongated.
    """
    if isinstance(file, bytes) and not file:
        raise RejectedError("an empty file")
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except UnidentifiedImageError:
        raise RejectedError("no picture", f"Pillow cannot identify it as {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_megapixels) from None
    except _ERRORS as error:
        raise RejectedError("no picture", str(error)) from error
    with image:
        _check_size(image.size, max_megapixels, min_side)
        try:
            if enough is not None:
                image.draft(None, _at_least(image.size, enough))
            return to_rgb(ImageOps.exif_transpose(image))
        except _ERRORS as error:
            raise RejectedError("a broken picture", str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any kind of picture as 8-bit RGB, with transparent pixels on white.

    Raises:
      ValueError: if its pixels have 32 bits.
    """
    image = to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits converted to 8 bits; any other picture unchanged.

    Raises:
      ValueError: if its pixels have 32 bits.
    """
    if image.mode.startswith("I;16"):  # Pillow would turn all above 255 white
        return Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, 32 bits: convert it to 8 or 16 bits")
    return image


def _check_size(size: tuple[int, int], max_megapixels: float | int, min_side: int) -> None:
    if size[0] * size[1] > max_megapixels * 1e6:
        raise _too_many_pixels(max_megapixels)
    if min(size) < max(min_side, 1):
        raise RejectedError(f"smaller than {min_side} pixels")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise RejectedError(f"more than {MAX_ASPECT_RATIO} times as long as wide")


def _at_least(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """The size (width, height) whose shorter side is this."""
    scale = shorter / min(size)
    return (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))


def _too_many_pixels(most: float | int) -> RejectedError:
    return RejectedError(f"more than {most:g} megapixels")
