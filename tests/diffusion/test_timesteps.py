"""The times of the samplers against diffusers' ``set_timesteps``."""

from typing import Any, get_args

import diffusers
import numpy as np
import pytest
from schedulers import CLASSES, PUBLISHED, SPACINGS, config_for, make

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_generator_is_sampled_at_its_own_times(steps: int):
    schedule = NoiseSchedule.from_config(PUBLISHED["lcm-dreamshaper"])
    schedule = schedule.sampled(SamplingSpec.generator([999, 749, 499, 249]))
    assert timesteps_for("lcm", schedule, steps).tolist() == [999, 749, 499, 249][:steps]
    one = schedule.sampled(SamplingSpec.generator([399]))
    assert timesteps_for("lcm", one, 1).tolist() == [399]
    with pytest.raises(ValueError, match="choose 1 to 1 "):
        timesteps_for("lcm", one, 2)


# ---- Times


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-ancestral", "pndm", "dpm-solver++"])
def test_times_are_those_of_diffusers_for_any_number_of_steps(sampler: SamplerName, spacing: str, offset: int):
    config = config_for(sampler, timestep_spacing=spacing, steps_offset=offset)
    schedule = NoiseSchedule.from_config(config)
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    for steps in [*range(1, 40), 50, 61, 97, 100, 103, 333, 334, 485, 499, 500, 501, 769, 998, 999, 1000]:
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()
        extra = int(sampler == "pndm" and steps > 1)
        theirs = theirs[: steps + extra] if spacing == "trailing" and sampler != "pndm" else theirs
        distinct = len(set(theirs.tolist())) == len(theirs) - extra
        if theirs.max() > 999 or not distinct:
            with pytest.raises(ValueError, match=rf"steps = {steps}"):
                timesteps_for(sampler, schedule, steps)
        elif theirs.min() >= 0:
            np.testing.assert_array_equal(timesteps_for(sampler, schedule, steps), theirs, err_msg=str(steps))


def test_trailing_spacing_never_gives_a_time_too_many():
    """NumPy's arange does, for 62 of the 1000 numbers of steps, and diffusers then takes a step at t = -1."""
    schedule = make(timestep_spacing="trailing")
    for steps in range(1, 1001):
        times = timesteps_for("ddim", schedule, steps)
        assert len(times) == steps
        assert times[0] == 999
        assert times[-1] >= 0
        assert np.all(np.diff(times) < 0)


@pytest.mark.parametrize("steps", range(1, 51))
def test_lcm_times_are_those_of_diffusers(steps: int):
    for size in (50, 30, 45):
        if steps <= size:
            scheduler = diffusers.LCMScheduler(original_inference_steps=size)
            scheduler.set_timesteps(steps)
            schedule = make(_class_name="LCMScheduler", original_inference_steps=size)
            np.testing.assert_array_equal(timesteps_for("lcm", schedule, steps), scheduler.timesteps)


# ---- Which sampler


@pytest.mark.parametrize(
    ("model", "sampler"),
    [
        ("sd-1.4, sd-1.5", "pndm"),
        ("sd-2.1", "ddim"),
        ("sdxl-base", "euler"),
        ("instruct-pix2pix", "euler-ancestral"),
        ("lcm-dreamshaper", "lcm"),
    ],
)
def test_default_samplers_of_published_models(model: str, sampler: SamplerName):
    schedule = NoiseSchedule.from_config(PUBLISHED[model])
    assert default_sampler(schedule) == sampler
    assert len(timesteps_for(sampler, schedule, 4)) == (5 if sampler == "pndm" else 4)


def test_other_default_samplers():
    assert default_sampler(make(_class_name="DPMSolverMultistepScheduler")) == "dpm-solver++"
    # diffusers keeps the entries of the class that a scheduler was switched from.
    assert default_sampler(make(_class_name="EulerDiscreteScheduler", algorithm_type="sde-dpmsolver++")) == "euler"
    assert default_sampler(make().sampled(SamplingSpec.codi(50))) == "codi"
    with pytest.raises(ValueError, match=r"no sampler for LMSDiscreteScheduler: choose one of ddim, euler, .*, codi"):
        default_sampler(make(_class_name="LMSDiscreteScheduler"))


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        ("dpm-solver++", {"use_lu_lambdas": True}, "does not support use_lu_lambdas = True, only False"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear', only 'linear'"),
        ("euler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min', only 'zero'"),
        ("dpm-solver++", {"solver_order": 3}, "solver_order = 3, only 2"),
        ("dpm-solver++", {"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver', only 'dpmsolver"),
        ("dpm-solver++", {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1, only -inf"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps = False, only True"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type = 'sample', only 'epsilon' or 'v_prediction'"),
    ],
)
def test_variants_that_are_not_implemented_are_named(sampler: SamplerName, changes: dict[str, Any], message: str):
    schedule = NoiseSchedule.from_config(config_for(sampler, **changes))
    with pytest.raises(ValueError, match=message):
        timesteps_for(sampler, schedule, 10)
    if "prediction_type" not in changes:
        assert len(timesteps_for("ddim", schedule, 10)) == 10  # to which the key means nothing


def test_pndm_without_the_key_has_runge_kutta_steps():
    with pytest.raises(ValueError, match="skip_prk_steps = False"):
        timesteps_for("pndm", make(_class_name="PNDMScheduler"), 10)
    assert len(timesteps_for("pndm", make(), 10)) == 11


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps(sampler: SamplerName, steps: int):
    schedule = make().sampled(SamplingSpec.codi(50))
    most = 50 if sampler in ("lcm", "tcd", "codi") else 1000
    with pytest.raises(ValueError, match=rf"^steps = {steps}: choose 1 to {most} \("):
        timesteps_for(sampler, schedule, steps)


def test_codi_needs_a_grid():
    with pytest.raises(ValueError, match="has no distill_learning_steps"):
        timesteps_for("codi", make(), 4)
