"""Pictures made from another one, or painted into it, against those of diffusers' pipelines."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pairs import PROMPTS, Pairs, assert_same_picture, images_for, latents, picture

STARTS = [picture(2), picture(3)]
SCALES = {"guidance_scale": 3.0}
OPTIONS = {"controlnet": {"controlnet_conditioning_scale": 0.7}}
STARTING = {
    "text-to-image": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "controlnet": diffusers.StableDiffusionControlNetImg2ImgPipeline,
}
PAINTING = {
    "text-to-image": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
}


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _as_we_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws an image's latents from their distribution, and noise where none can be given."""
    noise = torch.from_numpy(latents()).permute(0, 3, 1, 2)
    for cls in {*STARTING.values(), *PAINTING.values()}:
        monkeypatch.setattr(f"{cls.__module__}.retrieve_latents", lambda out, *_, **__: out.latent_dist.mode())
        monkeypatch.setattr(f"{cls.__module__}.randn_tensor", lambda *_, **__: noise.clone())


def theirs(pair: Any, pipeline_class: Any, **options: Any) -> np.ndarray:
    parts = pair.theirs.components
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipeline = pipeline_class(**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(prompt=PROMPTS, output_type="np", **{**SCALES, **options}).images
    return (made * 255).round().astype(np.uint8)


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.25])
@pytest.mark.parametrize(
    "family", ["text-to-image", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sdxl", "controlnet"))]
)
def test_from_an_image(pairs: Pairs, family: str, strength: float) -> None:
    pair = pairs(family)
    options = OPTIONS.get(family, {})
    control = images_for(family)
    wanted = theirs(
        pair, STARTING[family], image=STARTS, strength=strength, num_inference_steps=4, **options, **control
    )
    made = pair.ours(PROMPTS, STARTS, steps=4, strength=strength, latents=latents(), **SCALES, **options, **control)
    assert_same_picture(made, wanted)


def test_the_default_strength_is_that_of_diffusers(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    wanted = theirs(pair, STARTING["text-to-image"], image=STARTS, num_inference_steps=4)
    assert_same_picture(pair.ours(PROMPTS, STARTS, steps=4, latents=latents(), **SCALES), wanted)


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("family", ["text-to-image", slow("sdxl")])
def test_into_an_image(pairs: Pairs, family: str, strength: float | None) -> None:
    """With a model that was not trained for it: what the mask leaves out stays."""
    pair, mask = pairs(family), images_for("inpainting")["mask_image"]
    options = {"strength": 1.0 if strength is None else strength}
    wanted = theirs(
        pair, PAINTING[family], image=STARTS, mask_image=mask, height=32, width=32, num_inference_steps=4, **options
    )
    made = pair.ours(PROMPTS, STARTS, mask_image=mask, steps=4, strength=strength, latents=latents(), **SCALES)
    assert_same_picture(made, wanted)


def test_an_inpainting_model_starts_from_the_image(pairs: Pairs) -> None:
    pair, given = pairs("inpainting"), images_for("inpainting")
    wanted = theirs(
        pair,
        diffusers.StableDiffusionInpaintPipeline,
        strength=0.5,
        height=32,
        width=32,
        num_inference_steps=4,
        **given,
    )
    made = pair.ours(PROMPTS, **given, steps=4, strength=0.5, latents=latents(), **SCALES)
    assert_same_picture(made, wanted)
    assert np.any(made != pair.ours(PROMPTS, **given, steps=4, latents=latents(), **SCALES))


def test_one_program_serves_all_strengths(pairs: Pairs) -> None:
    model = pairs("text-to-image").ours
    for strength in (0.5, 0.75, 1.0):
        model(PROMPTS, STARTS, steps=4, strength=strength, latents=latents(), **SCALES)
    assert model.compile_seconds < 0.1


def test_few_step_students_start_from_an_image(pairs: Pairs) -> None:
    """Half of four steps of an LCM are those from the middle of its grid."""
    model = pairs("lcm").ours
    assert model.check(STARTS, steps=4, strength=0.5).tolist() == model.times(4)[2:].tolist()
