"""Picture files: one reader for training, tools, validation and generation, and what it refuses."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from peak_memory import PEAK
from PIL import EpsImagePlugin, Image
from web import Web, bomb

from codi_jax.data.access import Access
from codi_jax.data.images import read_image
from codi_jax.data.preparation.pictures import PictureFlags, read_picture
from codi_jax.io.decoding import FORMATS, MAX_ASPECT_RATIO, RejectedError, decode
from codi_jax.io.images import open_image, to_pixels

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(12) + bytes(2 + 3 * 16)


def header(width: int, height: int) -> bytes:
    """A png that says how large it is, and ends there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_every_reader_puts_what_is_transparent_on_white(tmp_path: Path, mode: str):
    """c α + 255 (1 - α) in float64, by all of them alike; of a key color α is 0."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (24, 32, 4), np.uint8)
    image, options = Image.fromarray(rgba).convert("RGBA"), {}
    if mode in ("LA", "L", "RGB", "P"):
        image = image.convert(mode)
    if mode in ("P", "RGB", "L"):
        options = {"transparency": image.getpixel((3, 5))}
    kind = "tiff" if mode == "PA" else "png"
    (tmp_path / f"image.{kind}").write_bytes(saved(image, kind, **options))
    data = (tmp_path / f"image.{kind}").read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGBA"), np.float64)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert mode == "PA" or (alpha < 1).any()
    read = {
        "generation": np.asarray(open_image(tmp_path / f"image.{kind}")),
        "training": np.asarray(read_image(data)),
        "training, by its path": np.asarray(read_image(f"image.{kind}", Access(str(tmp_path)))),
        "the tools": read_picture(data, PictureFlags(resolution=24))[0],
        "the API": (to_pixels(Image.open(io.BytesIO(data))) * 255).round(),
    }
    for name, found in read.items():
        np.testing.assert_allclose(found, expected, atol=1, err_msg=name)
        np.testing.assert_array_equal(found, read["training"], err_msg=name)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1500, 1), "more than 50 times as long as wide"), ((1, 20_000), "more than 50 times as long as wide"),
        ((20_000, 1), "more than 50 times as long as wide"), ((20_000, 6000), "more than 100 megapixels"),
        ((100_000, 100_000), "more than 100 megapixels"), ((2**31 - 1, 1), "more than 100 megapixels"),
    ],
)  # fmt: skip
def test_a_header_is_enough_to_refuse_a_picture(tmp_path: Path, size: tuple[int, int], reason: str):
    """There are no pixels behind it that could be decoded; all readers say the same."""
    (tmp_path / "image.png").write_bytes(header(*size))
    for read in (
        lambda: decode(header(*size)),
        lambda: read_image("image.png", Access(str(tmp_path))),
        lambda: open_image(tmp_path / "image.png"),
        lambda: read_picture(header(*size), PictureFlags()),
    ):
        with pytest.raises((RejectedError, ValueError), match=reason):
            read()
    side = 60 * MAX_ASPECT_RATIO
    assert decode(saved(Image.new("L", (side, 60)))).size == (side, 60)


def test_the_largest_picture_is_a_choice():
    with pytest.raises(RejectedError, match="more than 100 megapixels"):
        decode(bomb())
    with pytest.raises(RejectedError, match=r"more than 0\.5 megapixels"):
        decode(saved(Image.new("1", (1000, 501))), max_megapixels=0.5)
    with pytest.raises(ValueError, match="--max_megapixels 200 is not possible: it must be above 0 and at most 178"):
        PictureFlags(max_megapixels=200).check()


@pytest.mark.parametrize("kind", ["eps", "psd", "ico", "jpeg2000", "tga"])
def test_other_formats_are_no_pictures(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Although Pillow knows them; and no program is started."""
    data = {"eps": EPS, "psd": PSD}.get(kind) or saved(Image.new("RGB", (16, 16)), kind)
    with Image.open(io.BytesIO(data)) as known:
        assert known.format not in FORMATS
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "image.png").write_bytes(data)
    for read in (
        lambda: decode(data),
        lambda: read_image(data),
        lambda: read_image("image.png", Access(str(tmp_path))),
        lambda: open_image(tmp_path / "image.png"),
    ):
        with pytest.raises((RejectedError, ValueError), match="identify it as JPEG"):
            read()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_usual_formats_are_read(kind: str):
    pixels = np.asarray(Image.linear_gradient("L").convert("RGB").resize((64, 48)))
    data = saved(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.abs(np.asarray(decode(data), int) - pixels).max() <= (8 if kind in ("JPEG", "AVIF", "GIF") else 0)


def test_a_stereo_photograph_is_its_first_picture():
    """Pillow calls it MPO, and phones write it with the ending of a JPEG."""
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = saved(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.asarray(decode(data))[8, 8, 0] > 250


CROP = (
    PEAK
    + """
import resource, sys
import numpy as np
from PIL import Image
from codi_jax.data.images import crop, place
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
before = peak()
crop(Image.new("RGB", (1500, 1)), place((1, 1500), 512, center_crop=False, where=(0, 0.9)))
print(peak() - before)
"""
)


def test_only_the_crop_of_a_long_picture_is_resized():
    """The whole would have 393 million pixels, 1.2 GB; sizes are of KiB."""
    done = subprocess.run([sys.executable, "-c", CROP], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 100_000


def test_an_address_is_read_by_the_downloader():
    """With its limits, and a message that says what the server said; the user named the host, so it may be this one."""
    web = Web()
    try:
        assert open_image(f"{web.url}/good/1.jpg").size == (48, 40)
        with pytest.raises(ValueError, match=r"missing/1\.jpg could not be read as an image: HTTP 404\."):
            open_image(f"{web.url}/missing/1.jpg")
        with pytest.raises(ValueError, match="larger than 20 MB"):
            open_image(f"{web.url}/endless/1.jpg")
        assert web.sent["/endless/1.jpg"] < 100e6
        web.lines.clear()
        open_image(f"{web.url}/good/2.jpg?sig=a%2Fb%7e")
        assert web.lines == ["GET /good/2.jpg?sig=a%2Fb%7e HTTP/1.1"]
    finally:
        web.close()
