"""The noise schedule: what z_t is, how a network's output is read, and the times that a student is distilled on.

The notation of every file in this package: z_0 is a clean latent, ε ~ N(0, I), and for t in 0 … T−1

    z_t = α_t z_0 + σ_t ε,    α_t = √ᾱ_t,    σ_t = √(1 − ᾱ_t)                (Ho et al., 2020, equation 4).

ᾱ (`alphas_cumprod`) comes from the model's own ``scheduler_config.json``, the file that diffusers writes and reads. It
is computed in float64 on the host and kept in float32; so are x̂, ε̂ and the latents that come out of this file.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from codi_jax.models.config import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
DistillationGrid = Literal["trailing", "leading"]

Latents = Float[Array, "b h w c"]
Timesteps = Int[ArrayLike, ""] | Int[ArrayLike, " b"]
PerSample = Float[Array, "b 1 1 1"] | Float[Array, "1 1 1 1"]
"""One number for each sample, in the rank of latents; one for all of them where the timestep was a scalar."""

CONFIG_NAME = "scheduler_config.json"
# diffusers passes over keys that begin with an underscore, and warns of any other that it does not know.
_GENERATOR_TIMESTEPS = "_generator_timesteps"
SIGMA_DATA = 0.5  # σ_d of the boundary scalings; no configuration file holds it

# What diffusers takes for a key that the file leaves out, in most of its schedulers ...
_DEFAULTS: dict[str, Any] = {
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
    _GENERATOR_TIMESTEPS: None,
}
# ... and where a scheduler differs. Only these are read: another one may not have an ᾱ at all (flow matching, EDM).
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
_SCHEDULERS: dict[str, dict[str, Any]] = {
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
# What the noise is, and what the network puts out: what stays when a model gets another way of being sampled.
_NOISE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip
_MOST_TIMESTEPS = 100_000  # what a schedule takes grows with them
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
# The keys whose defaults differ: those of the noise, and those of a sampler.
_CLASS_KEYS = ("beta_start", "beta_end", "beta_schedule", "timestep_spacing", "set_alpha_to_one")
_SAMPLER_KEYS = ("timestep_spacing", "set_alpha_to_one")

# Keys whose values change the mathematics, and the values that are implemented. `clip_sample` and `thresholding` clip x̂
# to pixels' range, which latents do not have; a learned variance doubles the network's output channels.
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

_STATIC = {"static": True}  # for JAX: part of the tree's structure, so that a change of it compiles anew


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise schedule of a model: a pytree with one leaf, ᾱ; everything else is static.

    Made by `from_pretrained` or `from_config`, changed by `with_config`. A method of training says how its model is to
    be sampled by `sampled_by`, or by one of the methods after it.

    Attributes:
      alphas_cumprod: ᾱ_0 … ᾱ_{T−1}, float32.
      prediction_type: what the network's output is.
      scheduler: the diffusers class that the file names, which says how the model is sampled by default.
      timestep_spacing: how the times of a sampler are spread over 0 … T−1.
      steps_offset: added to the times of leading spacing.
      set_alpha_to_one: whether ᾱ_{−1}, where the last step of a sampler ends, is 1; else it is ᾱ_0.
      original_inference_steps: the size of the grid that an LCM student was distilled on.
      timestep_scaling: the factor from t to τ in `boundary_scalings`.
      distill_learning_steps: the size of the grid that a CoDi student was distilled on; ``None`` for other models.
      distill_grid: which grid that was.
      generator_timesteps: the descending times that a generator of one or few steps was trained at; ``None`` for other
        models.
      config_json: the whole configuration file.
    """

    alphas_cumprod: Float[Array, " T"] | Any  # Any: jax.tree.map also makes trees of shapes or of shardings
    prediction_type: PredictionType = field(metadata=_STATIC)
    scheduler: str = field(metadata=_STATIC)
    timestep_spacing: TimestepSpacing = field(metadata=_STATIC)
    steps_offset: int = field(metadata=_STATIC)
    set_alpha_to_one: bool = field(metadata=_STATIC)
    original_inference_steps: int = field(metadata=_STATIC)
    timestep_scaling: float = field(metadata=_STATIC)
    distill_learning_steps: int | None = field(metadata=_STATIC)
    distill_grid: DistillationGrid = field(metadata=_STATIC)
    generator_timesteps: tuple[int, ...] | None = field(metadata=_STATIC)
    config_json: str = field(metadata=_STATIC, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = CONFIG_NAME) -> "NoiseSchedule":
        """Makes the schedule that a ``scheduler_config.json`` describes.

        A key that the file leaves out has the default of the diffusers class that it names, but for ``clip_sample``,
        which diffusers' Stable Diffusion pipelines too turn off. Keys that do not enter the schedule are kept for
        `to_config`.

        Args:
          config: the parsed file.
          where: the name of the file, for messages.

        Raises:
          ConfigError: for an unknown class, a value that is not implemented, or an ε-prediction network on a schedule
            with ᾱ_{T−1} = 0, where ε̂ says nothing about x̂ = (z − σε̂)/α.
        """
        values = _read(config, where)
        alphas_cumprod = _alphas_cumprod(values, where)
        if alphas_cumprod[-1] == 0 and values["prediction_type"] == "epsilon":
            raise ConfigError(
                f"{where}: prediction_type = 'epsilon' cannot be combined with a signal of zero at the last timestep "
                f"(rescale_betas_zero_snr = {values['rescale_betas_zero_snr']!r}): set the latter to false unless the "
                "network predicts v or z_0."
            )
        is_codi = values["distill_learning_steps"] is not None
        times = values[_GENERATOR_TIMESTEPS]
        return cls(
            alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
            prediction_type=values["prediction_type"],
            scheduler=values["_class_name"],
            timestep_spacing=values["timestep_spacing"],
            steps_offset=values["steps_offset"],
            set_alpha_to_one=values["set_alpha_to_one"],
            original_inference_steps=values["original_inference_steps"],
            timestep_scaling=float(values["distill_timestep_scaling" if is_codi else "timestep_scaling"]),
            distill_learning_steps=values["distill_learning_steps"],
            distill_grid=values["distill_grid"],
            generator_timesteps=None if times is None else tuple(times),
            config_json=json.dumps(dict(config)),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NoiseSchedule":
        """Reads ``scheduler/scheduler_config.json`` of a model's folder, or ``scheduler_config.json`` in it.

        Raises:
          FileNotFoundError: if there is neither.
          ConfigError: if the file is no JSON object, and as `from_config`.
        """
        paths = [Path(folder, "scheduler", CONFIG_NAME), Path(folder, CONFIG_NAME)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"There is no {paths[0]} and no {paths[1]}: {folder} is not a model's folder as diffusers writes it."
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}): copy or download it again.") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds a JSON {type(config).__name__} instead of an object.")
        return cls.from_config(config, where=str(path))

    def to_config(self) -> dict[str, Any]:
        """Returns the mapping that this schedule was made from, with every key of it."""
        return json.loads(self.config_json)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes ``scheduler/scheduler_config.json`` into a model's folder, for diffusers too; returns its path."""
        path = Path(folder, "scheduler", CONFIG_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return unfinished.replace(path)

    def with_config(self, **changes: Any) -> "NoiseSchedule":
        """Returns the schedule with these keys of the configuration changed; raises as `from_config`.

        With another ``_class_name`` the keys that the file leaves out keep the values that they had.
        """
        defaults = {**_DEFAULTS, **_SCHEDULERS[self.scheduler]} if "_class_name" in changes else {}
        kept = {key: defaults[key] for key in _CLASS_KEYS if key in defaults}
        return self.from_config({**kept, **self.to_config(), **changes})

    def read_by(self, scheduler: str) -> "NoiseSchedule":
        """Returns the schedule as another of diffusers' classes reads the same file.

        What the file leaves out about sampling has the defaults of the class that samples, not those of the class that
        the file names, as with ``EulerDiscreteScheduler.from_config(pipeline.scheduler.config)``. ᾱ stays as it is: the
        network was trained on it.

        Args:
          scheduler: name of the class.
        """
        given, defaults = self.to_config(), {**_DEFAULTS, **_SCHEDULERS[scheduler]}
        left_out = {key: defaults[key] for key in _SAMPLER_KEYS if given.get(key) is None}
        return dataclasses.replace(self, **left_out)

    def sampled_by(self, scheduler: str, **keys: Any) -> "NoiseSchedule":
        """Returns the same noise with another way of being sampled, which replaces the present one whole.

        A model is sampled as it was last trained to be, so nothing stays of a former student's grid, scalings or times,
        nor an option of a former scheduler class.

        Args:
          scheduler: the diffusers class that samples it.
          **keys: its keys of the configuration.

        Raises:
          ConfigError: as `from_config`.
        """
        values = {**_DEFAULTS, **_SCHEDULERS[self.scheduler], **self.to_config()}
        noise = {key: values[key] for key in _NOISE_KEYS}
        # For a file with another offset, diffusers' pipelines warn that it is outdated.
        return self.from_config({"_class_name": scheduler, **noise, "clip_sample": False, "steps_offset": 1, **keys})

    def with_distillation_grid(
        self, num_steps: int, kind: DistillationGrid = "trailing", timestep_scaling: float = 10.0
    ) -> "NoiseSchedule":
        """Returns the schedule of a CoDi student: the grid that it is trained on is saved with it.

        The other keys make the student's file one that stock diffusers samples nearly as the sampler `codi` does:
        DDIM steps on evenly spread times, the last of which ends at x̂. (diffusers warns that it ignores the
        ``distill_`` keys.)

        Args:
          num_steps: N of `distillation_grid`.
          kind: which grid.
          timestep_scaling: the factor from t to τ in `boundary_scalings`.

        Raises:
          ConfigError: if the grid is impossible.
        """
        return self.sampled_by(
            "DDIMScheduler",
            timestep_spacing=kind,
            steps_offset=1 if kind == "trailing" else 0,  # trailing times have no offset
            set_alpha_to_one=True,
            distill_learning_steps=num_steps,
            distill_grid=kind,
            distill_timestep_scaling=timestep_scaling,
        )

    def with_consistency_grid(self, num_steps: int = 50, timestep_scaling: float = 10.0) -> "NoiseSchedule":
        """Returns the schedule of an LCM student, for the LCM sampler; the defaults are those of published ones.

        Args:
          num_steps: N of `distillation_grid`.
          timestep_scaling: the factor from t to τ in `boundary_scalings`.

        Raises:
          ValueError: if the grid is impossible.
        """
        distillation_grid(self.num_train_timesteps, num_steps)  # or it refuses
        return self.sampled_by("LCMScheduler", original_inference_steps=num_steps, timestep_scaling=timestep_scaling)

    def with_generator_timesteps(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """Returns the schedule of a generator that is sampled at these descending times, by the LCM sampler.

        diffusers samples it with its ``LCMScheduler``, when it is given the times: ``timesteps=[399]``.

        Raises:
          ConfigError: if they do not descend, or lie outside of 0 to T − 1.
        """
        return self.sampled_by("LCMScheduler", **{_GENERATOR_TIMESTEPS: [*timesteps]})

    def with_many_steps(self) -> "NoiseSchedule":
        """Returns the schedule of a model that is trained by denoising: as it is, unless it is that of a student.

        The scheduler of a student's own teacher is not in its folder: DDIM takes its place, at trailing times, which do
        for a signal of zero at the last time too (Lin et al., 2024, section 3.3).
        """
        is_student = self.distill_learning_steps is not None or self.scheduler in _FEW_STEP_SCHEDULERS
        if not is_student and self.generator_timesteps is None:
            return self
        return self.sampled_by("DDIMScheduler", timestep_spacing="trailing", set_alpha_to_one=True)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.shape[0]

    def alpha_sigma(self, t: Timesteps) -> tuple[PerSample, PerSample]:
        """α_t and σ_t, in the rank of latents.

        A negative t is the end of a sampler's last step, see `set_alpha_to_one`. A t ≥ T gives NaN.
        """
        alphas_cumprod = self._alphas_cumprod_at(t)
        return _latent_rank(jnp.sqrt(alphas_cumprod)), _latent_rank(jnp.sqrt(1 - alphas_cumprod))

    def snr(self, t: Timesteps) -> Float[Array, "*b"]:
        """The signal-to-noise ratio α_t²/σ_t² (Kingma et al., 2021, equation 2), in the shape of ``t``."""
        alphas_cumprod = self._alphas_cumprod_at(t)
        return alphas_cumprod / (1 - alphas_cumprod)

    def add_noise(self, z0: Latents, noise: Latents, t: Timesteps) -> Latents:
        """z_t = α_t z_0 + σ_t ε (Ho et al., 2020, equation 4)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * z0 + sigma * noise

    def velocity(self, z0: Latents, noise: Latents, t: Timesteps) -> Latents:
        """The velocity v = α_t ε − σ_t z_0 (Salimans and Ho, 2022, section 4 and appendix D)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * z0

    def target(self, z0: Latents, noise: Latents, t: Timesteps) -> Latents:
        """What the network should put out at z_t: ε, v or z_0, as its `prediction_type` says."""
        match self.prediction_type:
            case "epsilon":
                return noise.astype(jnp.float32)
            case "v_prediction":
                return self.velocity(z0, noise, t)
            case "sample":
                return z0.astype(jnp.float32)

    def to_x0_eps(self, prediction: Latents, z_t: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        """x̂ and ε̂ from the network's output at z_t: `x0_eps` with α_t, σ_t and the model's `prediction_type`."""
        alpha, sigma = self.alpha_sigma(t)
        return x0_eps(prediction, z_t, alpha, sigma, self.prediction_type)

    def ddim_step(self, x0: Latents, eps: Latents, s: Timesteps) -> Latents:
        """z_s = α_s x̂ + σ_s ε̂: one deterministic step to the time s < t (Song et al., 2021, equation 12, σ = 0)."""
        return self.add_noise(x0, eps, s)

    def consistency(self, z_t: Latents, x0: Latents, t: Timesteps) -> Latents:
        """f(z_t, t) = c_skip(t) z_t + c_out(t) x̂ (Luo et al., 2023, section 4.1), see `boundary_scalings`."""
        c_skip, c_out = boundary_scalings(t, timestep_scaling=self.timestep_scaling)
        return c_skip * z_t + c_out * x0

    def _alphas_cumprod_at(self, t: Timesteps) -> Float[Array, "*b"]:
        t = jnp.asarray(t)
        last = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0]
        # Past the end an array's own indexing would repeat ᾱ_{T−1}, and nobody would notice.
        alphas_cumprod = self.alphas_cumprod.at[jnp.maximum(t, 0)].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(t < 0, last, alphas_cumprod)


def x0_eps(
    prediction: Latents, z: Latents, alpha: Float[Array, "..."], sigma: Float[Array, "..."], kind: PredictionType
) -> tuple[Latents, Latents]:
    """x̂ and ε̂ such that z = α x̂ + σ ε̂ (Salimans and Ho, 2022, section 4).

    Args:
      prediction: the network's output at z.
      z: the noisy latents.
      alpha: α, a scalar or `PerSample`. Must not be 0 where the prediction is ε.
      sigma: σ, likewise. Must not be 0 where the prediction is z_0.
      kind: what the network puts out.

    Returns:
      x̂ and ε̂, float32.
    """
    prediction, z = prediction.astype(jnp.float32), z.astype(jnp.float32)
    match kind:
        case "epsilon":
            return (z - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * z - sigma * prediction, alpha * prediction + sigma * z
        case "sample":
            return prediction, (z - alpha * prediction) / sigma


def boundary_scalings(
    t: Timesteps, sigma_data: float = SIGMA_DATA, timestep_scaling: float = 10.0
) -> tuple[PerSample, PerSample]:
    """c_skip and c_out, which make f(z, 0) = z (Song et al., 2023, equation 5; Luo et al., 2023, section 4.1).

    With τ = timestep_scaling · t:  c_skip = σ_d²/(τ² + σ_d²),  c_out = τ/√(τ² + σ_d²). The c_out of Song et al.,
    appendix C, has a factor σ_d, for a network of unit output; here it must reach 1, since x̂ is an estimate of z_0.

    Args:
      t: timesteps.
      sigma_data: σ_d.
      timestep_scaling: the factor from t to τ.

    Returns:
      c_skip and c_out, in the rank of latents.
    """
    tau = timestep_scaling * _latent_rank(jnp.asarray(t, jnp.float32))
    norm = tau**2 + sigma_data**2
    return sigma_data**2 / norm, tau / jnp.sqrt(norm)


def distillation_grid(
    num_train_timesteps: int, num_steps: int, kind: DistillationGrid = "trailing"
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The times t_n that a student is trained on, and s_n where the teacher's step from t_n ends.

    With the stride k = ⌊T/N⌋ and n = 1 … N, s_n = max(t_n − k, 0) and

    - ``"trailing"``: t_n = nk − 1, the grid of LCM (Luo et al., 2023, section 4.3);
    - ``"leading"``: t_n = (n − 1)k, the grid of CoDi's reference code. It never trains t = T − 1, and its first entry
      t = s = 0 teaches no consistency.

    Args:
      num_train_timesteps: T.
      num_steps: N. Where it does not divide T, the last T mod N times are never trained, as in LCM.
      kind: which grid.

    Returns:
      t_n and s_n, ascending.

    Raises:
      ValueError: unless 1 ≤ N ≤ T.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"A distillation grid of {num_steps} steps is impossible: choose 1 to {num_train_timesteps}, the number of "
            "timesteps that the model was trained on."
        )
    stride = num_train_timesteps // num_steps
    n = np.arange(1, num_steps + 1, dtype=np.int32)
    t = n * stride - 1 if kind == "trailing" else (n - 1) * stride
    return t, np.maximum(t - stride, 0)


def _latent_rank(x: Float[Array, "*b"]) -> PerSample:
    return x.reshape(x.shape + (1,) * (4 - x.ndim))


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with defaults filled in, and every value that the schedule depends on checked."""
    name = config.get("_class_name")
    if name not in _SCHEDULERS:
        raise ConfigError(
            f"{where}: _class_name = {name!r} is not supported; it must be one of {', '.join(_SCHEDULERS)}."
        )
    values = {**_DEFAULTS, **_SCHEDULERS[name], **config}
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
    _check_generator_timesteps(values[_GENERATOR_TIMESTEPS], T, where)
    return values


def _check_generator_timesteps(times: Any, T: int, where: str) -> None:
    if times is None:
        return
    are_integers = isinstance(times, list) and all(type(t) is int for t in times)
    if not are_integers or not times or times[0] >= T or times[-1] < 0 or np.any(np.diff(times) >= 0):
        raise ConfigError(
            f"{where}: {_GENERATOR_TIMESTEPS} = {times!r} must be timesteps of the schedule, 0 to {T - 1}, the "
            "highest first."
        )


def _checked_integer(values: Mapping[str, Any], key: str, where: str, at_least: int, at_most: int | None = None) -> int:
    value = values[key]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < at_least or (at_most is not None and value > at_most):
        limit = " or more" if at_most is None else f" to {at_most} (num_train_timesteps)"
        raise ConfigError(f"{where}: {key} = {value!r} must be an integer, {at_least}{limit}.")
    return value


def _alphas_cumprod(values: Mapping[str, Any], where: str) -> Float[np.ndarray, " T"]:
    """ᾱ_t = ∏_{i ≤ t} (1 − β_i) (Ho et al., 2020, section 2), in float64."""
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
