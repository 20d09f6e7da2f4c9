"""``scheduler_config.json`` against diffusers' schedulers, which read and write the same file."""

import json
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from schedulers import PUBLISHED, SD, diffusers_scheduler, make

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models.config import ConfigError
from codi_jax.pipeline.saving import save_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


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


# ---- Configuration files


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations(config: dict[str, Any], tmp_path: Path):
    schedule, theirs = NoiseSchedule.from_config(config), diffusers_scheduler(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    assert schedule.prediction_type == theirs.config.prediction_type
    for key in ("timestep_spacing", "steps_offset"):
        assert getattr(schedule.sampling, key) == theirs.config[key]
    path = save_schedule(schedule, tmp_path)
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
    assert schedule.sampling.scheduler == name
    assert schedule.prediction_type == scheduler.config.get("prediction_type", "epsilon")
    for key in ("timestep_spacing", "steps_offset", "set_alpha_to_one"):
        if key in scheduler.config:
            assert getattr(schedule.sampling, key) == scheduler.config[key]


def test_diffusers_reads_what_is_saved(tmp_path: Path):
    config = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_config(config)
    save_schedule(schedule, tmp_path)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert {key: theirs.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
    assert [path.name for path in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("other", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_another_class_brings_none_of_its_defaults(name: str, other: str):
    schedule = NoiseSchedule.from_config({"_class_name": name})
    changed = schedule.with_config(_class_name=other)
    np.testing.assert_array_equal(changed.alphas_cumprod, schedule.alphas_cumprod)
    assert changed.sampling.timestep_spacing == schedule.sampling.timestep_spacing
    assert changed.sampling.set_alpha_to_one == schedule.sampling.set_alpha_to_one
    assert changed.sampling.scheduler == other


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
