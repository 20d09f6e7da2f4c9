"""Scheduler files, and the schedulers of diffusers that read them."""

from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from codi_jax.diffusion.schedule import NoiseSchedule

SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# The scheduler_config.json of published models, key by key.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd-1.4, sd-1.5": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd-2.1": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sdxl-base": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "instruct-pix2pix": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.12.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "lcm-dreamshaper": {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
}


SPACINGS = ["leading", "trailing", "linspace"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
CLASSES: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "dpm-solver++-sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}


def replay(noise: Iterable[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes diffusers' schedulers draw this noise, one array after the other; each of them from the first one."""
    modules = (
        "scheduling_lcm", "scheduling_tcd", "scheduling_euler_ancestral_discrete", "scheduling_dpmsolver_multistep"
    )  # fmt: skip
    for module in modules:
        draws = iter(noise)
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor", lambda *_, d=draws, **__: torch.tensor(next(d))
        )


def make(**changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**SD, **changes})


def diffusers_scheduler(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


def config_for(sampler: str, **changes: Any) -> dict[str, Any]:
    return {**SD, "_class_name": CLASSES[sampler], "skip_prk_steps": True, **changes}
