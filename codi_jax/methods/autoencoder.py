"""The first stage of latent diffusion: an autoencoder of images (Rombach et al., 2022, section 3.1 and appendix G).

    L = mean|r| + γ Σ_k mean|∇ r_k| + β KL(q(z|x) ‖ N(0, I)),    r = x − D(z),  z ~ q(z|x) = N(μ(x), σ(x)²)

The KL term only keeps the latents from drifting: β is about 1e-6. The paper's perceptual and adversarial terms are
omitted; they need networks of their own. Instead, γ > 0 compares gradients ∇ of the images at three scales (r_k is r,
averaged over squares of 2^k pixels, k = 0, 1, 2), as Li and Snavely (2018, section 3.2) do for depth: an edge counts
the same wherever it is, so that small details become sharp.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, UInt8

from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen, posterior, to_signed
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim
from codi_jax.training.method import Load, Method, Setup
from codi_jax.training.optim import EmaFlags, Metrics, MixedPrecision, TrainState


@dataclass(frozen=True)
class AutoencoderFlags(EmaFlags):
    """The flags of training an autoencoder."""

    rec_loss: Literal["l1", "l2"] = "l1"
    """Reconstruction error: mean absolute (keeps edges sharper) or mean squared, of pixels in [-1, 1]."""
    gradient_scale: float = 0.0
    """γ, the weight of the error of the images' gradients at three scales, which makes small details sharp."""
    kl_scale: float = 1e-6
    """Weight of the latents' divergence from a standard normal distribution, summed over a sample."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "kl_scale", "gradient_scale")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSetup(Setup):
    """Everything that the compiled step depends on besides arrays."""

    flags: AutoencoderFlags


def configure(networks: Networks, flags: AutoencoderFlags, *, remat: bool = False) -> AutoencoderSetup:
    """Trains the VAE, the only network."""
    networks = networks.recomputing("vae", remat=remat)
    return AutoencoderSetup(
        networks=networks,
        student=networks,
        trained=("vae",),
        frozen=(),
        ema_decay=flags.kept_ema_decay,
        flags=flags,
    )


def init(
    setup: AutoencoderSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step."""
    ema = setup.ema_decay is not None
    return optim.init_state(load("vae"), optimizer, key, ema=ema, mixed_precision=mixed_precision)


def loss(
    params: Params, state: TrainState, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: AutoencoderSetup
) -> tuple[Float[Array, ""], Metrics]:
    """L, with the signal-to-noise ratio of the reconstruction in dB (of pixels in [0, 255]) as ``psnr``.

    Args:
      params: the VAE's parameters.
      state: not read.
      frozen: not read.
      batch: ``pixels``.
      key: for sampling the latents.
      setup: the method's setup.
    """
    del state, frozen
    vae, flags = setup.networks.vae, setup.flags
    pixels = to_signed(batch["pixels"])
    q = posterior(vae, {"vae": params}, batch)
    reconstruction = vae.apply({"params": params}, q.sample(key), method="decode").astype(jnp.float32)
    difference = reconstruction - pixels
    mse = jnp.mean(jnp.square(difference))
    error = jnp.mean(jnp.abs(difference)) if flags.rec_loss == "l1" else mse
    if flags.gradient_scale:
        error += flags.gradient_scale * gradient_error(difference)
    kl = jnp.mean(q.kl())
    return error + flags.kl_scale * kl, {"kl": kl, "psnr": 10 * jnp.log10(4 / mse)}


def gradient_error(difference: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Σ_k mean|∇ r_k| over three scales, with the gradients of both directions."""
    total = jnp.zeros(())
    for scale in (1, 2, 4):
        b, h, w, c = difference.shape
        h, w = h // scale, w // scale
        squares = difference[:, : h * scale, : w * scale].reshape(b, h, scale, w, scale, c)
        r = squares.mean(axis=(2, 4))
        total += jnp.mean(jnp.abs(r[:, 1:] - r[:, :-1])) + jnp.mean(jnp.abs(r[:, :, 1:] - r[:, :, :-1]))
    return total


def result(state: TrainState, setup: AutoencoderSetup, load: Load) -> dict[str, Params]:
    """The VAE."""
    del setup, load
    return {"vae": state.result}


def reconstruct(
    vae: Any, params: Params, pixels: UInt8[Array, "b hp wp 3"]
) -> tuple[UInt8[Array, "b hp wp 3"], Float[Array, "b h w c"]]:
    """The images decoded from the mode of their latents, and these latents, unscaled."""
    z = posterior(vae, {"vae": params}, {"pixels": pixels}).mode()
    decoded = vae.apply({"params": params}, z, method="decode").astype(jnp.float32)
    return jnp.round(jnp.clip(decoded * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8), z


def with_scaling_factor(vae: Any, latents: Float[Array, "b h w c"]) -> Any:
    """The VAE with a scaling factor that gives its latents, as a UNet sees them, a variance of about one.

    Args:
      vae: the VAE's module.
      latents: unscaled latents, whose standard deviation is measured.
    """
    factor = float(1 / jax.device_get(jnp.std(latents)))
    return replace(vae, config=replace(vae.config, scaling_factor=factor))


METHOD = Method(flags=AutoencoderFlags, configure=configure, init=init, loss=loss, result=result)
"""The export needs the latents of held-out images, for their scale: see ``train_autoencoder_flax.py``."""
