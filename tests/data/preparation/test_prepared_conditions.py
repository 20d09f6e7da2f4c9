"""Pictures and conditions against Pillow, OpenCV and NumPy called directly."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
import tyro
from PIL import Image, ImageOps
from web import bomb, jpeg

from codi_jax.data.preparation.conditions import Pair, PairFlags
from codi_jax.data.preparation.pictures import PictureFlags, read_picture
from codi_jax.data.preparation.rows import InputRow, clean_text
from codi_jax.io.decoding import RejectedError
from dataset_tools import cache_latents, coyo_1m_dataset_preprocess, laion_subset, make_edit_dataset


def photograph(size: tuple[int, int] = (512, 384), quality: int = 95, **options) -> bytes:
    """A smooth picture with detail, as a JPEG."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    data = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(data, "jpeg", quality=quality, **options)
    return data.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def make(data: bytes, seed: int = 0, sample: str = "a", files: dict | None = None, **flags):
    """The picture and the condition of a sample."""
    row = InputRow(7, sample, {}, {"text": "x"})
    pair = Pair(PairFlags(**{"resolution": 96, "image_format": "png"} | flags), seed)
    (made,) = pair(row, {"image": data, **(files or {})})
    image = np.asarray(opened(made.pictures["image"].data))
    condition = made.pictures.get("conditioning_image")
    return image, None if condition is None else np.asarray(opened(condition.data))


def test_scaling_is_that_of_the_whole_picture():
    """Decoded at a part of its size, and averaged: as Pillow's box over all pixels, but for rounded sizes."""
    for size, expected in (((512, 384), (128, 96)), ((384, 512), (96, 128)), ((500, 333), (144, 96))):
        image, _ = make(photograph(size))
        assert image.shape == (expected[1], expected[0], 3)
        reference = np.asarray(opened(photograph(size)).resize(expected, Image.Resampling.BOX), int)
        assert np.abs(image - reference).mean() < 2


def test_small_pictures_are_not_enlarged_and_crops_are_of_the_middle():
    image, _ = make(photograph((60, 40)))
    assert image.shape == (40, 60, 3)
    assert np.array_equal(image, np.asarray(opened(photograph((60, 40)))))
    image, _ = make(photograph((60, 40)), center_crop=True)
    assert np.array_equal(image, np.asarray(opened(photograph((60, 40))))[:, 10:50])


def test_pictures_are_upright_and_rgb():
    """By EXIF; of CMYK, gray, palette and 16 bits; what is transparent lies on white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = make(photograph((64, 48), exif=exif))
    assert np.array_equal(image, np.asarray(ImageOps.exif_transpose(opened(photograph((64, 48), exif=exif)))))
    assert image.shape == (64, 48, 3)
    for mode in ("CMYK", "L", "P"):
        data = io.BytesIO()
        opened(photograph((64, 48))).convert(mode).save(data, "png" if mode == "P" else "jpeg")
        image, _ = make(data.getvalue())
        assert np.array_equal(image, np.asarray(opened(data.getvalue()).convert("RGB")))
    data = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(data, "png")
    assert (make(data.getvalue())[0] == 255).all()


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_formats_of_pictures(image_format: str):
    row, flags = InputRow(0, "a", {}), PairFlags(resolution=96, image_format=image_format)
    (made,) = Pair(flags, 0)(row, {"image": photograph()})
    image = opened(made.pictures["image"].data)
    assert image.format == image_format.upper()
    exact, _ = make(photograph())
    assert np.abs(np.asarray(image, int) - exact).mean() < 3, "red and blue are not swapped"
    assert made.pictures["conditioning_image"].ending == "png"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"), (b"<html>", "no picture"), (photograph()[:2000], "a broken picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture"),
        (bomb(), "more than 100 megapixels"), (bomb(40_000), "more than 100 megapixels"),
        (jpeg(0, (30, 90)), "smaller than 32 pixels"),
    ],
    ids=["empty", "html", "cut off", "postscript", "bomb", "larger bomb", "small"],
)  # fmt: skip
def test_what_is_no_picture(data: bytes, reason: str):
    with pytest.raises(RejectedError, match=reason):
        read_picture(data, PictureFlags(min_side=32))


def test_edges():
    """Those of OpenCV, of the picture that is written; thresholds are drawn from seed and id, and fixed by default."""
    image, edges = make(photograph())
    assert np.array_equal(edges, cv2.Canny(image, 100, 200))
    drawn = {}
    for seed, sample in ((0, "a"), (0, "b"), (1, "a")):
        _, edges = make(photograph(), seed, sample, canny_low=(10, 60), canny_high=(60, 250))
        assert np.array_equal(edges, make(photograph(), seed, sample, canny_low=(10, 60), canny_high=(60, 250))[1])
        possible = [cv2.Canny(image, low, high) for low in range(10, 61) for high in (60, 250)]
        assert edges.sum() <= max(each.sum() for each in possible)
        drawn[seed, sample] = edges.tobytes()
    assert len(set(drawn.values())) == 3


def test_conditions_that_need_no_model():
    image, gray = make(photograph(), condition="grayscale")
    assert np.array_equal(gray, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    _, low = make(photograph(), condition="super_resolution")
    assert np.array_equal(low, make(photograph(), condition="low_resolution")[1])  # the former name
    reference = Image.fromarray(image).resize((32, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(low, np.asarray(reference.resize((128, 96), Image.Resampling.BICUBIC)))
    _, masked = make(photograph(), condition="inpainting")
    assert np.array_equal(masked, make(photograph(), condition="mask")[1])  # the former name
    hole = (masked == 128).all(axis=2)
    assert 0.01 < hole.mean() < 0.8
    assert np.array_equal(masked[~hole], image[~hole])
    step = np.zeros((96, 96, 3), np.uint8)
    step[:, 48:] = 200
    data = io.BytesIO()
    Image.fromarray(step).save(data, "png")
    _, soft = make(data.getvalue(), condition="soft_edges")
    assert soft[:, 46:50].min() > 150
    assert soft[:, :20].max() == soft[:, 76:].max() == 0
    assert soft[50, 44] < soft[50, 46]
    assert make(photograph(), condition="none")[1] is None


def test_depth_of_a_file():
    """Scaled and cropped like the picture, with one channel; of another shape it is rejected."""
    depth = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None], 192, axis=0)
    data = io.BytesIO()
    Image.fromarray(depth).save(data, "png")
    flags = {"condition": "depth_from_file", "center_crop": True}
    image, found = make(photograph(), files={"conditioning_image": data.getvalue()}, **flags)
    assert image.shape == (96, 96, 3)
    assert found.shape == (96, 96)
    reference = Image.fromarray(depth).resize((128, 96), Image.Resampling.BOX)
    assert np.abs(found.astype(int) - np.asarray(reference, int)[:, 16:112]).max() <= 1
    with pytest.raises(RejectedError, match="two pictures of different shapes"):
        make(photograph((512, 300)), files={"conditioning_image": data.getvalue()}, **flags)


def inverted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 255 - pixels


def test_a_function_of_ones_own():
    image, condition = make(photograph(), condition=f"{__name__}:inverted")
    assert np.array_equal(condition, 255 - image)
    with pytest.raises(ValueError, match=r"--condition cany is none of canny, .*, none, nor package.module:function"):
        PairFlags(condition="cany").check()
    with pytest.raises(ValueError, match=r"--canny_low .* is not possible: it must be two numbers from 0 on"):
        PairFlags(canny_low=(5, 1)).check()


def test_captions():
    assert clean_text(" two\r\nlines\tand\0more ") == "two lines and more"
    assert clean_text(b"a\xffb") == "a\ufffdb"
    assert clean_text("\ud800") == "?"
    assert clean_text(None) == ""


@pytest.mark.parametrize("tool", [coyo_1m_dataset_preprocess, make_edit_dataset, laion_subset, cache_latents])
def test_every_flag_of_the_tools_has_help(tool, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        tyro.cli(tool.Args, args=["--help"], use_underscores=True, config=(tyro.conf.DisallowNone,))
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(tool.Args):
        assert f"--{field.name}" in shown or f"--no_{field.name}" in shown, field.name
