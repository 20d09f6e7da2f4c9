"""LCM: latent consistency distillation (Luo et al., 2023, arXiv:2310.04378, algorithm 1).

A model with guidance becomes a student with one pass per step and 1 to 8 steps, which takes the guidance weight w as an
input. At a time t = t_n of an N-step DDIM grid, with s the time before it,

    x̂, ε̂ = the frozen teacher's at z_t, guided by w                  (two passes; three if the image has a weight)
    ẑ_s   = α_s x̂ + σ_s ε̂                                            (one DDIM step, of length T/N)
    L     = mean d(f_θ(z_t, t, w), sg f_θ⁻(ẑ_s, s, w))

with f(z, t) = c_skip(t) z + c_out(t) x̂(z, t), d the squared or the pseudo-Huber distance, and θ⁻ the moving average of
θ. θ starts as the teacher, with zeros for the projection of w's embedding, so the student starts as the teacher too.

w is the guidance scale *minus one*: x̂ = x̂_c + w (x̂_c − x̂_u). For InstructPix2Pix u has neither text nor image; with
``w_image_min`` and ``w_image_max`` the image has its own weight, and x̂ = x̂_u + s_I (x̂_i − x̂_u) + s_T (x̂_c − x̂_i)
with s = w + 1 (Brooks et al., 2023, equation 3). This is an extension of this project. A sample whose image is dropped
has none in any branch, so there x̂_i is x̂_u.

LCM-LoRA (Luo et al., 2023, arXiv:2311.05556): θ is a LoRA on the teacher, w is not an input, and θ⁻ is θ.

Unlike in CoDi, its neighbor, guidance is distilled, and no condition is learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from codi_jax.cli.flags import Adjustable, Flags
from codi_jax.diffusion import losses
from codi_jax.diffusion.guidance import Guidance
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, distillation_grid
from codi_jax.methods.baking import bake_guidance
from codi_jax.methods.denoising import DropoutFlags
from codi_jax.models.config import Params
from codi_jax.models.lora import LARGEST_RANK, init_lora, merge_lora
from codi_jax.pipeline.conditions import Batch, Conditions, Frozen, drop_conditions, prepare
from codi_jax.pipeline.networks import Networks, refuse_guidance_input, require_instruct_pix2pix
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim
from codi_jax.training.method import Export, Load, Method, Setup
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState


@dataclass(frozen=True)
class LcmFlags(Flags):
    """The flags of LCM."""

    w_min: float = 3.0
    """The lowest guidance weight: the guidance scale minus 1."""
    w_max: float = 15.0
    """The highest guidance weight."""
    w_image_min: float | None = None
    """The lowest weight of the image guidance (its scale minus 1), to distill it as a second input. Default: text and
    image have the same weight."""
    w_image_max: float | None = None
    """The highest weight of the image guidance."""
    num_ddim_timesteps: int = 50
    """N, the number of times on the grid that the student is trained and sampled on."""
    loss_type: Literal["l2", "huber"] = "l2"
    """The distance: squared, or pseudo-Huber."""
    huber_c: float = 0.001
    """Where the pseudo-Huber distance turns from quadratic to linear."""
    ema_decay: float = 0.95
    """Decay of the moving average, which is the target."""
    timestep_scaling_factor: float = 10.0
    """The factor on time in the boundary scalings."""
    unet_time_cond_proj_dim: int = 256
    """Width of the embedding of a guidance weight."""
    bake_guidance_scale: Adjustable[float | None] = None
    """Fold this guidance scale into the exported weights, exactly. diffusers' InstructPix2Pix and text-to-image
    pipelines, which never pass guidance to the network, then give correct images: call them with guidance_scale=1."""
    bake_image_guidance_scale: Adjustable[float | None] = None
    """The same for the image guidance of a student that takes it."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "w_min", "w_image_min")
        self.require("w_min", self.w_min <= self.w_max, f"at most --w_max {self.w_max}")
        if (self.w_image_min is None) != (self.w_image_max is None):
            raise ValueError("--w_image_min and --w_image_max go together: give both, or neither.")
        if self.w_image_min is not None and self.w_image_max is not None:
            self.require(
                "w_image_min", self.w_image_min <= self.w_image_max, f"at most --w_image_max {self.w_image_max}"
            )
        self.require_at_least(1, "num_ddim_timesteps")
        self.require("huber_c", self.huber_c > 0, "positive")
        self.require("timestep_scaling_factor", self.timestep_scaling_factor > 0, "positive")
        self.require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        dim = self.unet_time_cond_proj_dim
        self.require("unet_time_cond_proj_dim", 4 <= dim <= 2**14 and dim % 2 == 0, "an even number from 4 to 16384")
        self.require_at_least(0, "bake_guidance_scale", "bake_image_guidance_scale")
        if self.bake_guidance_scale is not None:
            takes_both = self.bake_image_guidance_scale is not None
            what = "given if, and only if, --w_image_min and --bake_guidance_scale are"
            self.require("bake_image_guidance_scale", takes_both == self.weighs_image, what)

    @property
    def weighs_image(self) -> bool:
        """Whether the image has its own guidance weight."""
        return self.w_image_min is not None

    @property
    def lora(self) -> "LoraShape | None":
        """The LoRA that is trained instead of the full UNet."""
        return None

    @property
    def dropout(self) -> float:
        """The probability of `codi_jax.pipeline.conditions.drop_conditions`, for edits."""
        return 0.0


@dataclass(frozen=True)
class LoraShape:
    """The arguments of `codi_jax.models.lora.init_lora`."""

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LcmTextFlags(LcmFlags):
    """The flags of LCM for text-to-image models, which can train a LoRA instead of the UNet."""

    use_lora: bool = False
    """Train a LoRA instead of the UNet (LCM-LoRA): it takes no guidance weights, so sample it with guidance 1."""
    lora_rank: int = 64
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """The LoRA's factor is alpha / rank. Default: the rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Name suffixes of the layers that the LoRA adapts, as in diffusers: to_q, ff.net.2. Default: attention,
    feed-forward and convolutions."""

    def check(self) -> None:
        super().check()
        self.require_in(1, LARGEST_RANK, "lora_rank")
        self.require_positive("lora_alpha")

    @property
    def lora(self) -> LoraShape | None:
        if not self.use_lora:
            return None
        return LoraShape(self.lora_rank, self.lora_alpha, self.lora_target_modules or None)


@dataclass(frozen=True)
class LcmEditFlags(LcmFlags, DropoutFlags):
    """The flags of LCM for InstructPix2Pix."""

    @property
    def dropout(self) -> float:
        return self.conditioning_dropout_prob


@dataclass(frozen=True, kw_only=True)
class LcmSetup(Setup):
    """Everything that the compiled step depends on besides arrays; created by `configure`."""

    flags: LcmFlags


def sampling(schedule: NoiseSchedule, flags: LcmFlags) -> NoiseSchedule:
    """The schedule to train with and to save with the student: the teacher's noise, for the LCM sampler.

    Raises:
      ValueError: if the grid is impossible.
    """
    return schedule.sampled(SamplingSpec.lcm(flags.num_ddim_timesteps, flags.timestep_scaling_factor))


def configure(networks: Networks, flags: LcmFlags, *, remat: bool = False) -> LcmSetup:
    """Gives the student its embedding of guidance weights, unless it is a LoRA.

    Raises:
      ValueError: if the teacher already has one, or an image weight is requested without an image or for a LoRA.
    """
    unet = networks.unet
    refuse_guidance_input(unet, "so it has been distilled already: give the model that it was distilled from")
    if flags.weighs_image and not networks.is_instruct_pix2pix:
        raise ValueError("--w_image_min is for InstructPix2Pix models, but the teacher takes no image: omit it.")
    if flags.lora is not None:
        if flags.weighs_image:
            raise ValueError("--w_image_min is of no use to a LoRA, which takes no guidance weights: omit it.")
        # A LoRA finds layers by name, and scanned layers have no names.
        student = replace(unet, scan_layers=False, remat=remat)
    else:
        widths = 2 if flags.weighs_image else 1
        dim = widths * flags.unet_time_cond_proj_dim
        config = replace(unet.config, time_cond_proj_dim=dim, embeds_image_guidance=flags.weighs_image)
        student = replace(unet, config=config, remat=remat)
    return LcmSetup(
        networks=networks,
        student=replace(networks, unet=student),
        trained=("unet",),
        frozen=tuple(networks.by_name()),
        needs_null_text=True,
        ema_decay=None if flags.lora is not None else flags.ema_decay,
        flags=flags,
    )


def configure_for_text(networks: Networks, flags: LcmFlags, *, remat: bool = False) -> LcmSetup:
    """`configure`, for text-to-image models only, with or without a ControlNet."""
    if networks.task == "edit":
        raise ValueError(
            "the teacher is an InstructPix2Pix model: distill it with train_lcm_distil_instruct_pix2pix_sdxl.py."
        )
    if networks.task != "text-to-image":
        raise ValueError(f"the teacher is for the task {networks.task!r}, which LCM is not implemented for.")
    return configure(networks, flags, remat=remat)


def configure_for_edits(networks: Networks, flags: LcmFlags, *, remat: bool = False) -> LcmSetup:
    """`configure`, for InstructPix2Pix models only."""
    require_instruct_pix2pix(networks, "--pretrained_teacher_model")
    return configure(networks, flags, remat=remat)


def init_student(student: Any, teacher_params: Params) -> Params:
    """The teacher's parameters, and zeros for the projection of the embedding of guidance weights.

    Args:
      student: the module of the student's UNet.
      teacher_params: the parameters of the teacher's UNet.
    """
    wanted = student.abstract_params()["time_embedding"]
    time_embedding = {"cond_proj": jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), wanted["cond_proj"])}
    return {**teacher_params, "time_embedding": {**teacher_params["time_embedding"], **time_embedding}}


def init(
    setup: LcmSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step: θ and, unless it is a LoRA, θ⁻.

    Raises:
      WeightsError: if the LoRA is impossible.
    """
    lora = setup.flags.lora
    if lora is not None:
        lora_key, key = jax.random.split(key)
        shapes = setup.networks.unet.abstract_params()
        params = {"unet_lora": init_lora(lora_key, shapes, lora.rank, lora.alpha, lora.target_modules)}
    else:
        params = {"unet": init_student(setup.student.unet, load("unet"))}
    return optim.init_state(params, optimizer, key, ema=lora is None, mixed_precision=mixed_precision)


class TeacherStep(NamedTuple):
    """One DDIM step of the guided teacher, from t = t_n to s, the time before it on the grid.

    Attributes:
      z_t: noisy latents of the data.
      t: the times of z_t.
      z_s: ẑ_s.
      s: the times of ẑ_s.
      n: the indices of t on the grid, from 0.
      conditions: the samples' conditions.
      guidance: the student's guidance.
    """

    z_t: Latents
    t: Int[Array, " b"]
    z_s: Latents
    s: Int[Array, " b"]
    n: Int[Array, " b"]
    conditions: Conditions
    guidance: Guidance


def teacher_step(frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: LcmSetup) -> TeacherStep:
    """Draws latents, times, noise and guidance weights, and takes the teacher's step: ẑ_s = α_s x̂ + σ_s ε̂.

    Args:
      frozen: the teacher with the null text.
      batch: see `codi_jax.pipeline.conditions.prepare`.
      key: for all randomness.
      setup: the method's setup.
    """
    flags, schedule = setup.flags, frozen.schedule
    z0_key, drop_key, n_key, noise_key, w_key, w_image_key = jax.random.split(key, 6)
    inputs = prepare(setup.networks, frozen.params, batch, z0_key, frozen.null_text)
    if flags.dropout:
        inputs = drop_conditions(inputs, drop_key, flags.dropout)
    z0, c, B = inputs.z0, inputs.conditions, len(inputs.z0)
    n = jax.random.randint(n_key, (B,), 0, flags.num_ddim_timesteps)
    grid = distillation_grid(schedule.num_train_timesteps, flags.num_ddim_timesteps)
    t, s = (jnp.asarray(times)[n] for times in grid)
    z_t = schedule.add_noise(z0, jax.random.normal(noise_key, z0.shape), t)
    w = jax.random.uniform(w_key, (B,), minval=flags.w_min, maxval=flags.w_max)
    w_image = None
    if flags.w_image_min is not None and flags.w_image_max is not None:
        w_image = jax.random.uniform(w_image_key, (B,), minval=flags.w_image_min, maxval=flags.w_image_max)
    # w is the guidance scale minus one.
    of_teacher = Guidance.classifier_free(w + 1) if w_image is None else Guidance.edit(w + 1, w_image + 1)
    of_student = Guidance.none() if flags.lora is not None else Guidance.embedded(w, w_image)
    x0, eps = schedule.to_x0_eps(predict(setup.networks, frozen.params, z_t, t, c, of_teacher), z_t, t)
    return TeacherStep(z_t, t, schedule.ddim_step(x0, eps, s), s, n, c, of_student)


def loss(
    params: Params, state: TrainState, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: LcmSetup
) -> tuple[Float[Array, ""], Metrics]:
    """The loss at the top of this file, as a mean over the batch; no further metrics.

    Args:
      params: θ: ``unet``, or ``unet_lora``.
      state: its ``ema`` is θ⁻.
      frozen: the teacher with the null text, and the schedule of `sampling`.
      batch: see `codi_jax.pipeline.conditions.prepare`.
      key: for all randomness.
      setup: the method's setup.
    """
    step, schedule = teacher_step(frozen, batch, key, setup), frozen.schedule

    def f(theta: Mapping[str, Any], z: Latents, t: Array) -> Latents:
        prediction = predict(setup.student, {**frozen.params, **theta}, z, t, step.conditions, step.guidance)
        return schedule.consistency(z, schedule.to_x0_eps(prediction, z, t)[0], t)

    # d(f_θ(z_t, t, w), sg f_θ⁻(ẑ_s, s, w)).
    target = jax.lax.stop_gradient(f(params if state.ema is None else state.ema, step.z_s, step.s))
    return jnp.mean(distance(f(params, step.z_t, step.t), target, setup.flags)), {}


def distance(x: Latents, y: Latents, flags: LcmFlags) -> Float[Array, " b"]:
    """The distance d per sample: squared, or pseudo-Huber."""
    return losses.huber(x, y, flags.huber_c) if flags.loss_type == "huber" else losses.mse(x, y)


def result(state: TrainState, setup: LcmSetup, load: Load) -> dict[str, Params]:
    """The UNet to show: θ⁻, or the teacher with the LoRA merged into it."""
    if setup.flags.lora is None:
        return {"unet": state.ema["unet"]}
    return {"unet": merge_lora(load("unet"), state.params["unet_lora"])}


def export(state: TrainState, setup: LcmSetup, load: Load) -> Export:
    """The student θ, and θ⁻ as ``unet_target``, with a guidance scale baked in if the flags say so; or the LoRA."""
    del load
    if setup.flags.lora is not None:
        return Export(lora={"unet": state.params["unet_lora"]}, is_whole=False)
    online, target = (_exported(setup, params["unet"]) for params in (state.params, state.ema))
    return Export({"unet": online}, beside={"unet_target": target})


def _exported(setup: LcmSetup, params: Params) -> tuple[Any, Params]:
    flags, unet = setup.flags, replace(setup.student.unet, remat=False)
    if flags.bake_guidance_scale is None:
        return unet, params
    return bake_guidance(unet, params, flags.bake_guidance_scale, flags.bake_image_guidance_scale)


TEXT = Method(
    flags=LcmTextFlags,
    sampling=sampling,
    configure=configure_for_text,
    init=init,
    loss=loss,
    result=result,
    export=export,
)
"""For text-to-image models, with or without a ControlNet."""
EDIT = Method(
    flags=LcmEditFlags,
    sampling=sampling,
    configure=configure_for_edits,
    init=init,
    loss=loss,
    result=result,
    export=export,
)
"""For InstructPix2Pix models."""
