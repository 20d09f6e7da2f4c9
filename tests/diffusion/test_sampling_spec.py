"""How students say that they are to be sampled: the file that is saved, as diffusers reads it."""

import inspect
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
from schedulers import PUBLISHED, make

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for
from codi_jax.methods import codi, lcm, tcd
from codi_jax.methods.codi import CodiFlags
from codi_jax.methods.generator import GeneratorFlags, generator_schedule
from codi_jax.methods.lcm import LcmFlags
from codi_jax.pipeline.saving import save_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SPECS = {
    "codi, trailing": SamplingSpec.codi(20),
    "codi, leading": SamplingSpec.codi(25, "leading", timestep_scaling=3.0),
    "lcm": SamplingSpec.lcm(25, 7.0),
    "lcm, published": SamplingSpec.lcm(),
    "tcd": SamplingSpec.tcd(20),
    "generator, one step": SamplingSpec.generator([399]),
    "generator": SamplingSpec.generator([999, 749, 499, 249]),
    "many steps": SamplingSpec.many_steps(),
}
PUBLISHED_SPECS = {name: NoiseSchedule.from_config(config).sampling for name, config in PUBLISHED.items()}


def saved_and_read(schedule: NoiseSchedule, folder: Path) -> NoiseSchedule:
    save_schedule(schedule, folder)
    return NoiseSchedule.from_pretrained(folder)


# ---- What each way of being sampled saves


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_is_read_as_it_was_saved(spec: SamplingSpec, tmp_path: Path):
    schedule = make(prediction_type="v_prediction").sampled(spec)
    assert schedule.sampling == spec
    assert saved_and_read(schedule, tmp_path).sampling == spec
    assert schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_diffusers_reads_what_a_spec_saves(spec: SamplingSpec, tmp_path: Path):
    """Its class takes the very keys, and visits the same times; of a leading CoDi grid only all of them together."""
    schedule = make().sampled(spec)
    save_schedule(schedule, tmp_path)
    theirs = getattr(diffusers, spec.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    for key, value in schedule.to_config().items():
        if not key.startswith(("distill_", "_")):
            assert theirs.config[key] == value
    assert (theirs.config.timestep_spacing, theirs.config.steps_offset) == (spec.timestep_spacing, spec.steps_offset)
    assert (theirs.config.get("set_alpha_to_one", True), theirs.config.prediction_type) == (True, "epsilon")
    for steps in (1, 4, 5, spec.grid_steps):
        if spec.timesteps is None and (spec.grid == "trailing" or steps == spec.grid_steps):
            theirs.set_timesteps(steps)
            np.testing.assert_array_equal(timesteps_for(spec.sampler, schedule, steps), theirs.timesteps)
    if spec.timesteps is not None:
        theirs.set_timesteps(timesteps=list(spec.timesteps))
        np.testing.assert_array_equal(timesteps_for("lcm", schedule, len(spec.timesteps)), theirs.timesteps)


@pytest.mark.parametrize("name", SPECS)
def test_what_a_student_is(name: str):
    assert SPECS[name].is_of_student == (name != "many steps")
    assert default_sampler(make().sampled(SPECS[name])) == SPECS[name].sampler
    assert make().sampled(SPECS[name]).with_many_steps().sampling == SPECS["many steps"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_that_are_students(name: str):
    assert PUBLISHED_SPECS[name].is_of_student == (name == "lcm-dreamshaper")
    schedule = NoiseSchedule.from_config(PUBLISHED[name])
    assert (schedule.with_many_steps() is schedule) == (name != "lcm-dreamshaper")


# ---- What is asked for where nobody says it


def default_of(pipeline: Any, argument: str) -> Any:
    return inspect.signature(pipeline.__call__).parameters[argument].default


@pytest.mark.parametrize("name", PUBLISHED)
def test_default_steps_of_published_models_are_those_of_their_pipelines(name: str):
    is_lcm = name == "lcm-dreamshaper"
    pipeline = diffusers.LatentConsistencyModelPipeline if is_lcm else diffusers.StableDiffusionPipeline
    spec = PUBLISHED_SPECS[name]
    assert spec.default_steps(spec.sampler) == default_of(pipeline, "num_inference_steps")
    assert spec.most_steps(50) == 50
    assert spec.most_steps(7) == 7


def test_default_guidance_scales_are_those_of_diffusers():
    """But a generator was trained to need none."""
    text = default_of(diffusers.StableDiffusionPipeline, "guidance_scale")
    of_edits = (
        default_of(diffusers.StableDiffusionInstructPix2PixPipeline, "guidance_scale"),
        default_of(diffusers.StableDiffusionInstructPix2PixPipeline, "image_guidance_scale"),
    )
    assert of_edits[0] == text
    for name, spec in SPECS.items():
        assert spec.default_guidance_scales == ((1.0, 1.0) if name.startswith("generator") else of_edits)


@pytest.mark.parametrize(
    ("spec", "sampler", "steps"),
    [
        (SamplingSpec.codi(20), "codi", 4),
        (SamplingSpec.codi(2), "codi", 2),  # no more than its grid has
        (SamplingSpec.codi(20), "euler", 50),  # sampled in another way than it was distilled for
        (SamplingSpec.lcm(3), "lcm", 3),
        (SamplingSpec.lcm(), "lcm", 4),
        (SamplingSpec.lcm(), "ddim", 50),
        (SamplingSpec.tcd(), "tcd", 4),
        (SamplingSpec.tcd(2), "tcd", 2),
        (SamplingSpec.generator([399]), "lcm", 1),
        (SamplingSpec.generator([999, 749, 499]), "lcm", 3),
        (SamplingSpec.generator([399]), "ddim", 50),
        (SamplingSpec.many_steps(), "ddim", 50),
        (SamplingSpec.many_steps(), "dpm-solver++", 50),
        (SamplingSpec.many_steps(), "pndm", 50),
    ],
)
def test_default_steps(spec: SamplingSpec, sampler: str, steps: int):
    assert spec.default_steps(sampler) == steps


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_more_steps_than_the_model_was_distilled_for(spec: SamplingSpec):
    most = {"ddim": 50, "lcm": spec.grid_steps, "tcd": 20, "codi": spec.grid_steps}[spec.sampler]
    most = len(spec.timesteps) if spec.timesteps is not None else most
    schedule = make().sampled(spec)
    assert spec.most_steps(50) == most
    assert len(timesteps_for(spec.sampler, schedule, spec.most_steps(50))) == most
    assert spec.most_steps(1) == 1


# ---- Students in files


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
    "tcd": Way(lambda s: tcd.sampling(s, LCM), "tcd", [999, 759, 519, 279]),
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


def test_a_generator_needs_no_grid():
    """Its times may be those of a schedule that is shorter than the grid of other students."""
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 20})
    assert schedule.sampled(SamplingSpec.generator([9])).sampling.timesteps == (9,)
    with pytest.raises(ValueError, match="A distillation grid of 50 steps is impossible"):
        schedule.sampled(SamplingSpec.lcm(50))
