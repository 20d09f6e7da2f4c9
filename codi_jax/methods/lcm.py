"""LCM: latent consistency distillation (Luo et al., 2023, arXiv:2310.04378, algorithm 1).

A model with guidance becomes a student of one pass a step, 1 to 8 steps, which takes the guidance weight w as an input.
At a time t = t_n of an N-step DDIM grid, and s the one before it,

    x̂, ε̂ = those of the frozen teacher at z_t, guided by w          (two passes; three if the image has a weight)
    ẑ_s   = α_s x̂ + σ_s ε̂                                            (one DDIM step, of length T/N)
    L     = mean d(f_θ(z_t, t, w), sg f_θ⁻(ẑ_s, s, w))

with f(z, t) = c_skip(t) z + c_out(t) x̂(z, t), d the squared or the pseudo-Huber distance, and θ⁻ the moving average of
θ. θ starts as the teacher, and the projection of w's embedding with zeros, so the student starts as the teacher too.

w is the guidance scale *minus one*: x̂ = x̂_c + w (x̂_c − x̂_u). For InstructPix2Pix u has neither text nor image; with
``w_image_min`` and ``w_image_max`` the image has a weight of its own, and x̂ = x̂_u + s_I (x̂_i − x̂_u) + s_T (x̂_c − x̂_i)
with s = w + 1 (Brooks et al., 2023, equation 3). That is this project's own extension. A sample whose image is dropped
has none in any branch, so there x̂_i is x̂_u.

LCM-LoRA (Luo et al., 2023, arXiv:2311.05556): θ is a LoRA on the teacher, w is no input, and θ⁻ is θ.

Beyond CoDi, its neighbor: guidance is distilled, and no condition is learned.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from codi_jax.cli.flags import Flags
from codi_jax.diffusion import losses
from codi_jax.diffusion.sampling import guidance_embedding
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, distillation_grid
from codi_jax.models.config import Params
from codi_jax.models.lora import init_lora
from codi_jax.pipeline.conditions import Batch, Frozen, Modules, drop_conditions, prepare, refuse_guidance_input
from codi_jax.pipeline.prediction import guided, predict
from codi_jax.training import optim
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState


@dataclasses.dataclass(frozen=True)
class LcmFlags(Flags):
    """The flags of LCM."""

    w_min: float = 3.0
    """The lowest guidance weight: the guidance scale minus 1."""
    w_max: float = 15.0
    """The highest guidance weight."""
    w_image_min: float | None = None
    """The lowest weight of the image guidance (its scale minus 1), to distill it as a second input. If left out: text
    and image have the same weight."""
    w_image_max: float | None = None
    """The highest weight of the image guidance."""
    num_ddim_timesteps: int = 50
    """N, the times of the grid that the student is trained and sampled on."""
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

    @property
    def weighs_image(self) -> bool:
        """Whether the image has a guidance weight of its own."""
        return self.w_image_min is not None


@dataclasses.dataclass(frozen=True)
class Config:
    """What the compiled step depends on besides arrays; made by `configure`.

    Attributes:
      modules: of the teacher.
      student: the UNet that is trained: the teacher's with an embedding of guidance weights, or as it is for a LoRA.
      flags: of the method.
      dropout: probability of `codi_jax.pipeline.conditions.drop_conditions`, for edits.
      lora: whether θ is a LoRA.
    """

    modules: Modules
    student: Any
    flags: LcmFlags
    dropout: float | int = 0.0
    lora: bool = False


def configure(modules: Modules, flags: LcmFlags, *, dropout: float | int = 0.0, lora: bool = False) -> Config:
    """Gives the student its embedding of guidance weights.

    Raises:
      ValueError: if the teacher has one already, or the image is to be weighed and there is none, or by a LoRA.
    """
    unet = modules.unet
    refuse_guidance_input(unet, "so it has been distilled already: give the model that it was distilled from")
    if flags.weighs_image and not modules.edits:
        raise ValueError("--w_image_min is for InstructPix2Pix models, and the teacher takes no image: leave it out.")
    if lora:
        if flags.weighs_image:
            raise ValueError("--w_image_min is of no use to a LoRA, which takes no guidance weights: leave it out.")
        # A LoRA finds layers by their names, which scanned ones do not have.
        return Config(modules, dataclasses.replace(unet, scan_layers=False), flags, dropout, lora)
    widths = 2 if flags.weighs_image else 1
    config = dataclasses.replace(
        unet.config,
        time_cond_proj_dim=widths * flags.unet_time_cond_proj_dim,
        embeds_image_guidance=flags.weighs_image,
    )
    return Config(modules, dataclasses.replace(unet, config=config), flags, dropout)


def student_schedule(schedule: NoiseSchedule, flags: LcmFlags) -> NoiseSchedule:
    """The schedule to train with, and to save with the student: the teacher's noise, for the LCM sampler.

    Raises:
      ConfigError: if the grid is impossible.
    """
    return schedule.with_consistency_grid(flags.num_ddim_timesteps, flags.timestep_scaling_factor)


def init_student(config: Config, teacher_params: Params) -> Params:
    """The teacher's parameters, and zeros for the projection of the embedding of guidance weights."""
    wanted = config.student.abstract_params()["time_embedding"]
    time_embedding = {"cond_proj": jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), wanted["cond_proj"])}
    return {**teacher_params, "time_embedding": {**teacher_params["time_embedding"], **time_embedding}}


def init_state(
    config: Config,
    teacher_params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    rank: int = 64,
    alpha: float | None = None,
    target_modules: tuple[str, ...] | None = None,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step: θ and, unless it is a LoRA, θ⁻.

    Args:
      config: from `configure`.
      teacher_params: of the teacher's UNet.
      optimizer: from `codi_jax.training.optim.make_optimizer`.
      key: of the run.
      rank: of the LoRA.
      alpha: of the LoRA; ``None`` is ``rank``.
      target_modules: of the LoRA, see `codi_jax.models.lora.init_lora`.
      mixed_precision: of the computation.

    Raises:
      WeightsError: if the LoRA is impossible.
    """
    if config.lora:
        lora_key, key = jax.random.split(key)
        params = {"unet_lora": init_lora(lora_key, teacher_params, rank, alpha, target_modules)}
    else:
        params = {"unet": init_student(config, teacher_params)}
    return optim.init_state(params, optimizer, key, ema=not config.lora, mixed_precision=mixed_precision)


def loss(
    params: Params, state: TrainState, frozen: Frozen, batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], Metrics]:
    """The loss at the top of this file, as a mean over the batch; no further metrics.

    Args:
      params: θ: ``unet``, or ``unet_lora``.
      state: its ``ema`` is θ⁻.
      frozen: parameters of ``unet``, the teacher's, and of what `prepare` needs, the null text included; the
        ``schedule`` of `student_schedule`; those of ``controlnet`` for a model that has one.
      batch: see `prepare`.
      key: for all that is random.
      config: of the method.
    """
    flags, schedule = config.flags, frozen["schedule"]
    z0_key, drop_key, n_key, noise_key, w_key, w_image_key = jax.random.split(key, 6)
    inputs = prepare(config.modules, frozen, batch, z0_key)
    if config.dropout:
        inputs = drop_conditions(inputs, drop_key, config.dropout)
    z0, B = inputs.z0, len(inputs.z0)

    times = distillation_grid(schedule.num_train_timesteps, flags.num_ddim_timesteps)
    n = jax.random.randint(n_key, (B,), 0, flags.num_ddim_timesteps)
    t, s = (jnp.asarray(grid)[n] for grid in times)
    z_t = schedule.add_noise(z0, jax.random.normal(noise_key, z0.shape), t)
    w = jax.random.uniform(w_key, (B,), minval=flags.w_min, maxval=flags.w_max)
    w_image = None
    if flags.w_image_min is not None and flags.w_image_max is not None:
        w_image = jax.random.uniform(w_image_key, (B,), minval=flags.w_image_min, maxval=flags.w_image_max)

    guidance = None
    if not config.lora:
        guidance = guidance_embedding(w, config.student.config.time_cond_proj_dim, w_image)
    student = dataclasses.replace(config.modules, unet=config.student)
    cond = dataclasses.replace(inputs.cond, guidance=guidance)

    def f(theta: Mapping[str, Any], z: Latents, t: Array) -> Latents:
        x0, _ = schedule.to_x0_eps(predict(student, {**frozen, **theta}, z, t, cond), z, t)
        return schedule.consistency(z, x0, t)

    # LCM's w is the guidance scale minus one.
    s_I = None if w_image is None else w_image + 1
    teacher = guided(config.modules, frozen, z_t, t, inputs, w + 1, image_guidance_scale=s_I)
    x0, eps = schedule.to_x0_eps(teacher, z_t, t)
    z_s = schedule.ddim_step(x0, eps, s)
    target = jax.lax.stop_gradient(f(params if state.ema is None else state.ema, z_s, s))
    online = f(params, z_t, t)
    distance = losses.huber(online, target, flags.huber_c) if flags.loss_type == "huber" else losses.mse(online, target)
    return jnp.mean(distance), {}


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of θ and θ⁻; see `codi_jax.training.optim.step`."""
    return optim.step(
        state,
        lambda params, batch, key: loss(params, state, frozen, batch, key, config),
        batch,
        optimizer,
        accumulation=accumulation,
        ema_decay=None if config.lora else config.flags.ema_decay,
    )
