"""How students say that they are to be sampled: the file that is saved, as diffusers reads it."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
from schedulers import PUBLISHED, make

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for
from codi_jax.methods import codi, lcm
from codi_jax.methods.codi import CodiFlags
from codi_jax.methods.generator import GeneratorFlags, generator_schedule
from codi_jax.methods.lcm import LcmFlags

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def test_a_student_carries_its_grid(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    teacher = NoiseSchedule.from_config(PUBLISHED["sd-1.4, sd-1.5"])
    spec = SamplingSpec.codi(20, "leading", timestep_scaling=5.0)
    loaded = saved_and_read(teacher.sampled(spec), tmp_path)
    assert loaded.sampling == spec
    assert (loaded.sampling.grid_steps, loaded.sampling.grid, loaded.sampling.timestep_scaling) == (20, "leading", 5.0)
    assert not teacher.sampling.is_of_student
    np.testing.assert_array_equal(loaded.alphas_cumprod, teacher.alphas_cumprod)
    of_the_noise = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    assert {loaded.to_config()[key] == PUBLISHED["sd-1.4, sd-1.5"][key] for key in of_the_noise} == {True}
    assert "skip_prk_steps" not in loaded.to_config()  # an option of the former class

    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "distill_learning_steps" in caplog.text  # it warns that it ignores the key, and keeps it
    theirs.save_pretrained(tmp_path / "again")
    again = NoiseSchedule.from_pretrained(tmp_path / "again")
    assert again.sampling == spec


def test_a_generator_carries_its_times(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    teacher = NoiseSchedule.from_config(PUBLISHED["sd-1.4, sd-1.5"])
    generator = teacher.sampled(SamplingSpec.generator([399]))
    assert (generator.sampling.timesteps, teacher.sampling.timesteps) == ((399,), None)
    assert saved_and_read(generator, tmp_path).sampling.timesteps == (399,)
    np.testing.assert_array_equal(generator.alphas_cumprod, teacher.alphas_cumprod)

    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs = diffusers.LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.text  # no warning of a key that it does not know
    # diffusers multiplies a thousand numbers in float32.
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), teacher.alphas_cumprod, rtol=2e-5)


# ---- Distilled again


class Way(NamedTuple):
    """How a method's model is sampled in four steps, or in as many as it has."""

    schedule: Callable[[NoiseSchedule], NoiseSchedule]
    sampler: str
    times: list[int]
    timestep_scaling: float = 10.0
    grid: tuple[int, str] | None = None
    generator_timesteps: tuple[int, ...] | None = None


CODI = CodiFlags(distill_learning_steps=20, distill_grid="leading", distill_timestep_scaling=3.0)
LCM = LcmFlags(num_ddim_timesteps=25, timestep_scaling_factor=7.0)
WAYS = {
    "codi": Way(lambda s: codi.sampling(s, CODI), "codi", [950, 700, 450, 200], 3.0, (20, "leading")),
    "lcm": Way(lambda s: lcm.sampling(s, LCM), "lcm", [999, 759, 519, 279], 7.0),
    "generator": Way(lambda s: generator_schedule(s, GeneratorFlags()), "lcm", [399], generator_timesteps=(399,)),
    "denoising, bk-sdm": Way(lambda s: s.with_many_steps(), "ddim", [999, 749, 499, 249]),
    "adaptation": Way(lambda s: s.sampled(SamplingSpec.lcm()), "lcm", [999, 759, 499, 259]),
}
STARTS = {
    "sd-1.5": PUBLISHED["sd-1.4, sd-1.5"],
    "sdxl": PUBLISHED["sdxl-base"] | {"use_karras_sigmas": True},
    "v, zero signal": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


def saved_and_read(schedule: NoiseSchedule, folder: Path) -> NoiseSchedule:
    schedule.save_pretrained(folder)
    return NoiseSchedule.from_pretrained(folder)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(WAYS, WAYS)))
def test_a_method_replaces_how_the_model_before_was_sampled(first: str, second: str, start: str, tmp_path: Path):
    """Whole: neither grid, scaling nor times of the student that it started from are left in the file."""
    teacher, way = NoiseSchedule.from_config(STARTS[start]), WAYS[second]
    before = saved_and_read(WAYS[first].schedule(teacher), tmp_path)
    schedule = saved_and_read(way.schedule(before), tmp_path)
    if second == "denoising, bk-sdm" and first == second:
        assert schedule.to_config() == STARTS[start]  # no student at all: as published
        return
    assert default_sampler(schedule) == way.sampler
    assert timesteps_for(default_sampler(schedule), schedule, len(way.times)).tolist() == way.times
    assert schedule.sampling.timestep_scaling == way.timestep_scaling
    grid = (schedule.sampling.grid_steps, schedule.sampling.grid) if schedule.sampling.sampler == "codi" else None
    assert grid == way.grid
    assert schedule.sampling.timesteps == way.generator_timesteps
    np.testing.assert_array_equal(schedule.alphas_cumprod, teacher.alphas_cumprod)
    assert schedule.prediction_type == teacher.prediction_type
    keys = set(schedule.to_config())
    assert not keys & {"use_karras_sigmas", "skip_prk_steps", "interpolation_type"}
    assert ("distill_learning_steps" in keys) == (second == "codi")
    assert ("_generator_timesteps" in keys) == (second == "generator")

    theirs = getattr(diffusers, schedule.sampling.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.prediction_type == teacher.prediction_type
    np.testing.assert_allclose(np.sqrt(theirs.alphas_cumprod), np.sqrt(teacher.alphas_cumprod), atol=2e-6)
    if second != "codi":
        theirs.set_timesteps(**({"timesteps": [399]} if second == "generator" else {"num_inference_steps": 4}))
        np.testing.assert_array_equal(theirs.timesteps, way.times)
    if way.sampler == "lcm":
        assert theirs.config.timestep_scaling == way.timestep_scaling


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"grid of 1001 steps is impossible"):
        make().sampled(SamplingSpec.lcm(1001))
