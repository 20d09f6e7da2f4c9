"""Plain training of a diffusion model, the teacher of every other method here.

    L = w(t) mean‖F_θ(z_t, t, c) − y‖²,    z_t = α_t z_0 + σ_t ε,    t uniform in 0 … T−1

where y is ε, v or z_0, depending on the model's schedule (Ho et al., 2020, equation 14; Salimans and Ho, 2022). One
method for the UNet (text to image; Rombach et al., 2022), for the UNet together with its text encoder, for an editor
(InstructPix2Pix; Brooks et al., 2023) and for a ControlNet on a frozen UNet (Zhang et al., 2023, equation 1): it trains
whatever ``params`` holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.losses import min_snr_weights, mse
from codi_jax.diffusion.schedule import Latents, NoiseSchedule
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Conditions, Frozen, drop_conditions, prepare
from codi_jax.pipeline.networks import (
    Networks,
    add_controlnet,
    init_controlnet,
    refuse_guidance_input,
    require_instruct_pix2pix,
    widen_params,
    widen_unet,
)
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim
from codi_jax.training.method import Load, Method, Setup
from codi_jax.training.optim import EmaFlags, Metrics, MixedPrecision, TrainState


@dataclass(frozen=True)
class DenoisingFlags(EmaFlags):
    """The flags of plain training, whatever is trained."""

    snr_gamma: float | None = None
    """Gamma of the loss's min-SNR weights, usually 5. Default: no weights. For a model that predicts v, they leave the
    noisiest times almost untrained."""
    ema_decay: float = 0.9999
    """Decay of the moving average of --use_ema, per update."""

    def check(self) -> None:
        super().check()
        self.require_positive("snr_gamma")

    @property
    def noise(self) -> "NoiseOptions":
        """Changes to z_t's noise, beyond the schedule."""
        return NoiseOptions()

    @property
    def dropout(self) -> float:
        """The probability of `codi_jax.pipeline.conditions.drop_conditions`, for edits."""
        return 0.0


class NoiseOptions(NamedTuple):
    """Changes to the noise.

    Attributes:
      offset: strength of noise that is constant over each channel of a sample (helps with very bright and very dark
        images: https://www.crosslabs.org/blog/diffusion-with-offset-noise).
      perturbation: strength of additional noise on z_t only (Ning et al., 2023).
    """

    offset: float = 0.0
    perturbation: float = 0.0


@dataclass(frozen=True)
class NoiseFlags(DenoisingFlags):
    """Flags for the noise and the network's prediction type."""

    noise_offset: float = 0.0
    """Strength of noise that is constant over each channel."""
    input_perturbation: float = 0.0
    """Strength of additional noise on the network's input."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the trained network predicts. Default: from the model's scheduler."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "noise_offset", "input_perturbation")

    @property
    def noise(self) -> NoiseOptions:
        return NoiseOptions(self.noise_offset, self.input_perturbation)


@dataclass(frozen=True)
class TextToImageFlags(NoiseFlags):
    """The flags of training a text-to-image model."""

    train_text_encoder: bool = False
    """Train the text encoder too."""


@dataclass(frozen=True)
class DropoutFlags(Flags):
    """The flag that guidance of edits needs."""

    conditioning_dropout_prob: float = 0.0
    """Probability p of each of training without the instruction, without the image, and without both; 0.05 is usual for
    teachers, whose guidance needs it."""

    def check(self) -> None:
        super().check()
        self.require("conditioning_dropout_prob", 0 <= self.conditioning_dropout_prob <= 1 / 3, "between 0 and 1/3")


@dataclass(frozen=True)
class EditFlags(DenoisingFlags, DropoutFlags):
    """The flags of training InstructPix2Pix."""

    @property
    def dropout(self) -> float:
        return self.conditioning_dropout_prob


@dataclass(frozen=True, kw_only=True)
class DenoisingSetup(Setup):
    """Everything that the compiled step depends on besides arrays."""

    flags: DenoisingFlags
    starts_from_given: bool = True


def many_steps(schedule: NoiseSchedule, flags: DenoisingFlags) -> NoiseSchedule:
    """The schedule for training a UNet at all times, even if it was distilled for few steps."""
    del flags
    return schedule.with_many_steps()


def sampling(schedule: NoiseSchedule, flags: NoiseFlags) -> NoiseSchedule:
    """`many_steps`, for a network that predicts what the flags say.

    Raises:
      ConfigError: if the network cannot predict that on this schedule.
    """
    if flags.prediction_type is not None:
        schedule = schedule.with_config(prediction_type=flags.prediction_type)
    return schedule.with_many_steps()


def configure(
    networks: Networks, flags: DenoisingFlags, *, trained: tuple[str, ...] = ("unet",), remat: bool = False, **more: Any
) -> DenoisingSetup:
    """Trains these networks and freezes the others.

    Raises:
      ValueError: if the UNet takes its guidance as an input.
    """
    refuse_guidance_input(
        networks.unet,
        "which plain training does not give it: start from the model that it was distilled from, or bake a scale in",
    )
    networks = networks.recomputing(*trained, remat=remat)
    return DenoisingSetup(
        networks=networks,
        student=networks,
        trained=trained,
        frozen=tuple(name for name in networks.by_name() if name not in trained),
        ema_decay=flags.kept_ema_decay,
        flags=flags,
        **more,
    )


def configure_text_to_image(networks: Networks, flags: TextToImageFlags, *, remat: bool = False) -> DenoisingSetup:
    """Trains the UNet, and the text encoder if the flags say so."""
    trained = ("unet", "text_encoder") if flags.train_text_encoder else ("unet",)
    return configure(networks, flags, trained=trained, remat=remat)


def configure_controlnet(networks: Networks, flags: DenoisingFlags, *, remat: bool = False) -> DenoisingSetup:
    """Trains a ControlNet on the frozen UNet: the model's, or a new one."""
    is_given = networks.controlnet is not None
    networks = networks if is_given else add_controlnet(networks)
    return configure(networks, flags, trained=("controlnet",), remat=remat, starts_from_given=is_given)


def configure_edit(networks: Networks, flags: EditFlags, *, remat: bool = False) -> DenoisingSetup:
    """Trains an InstructPix2Pix UNet: the model's, or a text-to-image model's UNet, widened.

    Raises:
      ValueError: if the model is for another task.
    """
    is_given = networks.task != "text-to-image"
    if not is_given:
        networks = replace(networks, unet=widen_unet(networks.unet))
    require_instruct_pix2pix(networks, "--pretrained_model_name_or_path")
    return configure(networks, flags, remat=remat, starts_from_given=is_given, needs_null_text=True)


def init(
    setup: DenoisingSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step: the networks as they are, a new ControlNet, or a UNet with more inputs."""
    if setup.starts_from_given:
        params = {name: load(name) for name in setup.trained}
    elif "controlnet" in setup.trained:
        params = {"controlnet": init_controlnet(setup.networks, load("unet"), jax.random.fold_in(key, 0))}
    else:
        params = {"unet": widen_params(load("unet"))}
    ema = setup.ema_decay is not None
    return optim.init_state(params, optimizer, key, ema=ema, mixed_precision=mixed_precision)


class DenoisingTask(NamedTuple):
    """A network's inputs, and the target of its output.

    Attributes:
      z_t: noisy latents.
      t: one time per sample.
      conditions: the samples' conditions.
      target: y.
      weights: w(t).
    """

    z_t: Latents
    t: Int[Array, " b"]
    conditions: Conditions
    target: Latents
    weights: Float[Array, " b"]

    def distance(self, prediction: Latents) -> Float[Array, ""]:
        """L of an output, as a mean over the batch."""
        return jnp.mean(self.weights * mse(prediction, self.target))


def draw(
    params: Mapping[str, Any], frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: DenoisingSetup
) -> DenoisingTask:
    """Draws latents, times and noise.

    Args:
      params: the parameters of all networks that encode the batch, by name.
      frozen: provides the schedule, and the null text if conditions are dropped.
      batch: see `codi_jax.pipeline.conditions.prepare`.
      key: for latents, times and noise.
      setup: the method's setup.
    """
    latents_key, time_key, noise_key, offset_key, perturbation_key = jax.random.split(key, 5)
    flags, schedule = setup.flags, frozen.schedule
    inputs = prepare(setup.networks, params, batch, latents_key, frozen.null_text)
    if flags.dropout:
        inputs = drop_conditions(inputs, jax.random.fold_in(key, 5), flags.dropout)
    z0 = inputs.z0
    t = jax.random.randint(time_key, (len(z0),), 0, schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, z0.shape)
    offset = jax.random.normal(offset_key, (len(z0), 1, 1, z0.shape[-1]))
    noise = noise + flags.noise.offset * offset
    perturbation = flags.noise.perturbation * jax.random.normal(perturbation_key, z0.shape)
    z_t = schedule.add_noise(z0, noise + perturbation, t)
    weights = min_snr_weights(schedule.snr(t), flags.snr_gamma, schedule.prediction_type)
    return DenoisingTask(z_t, t, inputs.conditions, schedule.target(z0, noise, t), weights)


def loss(
    params: Mapping[str, Params],
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: Key[Array, ""],
    setup: DenoisingSetup,
) -> tuple[Float[Array, ""], Metrics]:
    """L, without further metrics.

    Args:
      params: the trained networks' parameters, by name.
      state: not read.
      frozen: the other networks, and the schedule.
      batch: see `draw`.
      key: for all randomness.
      setup: the method's setup.
    """
    del state
    everything = {**frozen.params, **params}
    task = draw(everything, frozen, batch, key, setup)
    return task.distance(predict(setup.networks, everything, task.z_t, task.t, task.conditions)), {}


TEXT_TO_IMAGE = Method(
    flags=TextToImageFlags, sampling=sampling, configure=configure_text_to_image, init=init, loss=loss
)
"""The UNet of a text-to-image model, and its text encoder."""
CONTROLNET = Method(flags=DenoisingFlags, configure=configure_controlnet, init=init, loss=loss)
"""A ControlNet, which does not change how its UNet is sampled."""
INSTRUCT_PIX2PIX = Method(flags=EditFlags, sampling=many_steps, configure=configure_edit, init=init, loss=loss)
"""The UNet of an InstructPix2Pix model."""
