"""Whole pipelines against those of diffusers: the same folder, the same noise, the same picture."""

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import FAMILIES, SIZE, make_pipeline
from PIL import Image

from codi_jax.pipeline import DiffusionPipeline

PROMPTS = ["a red cat", "two dogs"]
Pair = tuple[str, Any, DiffusionPipeline]  # family, theirs, ours


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    """A diffusers pipeline, and ours, loaded from the folder that it saved."""
    return load_pair(request.param, tmp_path_factory.mktemp(request.param))


def load_pair(family: str, scratch: Path) -> Pair:
    theirs = make_pipeline(family, scratch)
    theirs.save_pretrained(scratch / "model")
    return family, theirs, DiffusionPipeline.from_pretrained(scratch / "model")


def picture(seed: int) -> Image.Image:
    """A smooth picture: what a VAE sees of noise depends on the last bit."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def images_for(family: str) -> dict[str, Any]:
    """The image arguments of a family, with our names."""
    if "controlnet" in family:
        return {"control_image": [picture(0), picture(1)]}
    if "pix2pix" in family:
        return {"image": [picture(0), picture(1)]}
    if family == "inpainting":
        mask = np.zeros((SIZE, SIZE, 3), np.uint8)
        mask[8:20, 12:] = 255
        return {"image": [picture(0), picture(1)], "mask_image": [Image.fromarray(mask)] * 2}
    return {}


def run_theirs(family: str, pipeline: Any, latents: np.ndarray, **options: Any) -> np.ndarray:
    given = images_for(family)
    if "control_image" in given:
        given["image"] = given.pop("control_image")
    if family == "inpainting":
        given.update(height=SIZE, width=SIZE)
    # A generator only for what is not injected: the inpainting pipeline samples the latents of the masked image.
    out = pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents).permute(0, 3, 1, 2),
        output_type="np",
        **given,
        **options,
    )
    return (out.images * 255).round().astype(np.uint8)


def latents() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, 8, 8, 4), dtype=np.float32)


def inject(monkeypatch: pytest.MonkeyPatch, noise: np.ndarray) -> None:
    """Makes diffusers' LCM scheduler draw our noise."""
    draws = itertools.cycle(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(draws))


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 10, "a flat picture proves nothing"
    difference = np.abs(ours.astype(int) - theirs.astype(int)).max()
    assert difference <= 2, f"largest difference {difference} of 255"


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, "ddim"),
    "dpm-solver++": (diffusers.DPMSolverMultistepScheduler, "dpm-solver++"),
    "lcm": (diffusers.LCMScheduler, "lcm"),
}


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_equal_diffusers(pair: Pair, sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    family, theirs, ours = pair
    if family in ("lcm", "inpainting", "sdxl-controlnet") and (sampler, steps) != ("lcm", 4):
        pytest.skip("the other families cover these")
    scheduler_class, name = SCHEDULERS[sampler]
    theirs.scheduler = scheduler_class.from_config(ours.schedule.to_config())
    noise = np.random.default_rng(8).standard_normal((steps - 1, 2, 8, 8, 4), dtype=np.float32)
    inject(monkeypatch, noise)
    scales = {"guidance_scale": 3.0}
    if "pix2pix" in family:
        scales["image_guidance_scale"] = 1.5
    if family == "inpainting":  # ours takes the mode; theirs samples
        distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
        monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mean)
    wanted = run_theirs(family, theirs, latents(), num_inference_steps=steps, **scales)
    made = ours(PROMPTS, **images_for(family), sampler=name, steps=steps, latents=latents(), noise=noise, **scales)
    assert_same_picture(made, wanted)
