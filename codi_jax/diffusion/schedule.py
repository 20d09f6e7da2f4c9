"""The noise schedule: what z_t is, how a network's output is read, and the times that a student is distilled on.

The notation of every file in this package: z_0 is a clean latent, ε ~ N(0, I), and for t in 0 … T−1

    z_t = α_t z_0 + σ_t ε,    α_t = √ᾱ_t,    σ_t = √(1 − ᾱ_t)                (Ho et al., 2020, equation 4).

ᾱ (`alphas_cumprod`) comes from the model's own ``scheduler_config.json``, the file that diffusers writes and reads. It
is computed in float64 on the host and kept in float32; so are x̂, ε̂ and the latents that come out of this file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.scheduler_config import (
    CLASS_KEYS,
    CONFIG_NAME,
    DEFAULTS,
    NOISE_KEYS,
    SCHEDULER_OF,
    SCHEDULERS,
    DistillationGrid,
    PredictionType,
    SamplerName,
    alphas_cumprod_of,
    read_values,
)
from codi_jax.models.config import ConfigError

Latents = Float[Array, "b h w c"]
Timesteps = Int[ArrayLike, ""] | Int[ArrayLike, " b"]
PerSample = Float[Array, "b 1 1 1"] | Float[Array, "1 1 1 1"]
"""One number for each sample, in the rank of latents; one for all of them where the timestep was a scalar."""

SIGMA_DATA = 0.5  # σ_d of the boundary scalings; no configuration file holds it

_STATIC = {"static": True}  # for JAX: part of the tree's structure, so a change recompiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise schedule of a model: a pytree with one leaf, ᾱ; everything else is static.

    Create it with `from_pretrained` or `from_config`; change it with `with_config` and `sampled`.

    Examples:
      >>> schedule = NoiseSchedule.from_pretrained("assets/avatars")
      >>> z_t = schedule.add_noise(z0, noise, t=999)

    Attributes:
      alphas_cumprod: ᾱ_0 … ᾱ_{T−1}, float32.
      prediction_type: what the network predicts.
      sampling: how to sample the model.
      config_json: the whole configuration file.
    """

    alphas_cumprod: Float[Array, " T"] | Any  # Any: jax.tree.map also makes trees of shapes or of shardings
    prediction_type: PredictionType = field(metadata=_STATIC)
    sampling: SamplingSpec = field(metadata=_STATIC)
    config_json: str = field(metadata=_STATIC, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = CONFIG_NAME) -> "NoiseSchedule":
        """Makes the schedule that a ``scheduler_config.json`` describes.

        A missing key has the default of the diffusers class that the file names, except ``clip_sample``, which is off,
        as in diffusers' Stable Diffusion pipelines. Keys that the schedule does not use are kept for `to_config`.

        Args:
          config: the parsed file.
          where: the name of the file, for messages.

        Raises:
          ConfigError: for an unknown class, an unsupported value, or an ε-prediction network on a schedule with ᾱ_{T−1}
            = 0, where ε̂ says nothing about x̂ = (z − σε̂)/α.
        """
        values = read_values(config, where)
        alphas_cumprod = alphas_cumprod_of(values, where)
        if alphas_cumprod[-1] == 0 and values["prediction_type"] == "epsilon":
            raise ConfigError(
                f"{where}: prediction_type = 'epsilon' cannot be combined with a signal of zero at the last timestep "
                f"(rescale_betas_zero_snr = {values['rescale_betas_zero_snr']!r}): set the latter to false unless the "
                "network predicts v or z_0."
            )
        return cls(
            alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
            prediction_type=values["prediction_type"],
            sampling=SamplingSpec.from_values(values),
            config_json=json.dumps(dict(config)),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NoiseSchedule":
        """Reads ``scheduler/scheduler_config.json`` from a model's folder, or ``scheduler_config.json`` directly in it.

        Raises:
          FileNotFoundError: if neither exists.
          ConfigError: if the file is not a JSON object, or as in `from_config`.
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
        """Returns the mapping that this schedule was made from, with all of its keys."""
        return json.loads(self.config_json)

    def with_config(self, **changes: Any) -> "NoiseSchedule":
        """Returns the schedule with these configuration keys changed; raises as `from_config` does.

        If ``_class_name`` changes, the keys missing from the file keep their values.
        """
        defaults = {**DEFAULTS, **SCHEDULERS[self.sampling.scheduler]} if "_class_name" in changes else {}
        kept = {key: defaults[key] for key in CLASS_KEYS if key in defaults}
        return self.from_config({**kept, **self.to_config(), **changes})

    def read_by(self, sampler: SamplerName) -> "NoiseSchedule":
        """Returns the schedule as another sampler reads the same file.

        Missing sampling keys get the defaults of the sampler's own class, not of the class that the file names, as with
        ``EulerDiscreteScheduler.from_config(pipeline.scheduler.config)``. ᾱ stays the same: the network was trained on
        it.

        Args:
          sampler: the sampler's name.
        """
        given = {key: value for key, value in self.to_config().items() if value is not None}
        values = {**DEFAULTS, **SCHEDULERS[SCHEDULER_OF[sampler]], **given}
        return replace(self, sampling=SamplingSpec.from_values(values, sampler))

    def sampled(self, sampling: SamplingSpec) -> "NoiseSchedule":
        """Returns the schedule with the same noise and a new sampling spec, which replaces the old one completely.

        Nothing of a former student's grid, scalings or times is kept, and no option of the former scheduler class.

        Args:
          sampling: from `SamplingSpec.lcm` or another of its class methods.

        Raises:
          ConfigError: as in `from_config`.
          ValueError: if the student's grid is impossible.
        """
        values = {**DEFAULTS, **SCHEDULERS[self.sampling.scheduler], **self.to_config()}
        noise = {key: values[key] for key in NOISE_KEYS}
        schedule = self.from_config({**noise, **sampling.to_config()})
        if sampling.is_of_student and sampling.timesteps is None and sampling.grid_steps is not None:
            distillation_grid(self.num_train_timesteps, sampling.grid_steps)  # or it refuses
        return schedule

    def with_many_steps(self) -> "NoiseSchedule":
        """Returns the schedule for training by denoising: unchanged, unless it is a student's.

        The scheduler of a student's teacher is not in its folder, so `SamplingSpec.many_steps` replaces it.
        """
        return self.sampled(SamplingSpec.many_steps()) if self.sampling.is_of_student else self

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.shape[0]

    def alpha_sigma(self, t: Timesteps) -> tuple[PerSample, PerSample]:
        """α_t and σ_t, in the rank of latents.

        A negative t is the end of a sampler's last step, see `SamplingSpec.set_alpha_to_one`. t ≥ T gives NaN.
        """
        alphas_cumprod = self.alphas_cumprod_at(t)
        return _latent_rank(jnp.sqrt(alphas_cumprod)), _latent_rank(jnp.sqrt(1 - alphas_cumprod))

    def snr(self, t: Timesteps) -> Float[Array, "*b"]:
        """The signal-to-noise ratio α_t²/σ_t² (Kingma et al., 2021, equation 2), in the shape of ``t``."""
        alphas_cumprod = self.alphas_cumprod_at(t)
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
        """The target of the network's output at z_t: ε, v or z_0, depending on `prediction_type`."""
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
        c_skip, c_out = boundary_scalings(t, timestep_scaling=self.sampling.timestep_scaling)
        return c_skip * z_t + c_out * x0

    def alphas_cumprod_at(self, t: Timesteps) -> Float[Array, "*b"]:
        """ᾱ_t, in the shape of ``t``; see `alpha_sigma` for times outside 0 … T−1."""
        t = jnp.asarray(t)
        last = 1.0 if self.sampling.set_alpha_to_one else self.alphas_cumprod[0]
        # Plain indexing past the end would silently repeat ᾱ_{T−1}.
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
      sigma: σ, a scalar or `PerSample`. Must not be 0 where the prediction is z_0.
      kind: what the network predicts.

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
    """The times t_n that a student is trained on, and s_n, where the teacher's step from t_n ends.

    With stride k = ⌊T/N⌋ and n = 1 … N, s_n = max(t_n − k, 0) and

    - ``"trailing"``: t_n = nk − 1, the grid of LCM (Luo et al., 2023, section 4.3);
    - ``"leading"``: t_n = (n − 1)k, the grid of CoDi's reference code. It never trains t = T − 1, and its first entry
      t = s = 0 teaches no consistency.

    Examples:
      >>> t, s = distillation_grid(1000, 4)

    Args:
      num_train_timesteps: T.
      num_steps: N. If it does not divide T, the last T mod N times are never trained, as in LCM.
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
