"""Pictures in and out of files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from codi_jax.io import images
from codi_jax.io.images import (
    as_list,
    check_output,
    grid,
    labeled_rows,
    open_image,
    save_images,
    stack_pictures,
    to_mask,
    to_pixels,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def colored(count: int, height: int = 4, width: int = 6) -> np.ndarray:
    """Images that differ from each other, and from pixel to pixel."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ---- Reading


def half_and_half() -> Image.Image:
    """6 wide, 4 high: the left half red, the right half blue."""
    image = Image.new("RGB", (6, 4), RED)
    image.paste(BLUE, (3, 0, 6, 4))
    return image


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes to the top
    half_and_half().save(tmp_path / "photo.png", exif=exif)
    image = open_image(tmp_path / "photo.png")
    assert image.size == (4, 6)
    assert image.getpixel((0, 0)) == RED
    assert image.getpixel((0, 5)) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    bright = Image.new("RGB", (6, 4), WHITE)
    bright.paste((0, 0, 0), (3, 0, 6, 4))
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(bright.convert("L"), np.uint16) * 257).save(path)
    else:
        bright.convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = open_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(bright))


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    depth = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    image = np.asarray(open_image(tmp_path / "depth.png"))
    np.testing.assert_allclose(image[..., 0] / 255, depth / 65535, atol=0.5 / 255)
    with pytest.raises(ValueError, match="mode F, 32 bits"):
        to_pixels(Image.fromarray(depth.astype(np.float32)))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no image .*nothing\.png"):
        open_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png could not be read as an image"):
        open_image(tmp_path / "text.png")
    whole = io.BytesIO()
    Image.fromarray(colored(1, 64, 64)[0]).save(whole, "png")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(ValueError, match=r"half\.png could not be read as an image"):
        open_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match="could not be read as an image"):
        open_image("http://127.0.0.1:9/image.png")  # nobody listens at the discard port


# ---- Arrays


def test_pixels_are_of_the_size_and_range_that_is_asked_for() -> None:
    array = colored(1)[0]
    np.testing.assert_array_equal(to_pixels(array), array.astype(np.float32) / 255)
    np.testing.assert_array_equal(to_pixels(array / 255), array.astype(np.float32) / 255)
    pixels = to_pixels(half_and_half(), (8, 12))
    assert pixels.shape == (8, 12, 3)
    np.testing.assert_array_equal(pixels[0, 0], [1, 0, 0])
    np.testing.assert_array_equal(pixels[-1, -1], [0, 0, 1])
    for shape in [(4, 6), (4, 6, 4), (1, 4, 6, 3)]:
        with pytest.raises(ValueError, match=r"must be \[height, width, 3\]"):
            to_pixels(np.zeros(shape, np.uint8))


def test_a_mask_is_one_where_it_is_bright() -> None:
    mask = to_mask(Image.fromarray(np.array([[0, 120, 130, 255]], np.uint8)), (1, 4))
    np.testing.assert_array_equal(mask[0, :, 0], [0, 0, 1, 1])
    assert mask.shape == (1, 4, 1)


def test_one_picture_is_for_the_whole_batch() -> None:
    one, several = half_and_half(), colored(3)
    for pictures in (one, np.asarray(one), [one]):
        stacked = stack_pictures(pictures, 2, to_pixels, "image")
        np.testing.assert_array_equal(stacked, [to_pixels(one)] * 2)
    for pictures in (several, list(several), [Image.fromarray(each) for each in several]):
        np.testing.assert_array_equal(stack_pictures(pictures, 3, to_pixels, "image"), several.astype(np.float32) / 255)
    with pytest.raises(ValueError, match="control_image has 3 images for 2 prompts: give one, or one for each"):
        stack_pictures(several, 2, to_pixels, "control_image")
    with pytest.raises(ValueError, match="the list of images is empty"):
        as_list([])


# ---- Writing


@pytest.mark.parametrize(("count", "size"), [(1, (6, 4)), (2, (12, 4)), (3, (12, 8)), (5, (18, 8)), (9, (18, 12))])
def test_a_grid_is_about_as_wide_as_high(count: int, size: tuple[int, int]) -> None:
    made = colored(count)
    image = grid(made)
    assert image.size == size
    cells = np.asarray(image).reshape(size[1] // 4, 4, size[0] // 6, 6, 3).swapaxes(1, 2).reshape(-1, 4, 6, 3)
    np.testing.assert_array_equal(cells[:count], made)
    np.testing.assert_array_equal(cells[count:], 255)


def test_one_image_is_one_file(tmp_path: Path) -> None:
    made = colored(1)
    path = tmp_path / "new" / "folder" / "image.png"
    assert save_images(path, made) == [path]
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), made[0])


def test_several_images_are_a_grid_and_single_files(tmp_path: Path) -> None:
    made = colored(3)
    files = save_images(tmp_path / "image.v2.png", made)
    assert [file.name for file in files] == ["image.v2.png", "image.v2_0.png", "image.v2_1.png", "image.v2_2.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert Image.open(files[0]).size == (12, 8)
    for file, image in zip(files[1:], made, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)


def test_a_failing_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"old")
    save = Image.Image.save
    room = [2]

    def save_two(self: Image.Image, file: Path) -> None:
        save(self, file)
        room[0] -= 1
        if not room[0]:
            raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save_two)
    with pytest.raises(OSError, match="No space left"):
        save_images(path, colored(3))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_impossible_output_is_refused_before_the_work(tmp_path: Path) -> None:
    for name in ("image.png", "IMAGE.JPG", "new/folder/image.webp"):
        check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for name in ("image", "image.txt", "image.psd", "image.safetensors"):
        with pytest.raises(ValueError, match=r"needs the extension of an image file: use one of \.png"):
            check_output(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png cannot be written: it is a folder"):
        check_output(tmp_path / "folder.png")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder that you may write to"):
        check_output(tmp_path / "file" / "image.png")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ValueError, match="is not a folder that you may write to"):
        check_output(tmp_path / "image.png")


def test_the_picture_has_a_row_for_each_batch_behind_its_name() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (3, 20, 20, 3), np.uint8) for _ in range(2))
    laid_out = labeled_rows({"first": first, "none": None, "second": list(second)})
    assert laid_out.dtype == np.uint8
    np.testing.assert_array_equal(laid_out[:20, -60:], np.concatenate(list(first), axis=1))
    np.testing.assert_array_equal(laid_out[20:, -60:], np.concatenate(list(second), axis=1))
    names = laid_out[:, :-60]
    assert all((names[start : start + 20] < 128).any() for start in (0, 20))
    assert (names == 255).mean() > 0.5


def test_rows_lower_than_their_names_do_not_overlap() -> None:
    rows = {name: np.full((2, 4, 4, 3), value, np.uint8) for name, value in {"a": 10, "b": 20}.items()}
    laid_out = labeled_rows(rows)
    assert laid_out.shape[0] == 28
    assert [int((laid_out == value).all(-1)[:, -8:].sum()) for value in (10, 20)] == [32, 32]


def test_texts_stand_above_their_columns() -> None:
    pictures = np.full((3, 40, 40, 3), 200, np.uint8)
    plain = labeled_rows({"a": pictures})
    captioned = labeled_rows({"a": pictures}, ["short", "", "a text that is much longer than its column is wide " * 9])
    top = captioned.shape[0] - plain.shape[0]
    assert top in (14 * 7, 14 * 8)  # where nothing of the last line fits before the dots, there is none
    np.testing.assert_array_equal(captioned[top:], plain)
    columns = captioned[:top, -120:].reshape(top, 3, 40, 3)
    ink = (columns < 128).any((2, 3))
    assert ink[:, 0].any()
    assert not ink[:-14, 0].any()  # above its picture, not at the top
    assert not ink[:, 1].any()
    assert ink[:, 2].sum() > 50


def test_captions_are_as_small_as_their_longest_word_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And words that fit in no size are broken."""
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda *given, **named: drawn.append((given[2], named)))
    pictures = np.full((2, 64, 64, 3), 200, np.uint8)
    for caption, lines, size in (
        ("make the sky blue", ["make the", "sky blue"], 11),
        ("make the background blue", ["make the", "background", "blue"], 10),
        ("make ilililililil", ["make", "ilililililil"], 11),  # many letters, and narrow
        ("n" * 30, ["n" * 9] * 3 + ["nnn"], 11),
    ):
        drawn.clear()
        labeled_rows({"a": pictures}, [caption, "short"])
        text, options = drawn[0]
        assert text.split("\n") == lines
        assert options["font"].size == size
