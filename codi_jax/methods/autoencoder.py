"""The first stage of latent diffusion: an autoencoder of images (Rombach et al., 2022, section 3.1 and appendix G).

    L = mean|x − D(z)| + β KL(q(z|x) ‖ N(0, I)),    z ~ q(z|x) = N(μ(x), σ(x)²)

The KL term is only to keep the latents from drifting: β is about 1e-6. The paper's perceptual and adversarial terms are
left out; they need networks of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, UInt8

from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import posterior, to_signed
from codi_jax.training import optim

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """What the training depends on besides parameters and data.

    Attributes:
      vae: the module.
      rec_loss: mean absolute (l1, which keeps edges sharper) or squared error (l2) of pixels in [-1, 1].
      kl_scale: β, on the divergence summed over a sample.
      ema_decay: of the moving average; ``None`` keeps none.
      accumulation: microbatches of an update.
    """

    vae: Any
    rec_loss: Literal["l1", "l2"] = "l1"
    kl_scale: float = 1e-6
    ema_decay: float | None = None
    accumulation: int = 1


def loss(params: Params, batch: Batch, key: Key[Array, ""], config: Config) -> tuple[Float[Array, ""], optim.Metrics]:
    """L, with the signal-to-noise ratio of the reconstruction in dB (of pixels in [0, 255]) as ``psnr``."""
    pixels = to_signed(batch["pixels"])
    q = posterior(config.vae, {"vae": params}, batch)
    reconstruction = config.vae.apply({"params": params}, q.sample(key), method="decode").astype(jnp.float32)
    difference = reconstruction - pixels
    mse = jnp.mean(jnp.square(difference))
    error = jnp.mean(jnp.abs(difference)) if config.rec_loss == "l1" else mse
    kl = jnp.mean(q.kl())
    return error + config.kl_scale * kl, {"kl": kl, "psnr": 10 * jnp.log10(4 / mse)}


def train_step(
    state: optim.TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
) -> tuple[optim.TrainState, optim.Metrics]:
    """One update."""
    del frozen  # nothing is

    def of_batch(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], optim.Metrics]:
        return loss(params, batch, key, config)

    return optim.step(state, of_batch, batch, optimizer, accumulation=config.accumulation, ema_decay=config.ema_decay)


def reconstruct(
    params: Params, pixels: UInt8[Array, "b hp wp 3"], config: Config
) -> tuple[UInt8[Array, "b hp wp 3"], Float[Array, "b h w c"]]:
    """Images as they come back from the mode of their latents, and those latents, not scaled."""
    z = posterior(config.vae, {"vae": params}, {"pixels": pixels}).mode()
    decoded = config.vae.apply({"params": params}, z, method="decode").astype(jnp.float32)
    return jnp.round(jnp.clip(decoded * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8), z


def scaling_factor(latents: Float[Array, "b h w c"]) -> float:
    """1 / (standard deviation of the latents), so that those that a UNet sees have about unit variance."""
    return float(1 / jax.device_get(jnp.std(latents)))
