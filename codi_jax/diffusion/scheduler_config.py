"""``scheduler_config.json``, diffusers' file that defines the noise and how to sample the model.

This file has its keys, their defaults in diffusers' classes, and the checks of their values. For their meaning see
`codi_jax.diffusion.schedule` and `codi_jax.diffusion.sampling_spec`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from codi_jax.models.config import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
DistillationGrid = Literal["trailing", "leading"]

SamplerName = Literal[
    "ddim", "euler", "euler-ancestral", "heun", "pndm", "dpm-solver++", "dpm-solver++-sde", "unipc", "lcm", "tcd",
    "codi",
]  # fmt: skip
NoiseLevels = Literal["spaced", "karras", "exponential", "beta"]

SCHEDULER_OF: dict[SamplerName, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "dpm-solver++-sde": "DPMSolverMultistepScheduler",  # if the file's algorithm_type is stochastic
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "codi": "DDIMScheduler",  # after "ddim", which a file with this class and no grid asks for
}
"""The equivalent diffusers class, whose defaults apply to missing keys."""

CONFIG_NAME = "scheduler_config.json"
# diffusers ignores keys that begin with an underscore, and warns about any other unknown key.
GENERATOR_TIMESTEPS = "_generator_timesteps"

# The defaults for missing keys in most of diffusers' schedulers ...
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "distill_learning_steps": None,
    "distill_grid": "trailing",
    "distill_timestep_scaling": 10.0,
    GENERATOR_TIMESTEPS: None,
}
# ... and where a scheduler differs. Only these are supported: others may have no ᾱ at all (flow matching, EDM).
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading"},
    "DDPMScheduler": {"timestep_spacing": "leading"},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _STABLE_DIFFUSION,
    "LCMScheduler": _LCM,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "TCDScheduler": _LCM,
    "UniPCMultistepScheduler": {},
}
# The noise and the network's prediction: what stays when a model gets a new sampling spec.
NOISE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip
_MOST_TIMESTEPS = 100_000  # a schedule's memory grows with them
# The keys whose defaults differ from class to class.
CLASS_KEYS = ("beta_start", "beta_end", "beta_schedule", "timestep_spacing", "set_alpha_to_one")

# Keys whose values change the math, and the values that are implemented. `clip_sample` and `thresholding` clip x̂ to
# pixels' range, which latents do not have; a learned variance doubles the network's output channels.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": get_args(PredictionType),
    "timestep_spacing": get_args(TimestepSpacing),
    "distill_grid": get_args(DistillationGrid),
    "rescale_betas_zero_snr": (False, True),
    "set_alpha_to_one": (False, True),
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_POSITIVE_NUMBERS = ("beta_start", "beta_end", "timestep_scaling", "distill_timestep_scaling")


def read_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with defaults filled in; checks every value that a schedule depends on.

    Args:
      config: the parsed file.
      where: the name of the file, for messages.

    Raises:
      ConfigError: for an unknown class or an unsupported value.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ConfigError(
            f"{where}: _class_name = {name!r} is not supported; it must be one of {', '.join(SCHEDULERS)}."
        )
    values = {**DEFAULTS, **SCHEDULERS[name], **config}
    for key, implemented in _IMPLEMENTED.items():
        if values.get(key, implemented[0]) not in implemented:
            choices = " or ".join(map(json.dumps, implemented))
            raise ConfigError(f"{where}: {key} = {values[key]!r} is not supported; it must be {choices}.")
    for key in _POSITIVE_NUMBERS:
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or not 0 < values[key] < math.inf:
            raise ConfigError(f"{where}: {key} = {values[key]!r} must be a positive number.")
    T = _checked_integer(values, "num_train_timesteps", where, at_least=1)
    _checked_integer(values, "steps_offset", where, at_least=0)
    _checked_integer(values, "original_inference_steps", where, at_least=1)
    for key in ("num_train_timesteps", "steps_offset", "original_inference_steps"):
        if values[key] > _MOST_TIMESTEPS:
            raise ConfigError(f"{where}: {key} = {values[key]!r} must be at most {_MOST_TIMESTEPS}.")
    if values["distill_learning_steps"] is not None:
        _checked_integer(values, "distill_learning_steps", where, at_least=1, at_most=T)
    _check_generator_timesteps(values[GENERATOR_TIMESTEPS], T, where)
    return values


def _check_generator_timesteps(times: Any, T: int, where: str) -> None:
    if times is None:
        return
    are_integers = isinstance(times, list) and all(type(t) is int for t in times)
    if not are_integers or not times or times[0] >= T or times[-1] < 0 or np.any(np.diff(times) >= 0):
        raise ConfigError(
            f"{where}: {GENERATOR_TIMESTEPS} = {times!r} must be timesteps of the schedule, 0 to {T - 1}, the "
            "highest first."
        )


def _checked_integer(values: Mapping[str, Any], key: str, where: str, at_least: int, at_most: int | None = None) -> int:
    value = values[key]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < at_least or (at_most is not None and value > at_most):
        limit = " or more" if at_most is None else f" to {at_most} (num_train_timesteps)"
        raise ConfigError(f"{where}: {key} = {value!r} must be an integer, {at_least}{limit}.")
    return value


def alphas_cumprod_of(values: Mapping[str, Any], where: str) -> Float[np.ndarray, " T"]:
    """ᾱ_t = ∏_{i ≤ t} (1 − β_i) (Ho et al., 2020, section 2), in float64.

    Args:
      values: from `read_values`.
      where: the name of the file, for messages.

    Raises:
      ConfigError: if a β is impossible.
    """
    betas = _betas(values, where)
    if not (np.all(np.isfinite(betas)) and np.all((betas > 0) & (betas <= 1))):
        raise ConfigError(
            f"{where}: every β of the noise schedule must be in (0, 1]; see beta_start, beta_end and trained_betas."
        )
    alphas_cumprod = np.cumprod(1 - betas)
    return _with_zero_terminal_snr(alphas_cumprod) if values["rescale_betas_zero_snr"] else alphas_cumprod


def _betas(values: Mapping[str, Any], where: str) -> Float[np.ndarray, " T"]:
    T, start, end = values["num_train_timesteps"], values["beta_start"], values["beta_end"]
    if values["trained_betas"] is not None:
        betas = np.asarray(values["trained_betas"], np.float64)
        if betas.shape != (T,):
            raise ConfigError(
                f"{where}: trained_betas has shape {betas.shape}, but num_train_timesteps = {T}: they must agree."
            )
        return betas
    match values["beta_schedule"]:
        case "linear":
            return np.linspace(start, end, T)
        case "scaled_linear":
            return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2
        case _:  # squaredcos_cap_v2: Nichol and Dhariwal, 2021, equation 17
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            return np.minimum(1 - f[1:] / f[:-1], 0.999)


def _with_zero_terminal_snr(alphas_cumprod: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Shifts and scales √ᾱ so that it ends at exactly 0 and starts where it did (Lin et al., 2024, algorithm 1)."""
    roots = np.sqrt(alphas_cumprod)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
