"""CoDi: conditional diffusion distillation in a single stage (Mei et al., 2024, arXiv:2310.01407, section 3).

A text-to-image model learns a new condition and few-step sampling at the same time. At a time t = t_n of the grid that
the student will be sampled on, with s the time before it,

    ẑ_s = α_s x̂ + σ_s ε̂,    x̂, ε̂ of the frozen teacher at z_t                   (one DDIM step)
    L   = w_snr · mean‖f_θ(z_t, t) − sg f_θ⁻(ẑ_s, s)‖² + λ · mean‖f_θ(z_t, t) − z_0‖²

with f(z, t) = c_skip(t) z + c_out(t) x̂(z, t), and θ⁻ the moving average of θ. θ is a ControlNet on the frozen UNet
(parameter-efficient CoDi), or the UNet too. A new ControlNet outputs zeros, so the student starts as the teacher.

Differences from the reference code. ``consistency_epsilon`` has ε̂ instead of x̂ in the first term, where f(ẑ_0, 0) is
the clean latent: a target for x̂, but not for noise. The reference trains on it (even a perfect network has a loss of
mean‖ε − z_0‖² there, in one of N draws); here w = 0 where s = 0. And w_snr, which is 1 without ``snr_gamma``, weighs by
what the term compares, min(SNR, γ) for x̂ and min(SNR, γ)/SNR for ε̂, while the reference weighs by what the network
predicts, although the term is not a loss on that (``snr_weight_space``).

New compared with LCM, its neighbor: the condition, the second term, which teaches it, and guidance that is chosen at
sampling time instead of being an input of the network.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from codi_jax.cli.flags import Flags
from codi_jax.diffusion import losses
from codi_jax.diffusion.guidance import Guidance
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, distillation_grid
from codi_jax.diffusion.scheduler_config import DistillationGrid, PredictionType
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen, prepare
from codi_jax.pipeline.networks import Networks, add_controlnet, init_controlnet, refuse_guidance_input
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim
from codi_jax.training.method import Load, Method, Setup
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState

SampleEps = Literal["v_prediction", "x_prediction", "epsilon", "vprediction", "xprediction", "nprediction"]
_TRUE_NOISE = ("epsilon", "nprediction")


@dataclass(frozen=True)
class CodiFlags(Flags):
    """The flags of CoDi."""

    distill_type: Literal["conditional", "unconditional"] = "conditional"
    """unconditional distills without condition images: only the UNet, on text."""
    train: Literal["controlnet", "unet"] = "controlnet"
    """controlnet: parameter-efficient CoDi, which leaves the UNet as it is; unet: full CoDi, which trains both."""
    distill_loss: Literal["consistency_x", "consistency_epsilon"] = "consistency_x"
    """Which estimate is made consistent: the clean latents or the noise."""
    distill_x0_weight: float = 1.0
    """λ, the weight of the distance to the true clean latents."""
    distill_learning_steps: int = 50
    """N, the number of times on the grid that the student is trained and sampled on."""
    distill_grid: DistillationGrid = "trailing"
    """trailing: up to the last training time; leading: from 0, as in the reference code."""
    distill_timestep_scaling: float = 10.0
    """The factor on time in the boundary scalings."""
    onestepode: Literal["control", "uncontrol"] = "control"
    """Use the ControlNet in the teacher's step."""
    onestepode_control_params: Literal["target", "online", "initial"] = "target"
    """Which ControlNet the teacher's step uses: the moving average, the one in training, or the one that training
    started from (which must then be a trained one)."""
    onestepode_cfg: bool = False
    """Guide the teacher's step."""
    onestepode_sample_eps: SampleEps | None = None
    """epsilon: step along the true noise, not the teacher's estimate. The other values only name the teacher's
    output."""
    cfg_aware_distill: bool = False
    """Guide the student and its target, both with the same random weight."""
    distill_guidance_min: float = 2.0
    """The lowest guidance scale."""
    distill_guidance_max: float = 14.0
    """The highest guidance scale (exclusive)."""
    snr_gamma: float | None = None
    """γ of min-SNR weights on the consistency term; 5 is usual."""
    snr_weight_space: Literal["loss", "prediction"] = "loss"
    """What --snr_gamma weighs by. loss: what the consistency term compares, clean latents or noise. prediction: what
    the network predicts, as in the reference code, where models that predict noise get weights in the opposite
    order."""
    ema_decay: float = 0.999
    """Decay of the moving average, which is the target and the result."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "distill_x0_weight", "distill_guidance_min")
        self.require_positive("distill_timestep_scaling")
        high = self.distill_guidance_max
        self.require(
            "distill_guidance_min", self.distill_guidance_min <= high, f"at most --distill_guidance_max {high}"
        )
        self.require_at_least(1, "distill_learning_steps")
        if self.distill_loss == "consistency_epsilon":
            least = 2 if self.distill_grid == "trailing" else 3  # otherwise every step of the teacher ends at s = 0
            what = f"at least {least} with --distill_loss consistency_epsilon"
            self.require("distill_learning_steps", self.distill_learning_steps >= least, what)
        self.require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self.require("snr_gamma", self.snr_gamma is None or self.snr_gamma > 0, "positive")

    @property
    def teacher_steps_with_initial(self) -> bool:
        """Whether the teacher's step needs the ControlNet that training starts from."""
        initial = self.onestepode == "control" and self.onestepode_control_params == "initial"
        return initial and self.distill_type == "conditional"


@dataclass(frozen=True, kw_only=True)
class CodiSetup(Setup):
    """Everything that the compiled step depends on besides arrays; created by `configure`."""

    flags: CodiFlags
    starts_from_controlnet: bool


def sampling(schedule: NoiseSchedule, flags: CodiFlags) -> NoiseSchedule:
    """The schedule to train with and to save with the student: the teacher's, with the grid.

    Raises:
      ConfigError: if the grid is impossible.
    """
    named: dict[Any, PredictionType] = {"v_prediction": "v_prediction", "vprediction": "v_prediction"}
    named |= {"x_prediction": "sample", "xprediction": "sample"}
    if named.get(flags.onestepode_sample_eps, schedule.prediction_type) != schedule.prediction_type:
        warnings.warn(
            f"--onestepode_sample_eps {flags.onestepode_sample_eps} has no effect: the teacher's configuration says "
            f"that it predicts {schedule.prediction_type}.",
            stacklevel=2,
        )
    spec = SamplingSpec.codi(flags.distill_learning_steps, flags.distill_grid, flags.distill_timestep_scaling)
    return schedule.sampled(spec)


def grid(schedule: NoiseSchedule) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The training times t_n, and s_n, where the teacher's step from each ends.

    Raises:
      ValueError: if the schedule is not from `sampling`.
    """
    spec = schedule.sampling
    if spec.sampler != "codi" or spec.grid_steps is None:
        raise ValueError("This schedule has no distillation grid: use the one from codi.sampling.")
    return distillation_grid(schedule.num_train_timesteps, spec.grid_steps, spec.grid)


def configure(networks: Networks, flags: CodiFlags, *, remat: bool = False) -> CodiSetup:
    """Adds the UNet's ControlNet to the networks, unless one is given or there is no condition.

    Raises:
      ValueError: if the teacher's step needs a trained ControlNet and none is given, or if the teacher takes its
        guidance as an input.
    """
    refuse_guidance_input(
        networks.unet,
        "which CoDi does not give it: start from the model that it was distilled from, or bake a scale in",
    )
    given = networks.controlnet
    if flags.distill_type == "unconditional":
        networks = replace(networks, controlnet=None)
    elif given is None:
        if flags.teacher_steps_with_initial:
            raise ValueError(
                "--onestepode_control_params initial distills a ControlNet that has been trained already: name it "
                "with --controlnet_model_name_or_path."
            )
        networks = add_controlnet(networks)
    networks = networks.recomputing("unet", "controlnet", remat=remat)
    trained = ("controlnet",) if networks.controlnet is not None else ()
    frozen = tuple(networks.by_name().keys() - ({"controlnet"} if not flags.teacher_steps_with_initial else set()))
    return CodiSetup(
        networks=networks,
        student=networks,
        trained=(*trained, "unet") if flags.train == "unet" or not trained else trained,
        frozen=frozen,
        needs_null_text=flags.cfg_aware_distill or flags.onestepode_cfg,
        ema_decay=flags.ema_decay,
        flags=flags,
        starts_from_controlnet=given is not None,
    )


def init(
    setup: CodiSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step: θ, all trained parameters, and θ⁻, which starts there.

    A new ControlNet is initialized from the UNet.
    """
    params, unet = {}, load("unet")
    init_key, key = jax.random.split(key)
    if "controlnet" in setup.trained:
        given = setup.starts_from_controlnet
        params["controlnet"] = load("controlnet") if given else init_controlnet(setup.networks, unet, init_key)
    if "unet" in setup.trained:
        params["unet"] = unet
    return optim.init_state(params, optimizer, key, ema=True, mixed_precision=mixed_precision)


def loss(
    params: Params, state: TrainState, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: CodiSetup
) -> tuple[Float[Array, ""], Metrics]:
    """The loss at the top of this file, as a mean over the batch.

    Args:
      params: θ: ``controlnet``, ``unet``, or both.
      state: its ``ema`` is θ⁻.
      frozen: the teacher, with the schedule of `sampling`; ``controlnet`` if the flags need the initial one.
      batch: see `codi_jax.pipeline.conditions.prepare`.
      key: for all randomness.
      setup: the method's setup.

    Returns:
      The loss, and its two parts before weighting by γ and λ: ``consistency`` and ``reconstruction``.
    """
    networks, flags, schedule = setup.networks, setup.flags, frozen.schedule
    z0_key, t_key, noise_key, w_key = jax.random.split(key, 4)
    inputs = prepare(networks, frozen.params, batch, z0_key, frozen.null_text)
    z0, c, B = inputs.z0, inputs.conditions, len(inputs.z0)

    n = jax.random.randint(t_key, (B,), 0, flags.distill_learning_steps)
    t, s = (jnp.asarray(times)[n] for times in grid(schedule))
    noise = jax.random.normal(noise_key, z0.shape)
    z_t = schedule.add_noise(z0, noise, t)
    scale = jax.random.uniform(w_key, (B,), minval=flags.distill_guidance_min, maxval=flags.distill_guidance_max)
    guided = Guidance.classifier_free(scale)
    of_teacher = guided if flags.onestepode_cfg else None
    of_student = guided if flags.cfg_aware_distill else None

    online, target = ({"unet": frozen.params["unet"], **tree} for tree in (params, state.ema))  # θ, θ⁻
    teacher = _teacher(params, state.ema, frozen, flags)

    # One DDIM step of the teacher: ẑ_s = α_s x̂ + σ_s ε̂.
    x0, eps = schedule.to_x0_eps(predict(networks, teacher, z_t, t, c, of_teacher), z_t, t)
    z_s = schedule.ddim_step(x0, noise if flags.onestepode_sample_eps in _TRUE_NOISE else eps, s)

    # mean‖f_θ(z_t, t) − sg f_θ⁻(ẑ_s, s)‖², and mean‖f_θ(z_t, t) − z_0‖².
    f, f_eps = consistency(schedule, predict(networks, online, z_t, t, c, of_student), z_t, t)
    f_target, f_eps_target = consistency(schedule, predict(networks, target, z_s, s, c, of_student), z_s, s)
    if flags.distill_loss == "consistency_x":
        distance, space = losses.mse(f, jax.lax.stop_gradient(f_target)), "sample"
    else:
        distance, space = losses.mse(f_eps, jax.lax.stop_gradient(f_eps_target)), "epsilon"
        distance = jnp.where(s > 0, distance, 0)  # f(z, 0) = z is not a target for noise
    reconstruction = losses.mse(f, z0)

    space = schedule.prediction_type if flags.snr_weight_space == "prediction" else space
    weights = losses.min_snr_weights(schedule.snr(t), flags.snr_gamma, space)
    value = jnp.mean(weights * distance) + flags.distill_x0_weight * jnp.mean(reconstruction)
    return value, {"consistency": distance.mean(), "reconstruction": reconstruction.mean()}


def consistency(
    schedule: NoiseSchedule, prediction: Latents, z: Latents, t: Int[Array, " b"]
) -> tuple[Latents, Latents]:
    """The consistency function f = c_skip z + c_out x̂ and its counterpart for ε̂, from the network's output at z."""
    x0, eps = schedule.to_x0_eps(prediction, z, t)
    return schedule.consistency(z, x0, t), schedule.consistency(z, eps, t)


def _teacher(params: Params, ema: Params, frozen: Frozen, flags: CodiFlags) -> dict[str, Params]:
    """The networks of the one DDIM step: the frozen UNet, and under ``control`` the ControlNet as it is *now*."""
    teacher = {"unet": frozen.params["unet"]}
    if flags.onestepode == "control" and "controlnet" in params:
        sources = {"target": ema, "online": params, "initial": frozen.params}
        teacher["controlnet"] = jax.lax.stop_gradient(sources[flags.onestepode_control_params]["controlnet"])
    return teacher


METHOD = Method(flags=CodiFlags, sampling=sampling, configure=configure, init=init, loss=loss)
"""The student is the moving average, which `codi_jax.training.method.export_result` writes."""
