"""Pictures to arrays, against Pillow."""

import io

import cv2
import numpy as np
import pytest
from picture_folders import numbered
from PIL import Image

from codi_jax.data.access import Access
from codi_jax.data.images import (
    GRAY,
    UnreadableImageError,
    canny,
    condition_for,
    crop,
    is_random,
    low_resolution,
    masked,
    place,
    read_image,
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(-1) if channels == 1 else array)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (33, 33), (64, 64), (101, 17)])
def test_a_centre_crop_is_that_of_pillow(size: tuple[int, int]):
    image = noise(*size)
    width, height = size
    scale = 32 / min(size)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    got = crop(image, place((height, width), 32, center_crop=True))
    # Of an odd number of pixels that are left over, one more may be on either side.
    other = np.asarray(resized.crop((left + (width > height), top + (height > width), left + 33, top + 33)))[:32, :32]
    assert np.array_equal(got, expected) or np.array_equal(got, other)


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear", "hamming"])
@pytest.mark.parametrize("size", [(500, 20), (30, 301), (129, 32), (700, 64)])
def test_a_crop_of_a_long_picture_is_that_of_the_whole(size: tuple[int, int], interpolation: str):
    """Within three levels without sharp edges: the place is rounded to single precision, each pass to a level."""
    width, height = size
    image = noise(max(2, width // 16), max(2, height // 16)).resize(size, Image.Resampling.BICUBIC)
    for where in (0.0, 0.37, 0.999):
        placement = place((height, width), 32, center_crop=False, where=(where, where))
        top, left = placement.corner
        whole = image.resize(placement.resized[::-1], Image.Resampling[interpolation.upper()])
        expected = np.asarray(whole, int)[top : top + 32, left : left + 32]
        np.testing.assert_allclose(crop(image, placement, interpolation), expected, atol=3)


def test_a_random_crop_reaches_both_ends():
    first = place((32, 64), 32, center_crop=False, where=(0.0, 0.0))
    last = place((32, 64), 32, center_crop=False, where=(0.999, 0.999))
    assert first.corner == (0, 0)
    assert last.corner == (0, 32)


def test_the_sizes_that_sdxl_is_told():
    placement = place((60, 90), 32, center_crop=False, where=(0.5, 0.999))
    assert placement.time_ids().tolist() == [60, 90, 0, 16, 32, 32]
    assert placement.time_ids().dtype == np.float32


@pytest.mark.parametrize("size", [(45, 30), (180, 120), (89, 60), (91, 60), (90, 60)])
def test_a_picture_of_another_size_is_laid_over(size: tuple[int, int]):
    placement = place((60, 90), 32, center_crop=False, where=(0.5, 0.7))
    over = crop(numbered(7, size), placement).astype(int)
    below = crop(numbered(7, (90, 60)), placement).astype(int)
    assert over.shape == (32, 32, 3)
    assert np.abs(over - below).max() < 12  # the gradients are of 256 levels over 30 or more pixels


@pytest.mark.parametrize("size", [(60, 60), (60, 90), (90, 56)])
def test_another_aspect_ratio_is_refused(size: tuple[int, int]):
    with pytest.raises(ValueError, match=rf"{size[0]}×{size[1]} and the image that belongs to it 90×60"):
        crop(noise(*size), place((60, 90), 32, center_crop=True))


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(read_image(encoded(image))).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    assert np.asarray(read_image(encoded(image, transparency=1))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert np.asarray(read_image(encoded(image))).tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_a_grey_picture_gets_three_channels():
    image = noise(5, 4, "L")
    assert np.array_equal(np.asarray(read_image(encoded(image))), np.asarray(image)[..., None].repeat(3, -1))


def test_sixteen_bits_become_eight():
    image = Image.fromarray(np.array([[0, 257 * 3, 65535]], np.uint16))
    assert np.asarray(read_image(encoded(image)))[0, :, 0].tolist() == [0, 3, 255]


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = noise(4, 2)
    assert np.array_equal(np.asarray(read_image(encoded(image, exif=exif))), np.rot90(np.asarray(image), -1))


def test_every_form_of_a_cell_is_read(tmp_path):
    image = noise(3, 3)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    cells = [image, content, "a.png", str(tmp_path / "a.png"), {"bytes": content, "path": None}]
    cells += [{"bytes": None, "path": "a.png"}, {"bytes": content, "path": "gone.png"}]
    for cell in cells:
        assert np.array_equal(np.asarray(read_image(cell, Access(str(tmp_path)))), np.asarray(image))
    assert image.getpixel((0, 0))  # one given as an object is not closed


def test_an_unreadable_image_says_which_and_why(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    noise(4, 4).save(tmp_path / "good.png")
    noise(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for cell, reason in (
        ("gone.png", "gone.png"),
        ("text.png", "identify"),
        ("cut.png", "truncated"),
        (b"", "0 bytes: an empty file"),
        ({"bytes": b"", "path": "good.png"}, "an empty file"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(cell, Access(str(tmp_path)))
    for cell in (None, 3, {"bytes": None, "path": None}, "", Image.new("F", (2, 2))):
        with pytest.raises(UnreadableImageError):
            read_image(cell, Access(str(tmp_path)))


def test_edges_are_those_of_opencv():
    pixels = np.asarray(noise(32, 32).resize((64, 64)))
    edges = canny(pixels, np.random.default_rng(0))
    assert np.array_equal(edges, cv2.cvtColor(cv2.Canny(pixels, 100, 200), cv2.COLOR_GRAY2RGB))
    assert set(np.unique(edges)) == {0, 255}


def test_a_low_resolution_has_no_detail_and_keeps_the_rest():
    rng = np.random.default_rng(0)
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert np.ptp(low_resolution(board, rng).astype(int)) <= 4  # a checkerboard becomes gray
    smooth = np.asarray(numbered(9, (64, 64)))
    assert np.abs(low_resolution(smooth, rng).astype(int) - smooth).max() < 12


def test_holes_vary_and_leave_the_rest_alone():
    pixels = np.asarray(noise(64, 64))
    shares = []
    for seed in range(200):
        condition = masked(pixels, np.random.default_rng(seed))
        hole = (condition == GRAY).all(-1)
        assert np.array_equal(condition[~hole], pixels[~hole])
        shares.append(hole.mean())
    assert min(shares) > 0.003
    assert max(shares) < 0.9
    assert 0.1 < np.mean(shares) < 0.5
    assert len(set(shares)) > 150


def test_tasks_by_name():
    assert condition_for("canny") is canny
    assert not is_random(canny)
    assert not is_random(condition_for("super_resolution"))
    assert is_random(condition_for("inpainting"))
    assert is_random(lambda pixels, rng: pixels)
