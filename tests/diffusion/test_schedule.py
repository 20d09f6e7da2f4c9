"""The noise schedule against diffusers' schedulers, and against NumPy in float64 from the papers' equations."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from codi_jax.diffusion.sampling import default_sampler, timesteps_for
from codi_jax.diffusion.schedule import NoiseSchedule, boundary_scalings, distillation_grid, x0_eps
from codi_jax.methods import codi, lcm
from codi_jax.methods.codi import CodiFlags
from codi_jax.methods.generator import GeneratorFlags, generator_schedule
from codi_jax.methods.lcm import LcmFlags
from codi_jax.models.config import ConfigError

# torch 2.13 and NumPy's conversion protocol, inside diffusers and in comparisons.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

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
CLASSES = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": list(np.linspace(0.001, 0.3, 20)), "num_train_timesteps": 20},
}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SHAPE = (3, 4, 5, 2)


def make(**changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**SD, **changes})


def diffusers_scheduler(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def float64_alpha_sigma(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)[t].reshape(-1, 1, 1, 1)
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


# ---- alphas_cumprod


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_alphas_cumprod_are_those_of_diffusers(betas: dict[str, Any], zero_snr: bool):
    config = {**SD, **betas, "rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    ours, theirs = NoiseSchedule.from_config(config).alphas_cumprod, diffusers_scheduler(config).alphas_cumprod
    assert ours.dtype == jnp.float32
    # diffusers multiplies 1000 factors in float32, and the rescaling subtracts nearly equal roots: √ᾱ is compared, as
    # in the sampler, where an absolute error counts.
    np.testing.assert_allclose(ours, theirs, rtol=0 if zero_snr else 2e-5, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), rtol=0, atol=2e-6)


def test_scaled_linear_from_the_formula():
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    expected = np.cumprod([1 - beta for beta in betas])
    np.testing.assert_allclose(make().alphas_cumprod, expected, rtol=6e-8)  # half a float32 ulp: computed in float64


def test_zero_terminal_snr_is_exactly_zero():
    schedule = make(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0] == make().alphas_cumprod[0]
    alpha, sigma = schedule.alpha_sigma(999)
    assert (alpha.item(), sigma.item()) == (0, 1)


# ---- Equations


def test_add_noise_and_velocity_are_those_of_diffusers():
    schedule, theirs = make(), diffusers_scheduler(SD)
    z0, noise, t = normal(0), normal(1), np.array([0, 500, 999])
    tensors = torch.tensor(z0), torch.tensor(noise), torch.tensor(t)
    np.testing.assert_allclose(
        schedule.add_noise(z0 * jnp.ones(()), jnp.asarray(noise), t), theirs.add_noise(*tensors), atol=1e-6
    )
    np.testing.assert_allclose(
        schedule.velocity(jnp.asarray(z0), jnp.asarray(noise), t), theirs.get_velocity(*tensors), atol=1e-6
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_signal_and_noise(prediction_type: str):
    schedule = make(prediction_type=prediction_type)
    z0, noise, t = jnp.asarray(normal(0)), jnp.asarray(normal(1)), jnp.array([1, 500, 999])
    z_t = schedule.add_noise(z0, noise, t)
    x0, eps = schedule.to_x0_eps(schedule.target(z0, noise, t), z_t, t)
    # Dividing by α = 0.07 or σ = 0.04 amplifies the rounding of z_t by up to 30.
    np.testing.assert_allclose(x0, z0, atol=5e-6)
    np.testing.assert_allclose(eps, noise, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_in_float64(prediction_type: str):
    schedule = make(prediction_type=prediction_type)
    z, F, t = normal(0).astype(np.float64), normal(1).astype(np.float64), np.array([20, 500, 980])
    α, σ = float64_alpha_sigma(schedule, t)
    expected = {
        "epsilon": ((z - σ * F) / α, F),
        "v_prediction": (α * z - σ * F, α * F + σ * z),
        "sample": (F, (z - α * F) / σ),
    }[prediction_type]
    ours = schedule.to_x0_eps(jnp.asarray(F, jnp.float32), jnp.asarray(z, jnp.float32), t)
    for mine, theirs in zip(ours, expected):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_is_that_of_diffusers(prediction_type: str):
    config = {**SD, "prediction_type": prediction_type}
    schedule, theirs = NoiseSchedule.from_config(config), diffusers_scheduler(config)
    theirs.set_timesteps(50)
    z, prediction = normal(0), normal(1)
    for t in (981, 501, 1):
        expected = theirs.step(torch.tensor(prediction), t, torch.tensor(z)).prev_sample
        x0, eps = schedule.to_x0_eps(jnp.asarray(prediction), jnp.asarray(z), t)
        np.testing.assert_allclose(schedule.ddim_step(x0, eps, t - 20), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_where_the_last_step_ends(set_alpha_to_one: bool):
    schedule = make(set_alpha_to_one=set_alpha_to_one)
    alpha, _ = schedule.alpha_sigma(-19)
    expected = 1.0 if set_alpha_to_one else np.sqrt(schedule.alphas_cumprod[0])
    assert alpha.item() == pytest.approx(expected, rel=1e-7)


def test_a_time_past_the_end_is_nan_and_not_the_last_one():
    alpha, sigma = make().alpha_sigma(jnp.array([999, 1000]))
    np.testing.assert_array_equal(np.isnan(alpha.ravel()), [False, True])
    np.testing.assert_array_equal(np.isnan(sigma.ravel()), [False, True])


def test_snr():
    schedule, t = make(), np.array([0, 500, 999])
    α, σ = float64_alpha_sigma(schedule, t)
    ours = schedule.snr(t)
    assert ours.shape == (3,)
    np.testing.assert_allclose(ours, (α**2 / σ**2).ravel(), rtol=5e-5)  # 1 − ᾱ_0 = 8.5e-4 loses three digits


def test_bfloat16_goes_in_and_float32_comes_out():
    schedule = make()
    z = jnp.ones(SHAPE, jnp.bfloat16)
    t = jnp.array([1, 2, 3])
    x0, eps = schedule.to_x0_eps(z, z, t)
    outputs = [x0, eps, schedule.add_noise(z, z, t), schedule.target(z, z, t), schedule.ddim_step(x0, eps, t)]
    outputs += x0_eps(z, z, jnp.float32(0.6) * jnp.ones(()), jnp.float32(0.8) * jnp.ones(()), "v_prediction")
    assert all(x.dtype == jnp.float32 for x in outputs)


def test_one_time_for_all_samples_or_one_for_each():
    schedule, z = make(prediction_type="v_prediction"), jnp.asarray(normal(0))
    for t in (7, np.int64(7), jnp.int32(7), np.array([7, 7, 7])):
        np.testing.assert_array_equal(schedule.add_noise(z, z, t), schedule.add_noise(z, z, jnp.array([7, 7, 7])))


# ---- Boundary scalings


def test_boundary_scalings_are_those_of_diffusers():
    t = np.arange(1000)
    theirs = diffusers_scheduler(PUBLISHED["lcm-dreamshaper"]).get_scalings_for_boundary_condition_discrete(t)
    for mine, expected in zip(boundary_scalings(t), theirs):
        np.testing.assert_allclose(mine.ravel(), expected, rtol=1e-6)


def test_boundary_scalings_at_the_boundary_and_far_from_it():
    c_skip, c_out = boundary_scalings(jnp.array([0, 999]))
    np.testing.assert_allclose(c_skip.ravel(), [1, 0], atol=1e-8)
    np.testing.assert_allclose(c_out.ravel(), [0, 1], atol=1e-8)  # σ_d τ/√(τ² + σ_d²) would end at 0.5


def test_consistency_function_uses_the_schedules_own_scaling():
    schedule = make(_class_name="LCMScheduler", timestep_scaling=0.01)
    z, x0, t = jnp.asarray(normal(0)), jnp.asarray(normal(1)), np.array([0, 10, 100])
    τ = 0.01 * t.reshape(-1, 1, 1, 1)
    expected = 0.25 / (τ**2 + 0.25) * np.asarray(z) + τ / np.sqrt(τ**2 + 0.25) * np.asarray(x0)
    np.testing.assert_allclose(schedule.consistency(z, x0, t), expected, rtol=1e-5, atol=1e-6)


# ---- The distillation grid


def test_trailing_grid():
    t, s = distillation_grid(1000, 50)
    np.testing.assert_array_equal(t, range(19, 1000, 20))
    np.testing.assert_array_equal(s, [0, *range(19, 980, 20)])


def test_leading_grid():
    t, s = distillation_grid(1000, 50, "leading")
    np.testing.assert_array_equal(t, range(0, 1000, 20))
    np.testing.assert_array_equal(s, [0, *range(0, 980, 20)])


@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 50, 999, 1000])
def test_trailing_grid_is_that_of_lcm(num_steps: int):
    theirs = diffusers.LCMScheduler()
    theirs.set_timesteps(num_steps, original_inference_steps=num_steps)
    t, s = distillation_grid(1000, num_steps)
    np.testing.assert_array_equal(t[::-1], theirs.timesteps)
    assert np.all(s >= 0)
    assert np.all(s <= t)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_grids(num_steps: int):
    with pytest.raises(ValueError, match=rf"grid of {num_steps} steps is impossible: choose 1 to 1000"):
        distillation_grid(1000, num_steps)


# ---- Configuration files


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations(config: dict[str, Any], tmp_path: Path):
    schedule, theirs = NoiseSchedule.from_config(config), diffusers_scheduler(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    for key in ("prediction_type", "timestep_spacing", "steps_offset"):
        assert getattr(schedule, key) == theirs.config[key]
    path = schedule.save_pretrained(tmp_path)
    assert json.loads(path.read_text()) == config
    assert NoiseSchedule.from_pretrained(tmp_path).to_config() == config


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("complete", [True, False])
def test_what_every_scheduler_class_saves_is_read(name: str, complete: bool, tmp_path: Path):
    """With all of its keys, and with none, when the defaults of the class count."""
    scheduler = getattr(diffusers, name)(**({"clip_sample": False} if name[:3] in ("DDI", "DDP") else {}))
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    if not complete:
        path.write_text(json.dumps({"_class_name": name}))
    schedule = NoiseSchedule.from_pretrained(tmp_path)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5)
    assert schedule.scheduler == name
    for key in ("timestep_spacing", "steps_offset", "set_alpha_to_one", "prediction_type"):
        if key in scheduler.config:
            assert getattr(schedule, key) == scheduler.config[key]


def test_diffusers_reads_what_is_saved(tmp_path: Path):
    config = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_config(config)
    schedule.save_pretrained(tmp_path)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert {key: theirs.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
    assert [path.name for path in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]


def test_a_student_carries_its_grid(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    teacher = NoiseSchedule.from_config(PUBLISHED["sd-1.4, sd-1.5"])
    student = teacher.with_distillation_grid(20, "leading", timestep_scaling=5.0)
    student.save_pretrained(tmp_path)
    loaded = NoiseSchedule.from_pretrained(tmp_path)
    assert (loaded.distill_learning_steps, loaded.distill_grid, loaded.timestep_scaling) == (20, "leading", 5.0)
    assert teacher.distill_learning_steps is None
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
    assert (again.distill_learning_steps, again.distill_grid, again.timestep_scaling) == (20, "leading", 5.0)


def test_a_generator_carries_its_times(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    teacher = NoiseSchedule.from_config(PUBLISHED["sd-1.4, sd-1.5"])
    generator = teacher.with_generator_timesteps([399])
    assert (generator.generator_timesteps, teacher.generator_timesteps) == ((399,), None)
    generator.save_pretrained(tmp_path)
    assert NoiseSchedule.from_pretrained(tmp_path).generator_timesteps == (399,)
    np.testing.assert_array_equal(generator.alphas_cumprod, teacher.alphas_cumprod)

    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs = diffusers.LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.text  # no warning of a key that it does not know
    # diffusers multiplies a thousand numbers in float32.
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), teacher.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("other", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_another_class_brings_none_of_its_defaults(name: str, other: str):
    schedule = NoiseSchedule.from_config({"_class_name": name})
    changed = schedule.with_config(_class_name=other)
    np.testing.assert_array_equal(changed.alphas_cumprod, schedule.alphas_cumprod)
    assert changed.timestep_spacing == schedule.timestep_spacing
    assert changed.set_alpha_to_one == schedule.set_alpha_to_one
    assert changed.scheduler == other


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
    "codi": Way(lambda s: codi.student_schedule(s, CODI), "codi", [950, 700, 450, 200], 3.0, (20, "leading")),
    "lcm": Way(lambda s: lcm.student_schedule(s, LCM), "lcm", [999, 759, 519, 279], 7.0),
    "generator": Way(lambda s: generator_schedule(s, GeneratorFlags()), "lcm", [399], generator_timesteps=(399,)),
    "denoising, bk-sdm": Way(lambda s: s.with_many_steps(), "ddim", [999, 749, 499, 249]),
    "adaptation": Way(lambda s: s.with_consistency_grid(), "lcm", [999, 759, 499, 259]),
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
    assert schedule.timestep_scaling == way.timestep_scaling
    grid = None if schedule.distill_learning_steps is None else (schedule.distill_learning_steps, schedule.distill_grid)
    assert grid == way.grid
    assert schedule.generator_timesteps == way.generator_timesteps
    np.testing.assert_array_equal(schedule.alphas_cumprod, teacher.alphas_cumprod)
    assert schedule.prediction_type == teacher.prediction_type
    keys = set(schedule.to_config())
    assert not keys & {"use_karras_sigmas", "skip_prk_steps", "interpolation_type"}
    assert ("distill_learning_steps" in keys) == (second == "codi")
    assert ("_generator_timesteps" in keys) == (second == "generator")

    theirs = getattr(diffusers, schedule.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.prediction_type == teacher.prediction_type
    np.testing.assert_allclose(np.sqrt(theirs.alphas_cumprod), np.sqrt(teacher.alphas_cumprod), atol=2e-6)
    if second != "codi":
        theirs.set_timesteps(**({"timesteps": [399]} if second == "generator" else {"num_inference_steps": 4}))
        np.testing.assert_array_equal(theirs.timesteps, way.times)
    if way.sampler == "lcm":
        assert theirs.config.timestep_scaling == way.timestep_scaling


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"grid of 1001 steps is impossible"):
        make().with_consistency_grid(1001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported; it must be \"linear\" or"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'"),
        ({"clip_sample": True}, "clip_sample = True is not supported; it must be false"),
        ({"thresholding": True}, "thresholding = True"),
        ({"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ({"set_alpha_to_one": None}, "set_alpha_to_one = None"),
        ({"steps_offset": -1}, "steps_offset = -1 must be an integer, 0 or more"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0 must be an integer, 1 or more"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps = 1000000000000 must be at most 100000"),
        ({"steps_offset": 2**40}, "steps_offset = 1099511627776 must be at most 100000"),
        ({"original_inference_steps": 10**9}, "original_inference_steps = 1000000000 must be at most"),
        ({"timestep_scaling": float("inf")}, "timestep_scaling = inf must be a positive number"),
        ({"beta_end": float("nan")}, "beta_end = nan must be a positive number"),
        ({"beta_end": -0.1}, "beta_end = -0.1 must be a positive number"),
        ({"beta_start": True}, "beta_start = True must be a positive number"),
        ({"beta_end": 1.5}, r"every β of the noise schedule must be in \(0, 1\]"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\), but num_train_timesteps = 1000"),
        ({"rescale_betas_zero_snr": True}, "prediction_type = 'epsilon' cannot be combined with a signal of zero"),
        ({"distill_learning_steps": 1001}, r"distill_learning_steps = 1001 must be an integer, 1 to 1000"),
        (
            {"_generator_timesteps": [1000]},
            r"_generator_timesteps = \[1000\] must be timesteps of the schedule, 0 to 999",
        ),
        ({"_generator_timesteps": [399, 499]}, "_generator_timesteps"),
        ({"_generator_timesteps": 399}, "_generator_timesteps = 399"),
        ({"distill_grid": "linspace"}, "distill_grid = 'linspace'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name = 'FlowMatchEulerDiscreteScheduler'"),
        ({"_class_name": None}, "_class_name = None is not supported; it must be one of DDIMScheduler, "),
    ],
)
def test_unsupported_values_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=rf"^some/file\.json: {message}"):
        NoiseSchedule.from_config({**SD, **changes}, where="some/file.json")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*scheduler_config\.json"):
        NoiseSchedule.from_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"_class_name": ')
    with pytest.raises(ConfigError, match=r"scheduler_config\.json is not valid JSON"):
        NoiseSchedule.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"scheduler_config\.json holds a JSON list instead of an object"):
        NoiseSchedule.from_pretrained(tmp_path)
    path.write_text(json.dumps({**SD, "thresholding": True}))
    with pytest.raises(ConfigError, match=rf"^{path}: thresholding"):
        NoiseSchedule.from_pretrained(tmp_path)


# ---- As a pytree


def test_a_schedule_is_a_tree_with_one_leaf():
    schedule = make()
    assert len(jax.tree.leaves(schedule)) == 1
    shapes = jax.eval_shape(lambda s: s, schedule)
    assert shapes.prediction_type == schedule.prediction_type
    assert jax.tree.map(lambda _: "a sharding", schedule).alphas_cumprod == "a sharding"


def test_jit_compiles_once_for_schedules_that_differ_in_numbers_only():
    traces = []

    @jax.jit
    def add_noise(schedule: NoiseSchedule, z: jax.Array, t: jax.Array) -> jax.Array:
        traces.append(1)
        return schedule.add_noise(z, z, t)

    z, t = jnp.asarray(normal(0)), jnp.array([1, 2, 3])
    schedule = make()
    np.testing.assert_allclose(add_noise(schedule, z, t), schedule.add_noise(z, z, t), rtol=1e-6)
    add_noise(make(), z, t)
    assert len(traces) == 1
    add_noise(make(prediction_type="sample"), z, t)
    assert len(traces) == 2
