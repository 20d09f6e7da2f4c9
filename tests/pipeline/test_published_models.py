"""The settings of docs/published.md against stock diffusers with what the models' pages prescribe, on a small SDXL."""

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from oracle import make_torch
from pairs import PROMPTS, Pairs, assert_same_picture, latents, run_theirs

from codi_jax.pipeline.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TRAILING = {"timestep_spacing": "trailing"}

# By model: diffusers' scheduler with the changes of its file, and the call; ours: entries of the file, and the call.
SETTINGS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SDXL-Turbo": (
        diffusers.EulerAncestralDiscreteScheduler, TRAILING, {"num_inference_steps": 1},
        TRAILING, {"sampler": "euler-ancestral", "steps": 1},
    ),
    "SDXL-Lightning": (
        diffusers.EulerDiscreteScheduler, TRAILING, {"num_inference_steps": 4},
        TRAILING, {"sampler": "euler", "steps": 4},
    ),
    "Hyper-SD and PCM": (
        diffusers.DDIMScheduler, TRAILING, {"num_inference_steps": 4},
        TRAILING, {"sampler": "ddim", "steps": 4},
    ),
    "Hyper-SD, one LoRA": (
        diffusers.TCDScheduler, {}, {"num_inference_steps": 4, "eta": 1.0},
        {}, {"sampler": "tcd", "gamma": 1.0, "steps": 4},
    ),
    "Hyper-SD, 1 step": (
        diffusers.LCMScheduler, {}, {"num_inference_steps": 1, "timesteps": [800]},
        {}, {"sampler": "lcm", "timesteps": [800]},
    ),
    "DMD2": (
        diffusers.LCMScheduler, {}, {"num_inference_steps": 4, "timesteps": [999, 749, 499, 249]},
        {}, {"sampler": "lcm", "timesteps": [999, 749, 499, 249]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_equal_diffusers(pairs: Pairs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without guidance: their scale of 0 is our 1, one pass of the network."""
    scheduler, changes, their_call, entries, our_call = SETTINGS[name]
    _, theirs, ours, _ = pairs("sdxl")
    theirs.scheduler = scheduler.from_config(ours.schedule.to_config(), **changes)
    steps = their_call["num_inference_steps"]
    noise = np.random.default_rng(8).standard_normal((max(steps - 1, 1), 2, 8, 8, 4), dtype=np.float32)
    draws = itertools.cycle(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    for module in ("scheduling_lcm", "scheduling_tcd", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: next(draws))
    wanted = run_theirs("sdxl", theirs, latents(), guidance_scale=0.0, **their_call)
    model = ours.replace(schedule=ours.schedule.with_config(**entries))
    is_stochastic = our_call["sampler"] in ("lcm", "tcd", "euler-ancestral")
    given = noise[: steps - 1] if is_stochastic else None
    made = model(PROMPTS, latents=latents(), noise=given, guidance_scale=1.0, **our_call)
    assert_same_picture(made, wanted)


def test_lcm_sdxl_equals_diffusers(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository with a UNet alone, which takes guidance as an input: the rest is SDXL's, and so is its scheduler."""
    _, theirs, ours, folder = pairs("sdxl")
    unet = make_torch("unet", {**dict(theirs.unet.config), "time_cond_proj_dim": 16}, 5)
    unet.save_pretrained(tmp_path / "lcm-sdxl")
    student = diffusers.StableDiffusionXLPipeline(**{**theirs.components, "unet": unet})
    student.scheduler = diffusers.LCMScheduler.from_config(ours.schedule.to_config())
    noise = np.random.default_rng(8).standard_normal((3, 2, 8, 8, 4), dtype=np.float32)
    draws = itertools.cycle(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(draws))
    wanted = run_theirs("sdxl", student, latents(), num_inference_steps=4, guidance_scale=8.0)
    model = Model.from_pretrained(folder, unet=tmp_path / "lcm-sdxl")
    call = {"latents": latents(), "noise": noise, "sampler": "lcm", "steps": 4}
    assert_same_picture(model(PROMPTS, guidance_scale=8.0, **call), wanted)
    assert np.abs(model(PROMPTS, guidance_scale=1.0, **call).astype(int) - wanted).max() > 2  # the scale is heard


def test_guidance_rescale_equals_diffusers(pairs: Pairs) -> None:
    _, theirs, ours, _ = pairs("sdxl")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(ours.schedule.to_config())
    wanted = run_theirs("sdxl", theirs, latents(), num_inference_steps=2, guidance_scale=5.0, guidance_rescale=0.7)
    made = ours(PROMPTS, latents=latents(), sampler="ddim", steps=2, guidance_scale=5.0, guidance_rescale=0.7)
    assert_same_picture(made, wanted)
