"""Plain training of a diffusion model: what every other method here distills.

    L = w(t) mean‖F_θ(z_t, t, c) − y‖²,    z_t = α_t z_0 + σ_t ε,    t uniform in 0 … T−1

where y is ε, v or z_0, as the model's schedule says (Ho et al., 2020, equation 14; Salimans and Ho, 2022). One method
for the UNet (text to image; Rombach et al., 2022), for the UNet together with its text encoder, for an editor
(InstructPix2Pix; Brooks et al., 2023) and for a ControlNet on a frozen UNet (Zhang et al., 2023, equation 1): what is
trained is what ``params`` holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from codi_jax.diffusion.losses import min_snr_weights, mse
from codi_jax.diffusion.schedule import Latents
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Condition, Modules, drop_conditions, prepare
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim


@dataclass(frozen=True)
class Config:
    """What the training depends on besides parameters and data.

    Attributes:
      modules: of all networks.
      snr_gamma: γ of the min-SNR weights; ``None`` weighs all times alike.
      noise_offset: strength of a noise that is the same all over a channel of a sample (a help for very bright and very
        dark images: https://www.crosslabs.org/blog/diffusion-with-offset-noise).
      input_perturbation: strength of further noise on z_t alone (Ning et al., 2023).
      ema_decay: of the moving average; ``None`` keeps none.
      accumulation: microbatches of an update.
      dropout: probability of `codi_jax.pipeline.conditions.drop_conditions`, for InstructPix2Pix.
    """

    modules: Modules
    snr_gamma: float | int | None = None
    noise_offset: float | int = 0.0
    input_perturbation: float | int = 0.0
    ema_decay: float | None = None
    accumulation: int = 1
    dropout: float | int = 0.0


class Task(NamedTuple):
    """What a network is asked, and what it should answer.

    Attributes:
      z_t: noisy latents.
      t: one time for each.
      condition: one for each.
      target: y.
      weights: w(t).
    """

    z_t: Latents
    t: Int[Array, " b"]
    condition: Condition
    target: Latents
    weights: Float[Array, " b"]

    def distance(self, prediction: Latents) -> Float[Array, ""]:
        """L of an answer, as a mean over the batch."""
        return jnp.mean(self.weights * mse(prediction, self.target))


def draw(networks: Mapping[str, Any], batch: Batch, key: Key[Array, ""], config: Config) -> Task:
    """Latents, times and noise.

    Args:
      networks: parameters by name, and ``schedule``; the null text where conditions are dropped.
      batch: see `codi_jax.pipeline.conditions.prepare`.
      key: of latents, times and noise.
      config: the configuration.
    """
    latents_key, time_key, noise_key, offset_key, perturbation_key = jax.random.split(key, 5)
    schedule = networks["schedule"]
    inputs = prepare(config.modules, networks, batch, latents_key)
    if config.dropout:
        inputs = drop_conditions(inputs, jax.random.fold_in(key, 5), config.dropout)
    z0 = inputs.z0
    t = jax.random.randint(time_key, (len(z0),), 0, schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, z0.shape)
    offset = jax.random.normal(offset_key, (len(z0), 1, 1, z0.shape[-1]))
    noise = noise + config.noise_offset * offset
    perturbation = config.input_perturbation * jax.random.normal(perturbation_key, z0.shape)
    z_t = schedule.add_noise(z0, noise + perturbation, t)
    weights = min_snr_weights(schedule.snr(t), config.snr_gamma, schedule.prediction_type)
    return Task(z_t, t, inputs.cond, schedule.target(z0, noise, t), weights)


def loss(
    params: Mapping[str, Params], frozen: Mapping[str, Any], batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], optim.Metrics]:
    """L, without further metrics.

    Args:
      params: of the networks that are trained, by name.
      frozen: of the others, and what else `draw` needs.
      batch: see `draw`.
      key: likewise.
      config: the configuration.
    """
    networks = {**frozen, **params}
    task = draw(networks, batch, key, config)
    return task.distance(predict(config.modules, networks, task.z_t, task.t, task.condition)), {}


def train_step(
    state: optim.TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
) -> tuple[optim.TrainState, optim.Metrics]:
    """One update of the parameters by name."""
    return optim.step(
        state,
        lambda params, batch, key: loss(params, frozen, batch, key, config),
        batch,
        optimizer,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
    )
