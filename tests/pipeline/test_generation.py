"""Pictures against those of diffusers: the same folder, the same noise, the same picture."""

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import FAMILIES
from pairs import PROMPTS, Pairs, assert_same_picture, images_for, latents, run_both, run_ours, run_theirs
from PIL import Image

from codi_jax.pipeline.model import Model


def inject(monkeypatch: pytest.MonkeyPatch, noise: np.ndarray) -> None:
    """Makes diffusers' LCM scheduler draw our noise."""
    draws = itertools.cycle(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(draws))


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, "ddim"),
    "dpm-solver++": (diffusers.DPMSolverMultistepScheduler, "dpm-solver++"),
    "lcm": (diffusers.LCMScheduler, "lcm"),
}


# Every program has to be compiled: here is what no test below covers, and the others are slow.
QUICK = {
    ("text-to-image", "dpm-solver++", 20),
    ("text-to-image", "lcm", 4),
    ("instruct-pix2pix", "ddim", 4),
    ("inpainting", "lcm", 4),
    ("lcm", "lcm", 4),
    ("sdxl-controlnet", "lcm", 4),
    ("sdxl-instruct-pix2pix", "ddim", 4),
}


CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(FAMILIES, SCHEDULERS, (4, 20))
    if case[0] != "lcm" or case[1] == "lcm"  # diffusers' pipeline for LCM takes no other scheduler
]


@pytest.mark.parametrize(("family", "sampler", "steps"), CASES)
def test_pictures_equal_diffusers(
    pairs: Pairs, family: str, sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs, ours, _ = pairs(family)
    scheduler_class, name = SCHEDULERS[sampler]
    theirs.scheduler = scheduler_class.from_config(ours.schedule.to_config())
    noise = np.random.default_rng(8).standard_normal((steps - 1, 2, 8, 8, 4), dtype=np.float32)
    inject(monkeypatch, noise)
    scales = {"guidance_scale": 3.0}
    if "pix2pix" in family:
        scales["image_guidance_scale"] = 1.5
    wanted = run_theirs(family, theirs, latents(), num_inference_steps=steps, **scales)
    made = ours(PROMPTS, **images_for(family), sampler=name, steps=steps, latents=latents(), noise=noise, **scales)
    assert_same_picture(made, wanted)


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow)


@pytest.mark.parametrize("negative", ["a blue dog", ""])
def test_negative_prompts_equal_diffusers(pairs: Pairs, negative: str) -> None:
    pair = pairs("text-to-image")
    made, wanted = run_both(pair, {"negative_prompt": negative}, negative_prompt=[negative] * 2)
    assert_same_picture(made, wanted)
    assert np.array_equal(made, run_ours(pair.ours)) == (not negative), "the empty text is the null text"


@pytest.mark.parametrize("negative", ["a blue dog", ""])
def test_negative_prompts_and_sizes_of_sdxl_equal_diffusers(pairs: Pairs, negative: str) -> None:
    """SDXL's null text is zeros, which the empty text is not. Its networks are told the size."""
    options = {"latents": latents(10, 6), "height": 40, "width": 24}
    assert_same_picture(
        *run_both(pairs("sdxl"), {"negative_prompt": negative}, negative_prompt=[negative] * 2, **options)
    )


def test_a_control_image_is_resized_as_diffusers_does(pairs: Pairs) -> None:
    rng = np.random.default_rng(0)
    control = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in PROMPTS]
    options = {"latents": latents(10, 6), "height": 40, "width": 24}
    assert_same_picture(
        *run_both(pairs("controlnet"), {"control_image": control, "image": None}, image=control, **options)
    )


@pytest.mark.parametrize("scale", [1, 0.5, 0, -1])
@pytest.mark.parametrize(
    "family", ["text-to-image", "controlnet", *map(slow, ("inpainting", "sdxl", "sdxl-controlnet"))]
)
def test_without_guidance_equals_diffusers(pairs: Pairs, family: str, scale: float) -> None:
    """A scale of 0 is "no guidance" to users of few-step models, and not the unconditional picture."""
    assert_same_picture(*run_both(pairs(family), guidance_scale=scale))


@pytest.mark.parametrize(
    "scales", [(0, 1.5), (1, 1.5), (0.5, 1), (3, 0.5), (3, 0), (0, 0)], ids=lambda scales: "-".join(map(str, scales))
)
@pytest.mark.parametrize("family", ["instruct-pix2pix", slow("sdxl-instruct-pix2pix")])
def test_editors_without_guidance_equal_diffusers(pairs: Pairs, family: str, scales: tuple[float, float]) -> None:
    """Where either scale is too low there is none at all, of the image neither."""
    text, image = scales
    assert_same_picture(*run_both(pairs(family), guidance_scale=text, image_guidance_scale=image))


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3])
def test_a_guidance_embedding_is_that_of_the_scale_minus_one(pairs: Pairs, scale: float) -> None:
    """At low scales, too: nothing else says how much guidance there is."""
    pair = pairs("lcm")
    pair.theirs.scheduler = diffusers.LCMScheduler.from_config(pair.ours.schedule.to_config())
    options = {"num_inference_steps": 1, "guidance_scale": scale}
    wanted = run_theirs(pair.family, pair.theirs, latents(), **options)
    assert_same_picture(run_ours(pair.ours, steps=1, guidance_scale=scale), wanted)
    assert np.any(run_ours(pair.ours, steps=1, guidance_scale=scale + 1) != wanted)


def test_image_guidance_one_needs_two_passes_and_equals_diffusers(pairs: Pairs) -> None:
    """diffusers always makes three."""
    assert_same_picture(*run_both(pairs("instruct-pix2pix"), image_guidance_scale=1))


@pytest.mark.slow
def test_inpainting_with_a_controlnet_equals_diffusers(pairs: Pairs) -> None:
    inpainting, controlnet = pairs("inpainting"), pairs("controlnet")
    parts = {**inpainting.theirs.components, "controlnet": controlnet.theirs.controlnet}
    theirs = diffusers.StableDiffusionControlNetInpaintPipeline(**parts, requires_safety_checker=False)
    scales = {"guidance_scale": 3.0, "controlnet_conditioning_scale": 0.7}
    options = {"control_image": images_for("controlnet")["control_image"], **scales}
    wanted = run_theirs("inpainting", theirs, latents(), num_inference_steps=2, **options)
    ours = Model.from_pretrained(inpainting.folder, controlnet.folder)
    assert_same_picture(run_ours(ours, **images_for("inpainting"), **options), wanted)


def test_timesteps_of_ones_own_equal_diffusers(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    pair.theirs.scheduler = diffusers.LCMScheduler.from_config(pair.ours.schedule.to_config())
    wanted = run_theirs(pair.family, pair.theirs, latents(), timesteps=[399], guidance_scale=3.0)
    assert_same_picture(run_ours(pair.ours, steps=None, timesteps=[399], sampler="lcm"), wanted)
