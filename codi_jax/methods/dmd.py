"""DMD: distribution matching distillation (Yin et al., 2024, arXiv:2311.18828), the losses of generator and fake score.

A generator's x (see `codi_jax.methods.generator`) is moved toward the distribution of a target score θ and away from
its own, whose score is a network φ that is trained alongside. At x_t = α_t x + σ_t ε,

    g   = (x̂_φ(x_t) − x̂_θ(x_t)) / mean|x − x̂_θ(x_t)|     (equations 7 and 8; mean per sample)
    L_G = ½ mean‖x − sg(x − g)‖²
    L_φ = mean‖F_φ(x_t, t) − y‖²,  y = ε, v or x           (equation 6: denoising of sg(x))

θ is guided, φ is not. From DMD2 (Yin et al., 2024, arXiv:2405.14867): several steps of φ per step of G, and a GAN loss
on φ's lowest features, the only part that needs real images.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from codi_jax.diffusion import losses
from codi_jax.diffusion.guidance import Guidance, is_guided
from codi_jax.diffusion.schedule import Latents
from codi_jax.methods.generator import Generator, GeneratorFlags
from codi_jax.models.config import Params
from codi_jax.models.discriminator import DiscriminatorHead
from codi_jax.pipeline.conditions import Batch, Condition, Frozen, Inputs, prepare
from codi_jax.pipeline.prediction import predict, predict_with_intermediates
from codi_jax.training.method import Setup
from codi_jax.training.optim import EmaFlags, Metrics


@dataclass(frozen=True)
class DmdFlags(GeneratorFlags, EmaFlags):
    """The flags of distribution matching, named as in DMD2's reference code.

    The moving average is the generator's.
    """

    real_guidance_scale: float = 6.0
    """Guidance scale of the target; 8 for SDXL. 1 or less is no guidance."""
    real_image_guidance_scale: float = 1.5
    """Image guidance scale, for an InstructPix2Pix target. Less than 1 is no guidance at all."""
    fake_guidance_scale: float = 1.0
    """Guidance scale of the fake score when compared with the target. 1 or less is no guidance."""
    dfake_gen_update_ratio: int = 1
    """Steps of the fake score per step of the generator; 5 in the recipes for full-size models."""
    min_step_percent: float = 0.02
    """The least noisy time at which the two scores are compared, as a fraction of all times."""
    max_step_percent: float = 0.98
    """The noisiest time at which they are compared, as a fraction."""
    dm_loss_weight: float = 1.0
    """Weight of the distribution matching loss."""
    cls_on_clean_image: bool = False
    """Train a head on the fake score's features to tell real images from generated ones; needs real images."""
    gen_cls_loss: bool = False
    """Also train the generator against that head: the GAN loss."""
    gen_cls_loss_weight: float = 5e-3
    """Weight of the generator's GAN loss."""
    guidance_cls_loss_weight: float = 1e-2
    """Weight of the head's loss."""
    diffusion_gan: bool = False
    """Show the head noised images."""
    diffusion_gan_max_timestep: int = 1000
    """Upper limit (exclusive) of their noise's time."""
    gan_alone: bool = False
    """Train the generator with the GAN loss only."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "dfake_gen_update_ratio", "diffusion_gan_max_timestep")
        self.require_at_least(0, "real_guidance_scale", "real_image_guidance_scale", "fake_guidance_scale")
        self.require_at_least(0, "dm_loss_weight", "gen_cls_loss_weight", "guidance_cls_loss_weight")
        self.require_in(0, 1, "min_step_percent", "max_step_percent")
        high = self.max_step_percent
        self.require("min_step_percent", self.min_step_percent <= high, f"at most --max_step_percent {high}")
        needs = {
            "gen_cls_loss": "cls_on_clean_image", "gan_alone": "gen_cls_loss", "diffusion_gan": "cls_on_clean_image",
        }  # fmt: skip
        for flag, other in needs.items():
            if getattr(self, flag) and not getattr(self, other):
                raise ValueError(f"--{flag} is of no use without --{other}: give both, or neither.")

    @property
    def needs_images(self) -> bool:
        """Whether the data must have real images in addition to prompts."""
        return self.cls_on_clean_image or (self.denoising and not self.backward_simulation)


@dataclass(frozen=True, kw_only=True)
class DmdSetup(Setup):
    """Everything that the losses depend on besides arrays.

    Attributes:
      flags: the method's flags.
      generator: the generator, whose networks all three scores share.
    """

    flags: DmdFlags
    generator: Generator

    @property
    def head(self) -> DiscriminatorHead:
        """The head of the GAN loss."""
        unet = self.networks.unet
        return DiscriminatorHead(unet.config.block_out_channels[-1], unet.dtype)


def generator_loss(
    params: Params, fake: Params, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: DmdSetup
) -> tuple[Float[Array, ""], Metrics]:
    """L_G, and the GAN loss; a mean over the batch.

    Args:
      params: G's parameters.
      fake: φ's parameters, which get no gradient here.
      frozen: the teacher with the null text, whose ``unet`` a LoRA adapts; its ``target`` is θ.
      batch: see `prepare`; has real images only for the GAN loss or a generator that starts from them.
      key: for all randomness.
      setup: the method's setup.
    """
    flags = setup.flags
    inputs_key, x_key, matching_key, logits_key = jax.random.split(key, 4)
    inputs = prepare(setup.networks, frozen.params, batch, inputs_key, frozen.null_text)
    x = setup.generator(params, frozen, inputs, x_key)
    value = jnp.float32(0)
    if not flags.gan_alone:
        g = jax.lax.stop_gradient(matching_gradient(fake, frozen, x, inputs, matching_key, setup))
        value += flags.dm_loss_weight * 0.5 * jnp.mean(losses.mse(x, jax.lax.stop_gradient(x - g)))
    if flags.gen_cls_loss:
        logits = _logits(fake, frozen, x, inputs.conditions.full, logits_key, setup)
        value += flags.gen_cls_loss_weight * jnp.mean(jax.nn.softplus(-logits))
    return value, {}


def matching_gradient(
    fake: Params, frozen: Frozen, x: Latents, inputs: Inputs, key: Key[Array, ""], setup: DmdSetup
) -> Latents:
    """The direction g from the generator's distribution to the target's at x.

    Not finite where x = x̂_θ exactly: the step is then counted as skipped instead of passing as one with zero gradient.
    """
    networks, flags, schedule = setup.networks, setup.flags, frozen.schedule
    B, T = len(x), schedule.num_train_timesteps
    t_key, noise_key = jax.random.split(key)
    low, high = int(flags.min_step_percent * T), min(int(flags.max_step_percent * T), T - 1)
    t = jax.random.randint(t_key, (B,), low, high + 1)
    x_t = schedule.add_noise(x, jax.random.normal(noise_key, x.shape), t)

    def output(unet: Params, scale: float, image_scale: float) -> Latents:
        guidance = _guidance(B, scale, image_scale if networks.is_instruct_pix2pix else None)
        return predict(networks, {**frozen.params, "unet": unet}, x_t, t, inputs.conditions, guidance)

    assert frozen.target is not None
    target = output(frozen.target, flags.real_guidance_scale, flags.real_image_guidance_scale)
    difference = output(fake["unet"], flags.fake_guidance_scale, 1.0) - target
    # x̂ is linear in z and the output, so x̂_φ − x̂_θ is x̂ of the difference at z = 0. Subtracting the two would lose
    # most float32 precision at noisy times, where both are (z − σε̂)/α with a small α.
    distance, _ = schedule.to_x0_eps(difference, jnp.zeros_like(x_t), t)
    x0, _ = schedule.to_x0_eps(target, x_t, t)
    return distance / jnp.mean(jnp.abs(x - x0), axis=(1, 2, 3), keepdims=True)


def _guidance(batch: int, scale: float, image_scale: float | None) -> Guidance:
    """Guidance with the same scales for all samples; ``image_scale`` is ``None`` for a model without a source image."""
    if not is_guided(scale, 1 if image_scale is None else image_scale):
        return Guidance.none()
    s_T = jnp.full(batch, scale, jnp.float32)
    if image_scale is None:
        return Guidance.classifier_free(s_T)
    return Guidance.edit(s_T, jnp.full(batch, image_scale, jnp.float32))


def fake_loss(
    params: Params, generator: Params, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: DmdSetup
) -> tuple[Float[Array, ""], Metrics]:
    """L_φ, and the head's loss; a mean over the batch.

    Args:
      params: φ's parameters.
      generator: G's parameters, which get no gradient here.
      frozen: as in `generator_loss`.
      batch: as in `generator_loss`.
      key: for all randomness.
      setup: the method's setup.
    """
    networks, schedule = setup.networks, frozen.schedule
    inputs_key, x_key, t_key, noise_key, logits_key = jax.random.split(key, 5)
    inputs = prepare(networks, frozen.params, batch, inputs_key, frozen.null_text)
    x = jax.lax.stop_gradient(setup.generator(generator, frozen, inputs, x_key))
    t = jax.random.randint(t_key, (len(x),), 0, schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, x.shape)
    x_t = schedule.add_noise(x, noise, t)
    prediction = predict(networks, {**frozen.params, "unet": params["unet"]}, x_t, t, inputs.conditions)
    value = jnp.mean(losses.mse(prediction, schedule.target(x, noise, t)))
    if "head" not in params:
        return value, {}
    real_key, generated_key = jax.random.split(logits_key)
    real = _logits(params, frozen, inputs.z0, inputs.conditions.full, real_key, setup)
    generated = _logits(params, frozen, x, inputs.conditions.full, generated_key, setup)
    classification = jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(generated))
    return value + setup.flags.guidance_cls_loss_weight * classification, {"classification": classification}


def _logits(
    fake: Params, frozen: Frozen, x: Latents, cond: Condition, key: Key[Array, ""], setup: DmdSetup
) -> Float[Array, " b"]:
    """The logits of φ's head for x being real; at random times if the GAN sees noised images."""
    t_key, noise_key = jax.random.split(key)
    t = jnp.zeros(len(x), jnp.int32)
    if setup.flags.diffusion_gan:
        schedule = frozen.schedule
        high = min(setup.flags.diffusion_gan_max_timestep, schedule.num_train_timesteps)
        t = jax.random.randint(t_key, t.shape, 0, high)
        x = schedule.add_noise(x, jax.random.normal(noise_key, x.shape), t)
    _, intermediates = predict_with_intermediates(setup.networks, {"unet": fake["unet"]}, x, t, cond)
    config = setup.networks.unet.config
    lowest = intermediates["mid_block" if config.mid_block_type is not None else f"down_blocks_{config.num_blocks - 1}"]
    logits: Any = setup.head.apply({"params": fake["head"]}, lowest)
    return logits
