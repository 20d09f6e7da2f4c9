"""TCD: trajectory consistency distillation (Zheng et al., 2024, arXiv:2402.19159, section 4).

A student that leads from any time t to any earlier time r on the teacher's trajectory, not only to its end. At a time t
= t_n of an N-step DDIM grid, with s the time before it and r uniform among the times of the grid up to s,

    ẑ_s = α_s x̂ + σ_s ε̂,    x̂, ε̂ of the teacher at z_t, guided by w              (one DDIM step, as in LCM)
    L   = mean d(f_θ^{→r}(z_t, t, w), sg f_θ⁻^{→r}(ẑ_s, s, w))

with f^{→r}(z_t, t) = α_r x̂ + σ_r ε̂, the first-order exponential integrator of the semi-linear ODE:
f^{→t}(z_t, t) = z_t holds by construction, so no boundary scalings are needed. The sampler is
`codi_jax.diffusion.time_samplers.tcd`.

It shares flags, student and exports with LCM, its neighbor; new is r, which is 0 there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, distillation_grid
from codi_jax.methods import lcm
from codi_jax.methods.lcm import LcmFlags, LcmSetup
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen
from codi_jax.pipeline.prediction import predict
from codi_jax.training.optim import Metrics, TrainState


def sampling(schedule: NoiseSchedule, flags: LcmFlags) -> NoiseSchedule:
    """The schedule to train with and to save with the student: the teacher's noise, for the TCD sampler.

    Raises:
      ValueError: if the grid is impossible.
    """
    return schedule.sampled(SamplingSpec.tcd(flags.num_ddim_timesteps))


def end_times(key: Key[Array, ""], n: Int[Array, " b"], schedule: NoiseSchedule, flags: LcmFlags) -> Int[Array, " b"]:
    """The r of each sample: uniform among the ends of the teacher's steps from t_0, …, t_n.

    Args:
      key: for the draw.
      n: the index of t on the grid, from 0.
      schedule: the noise schedule, with T.
      flags: the method's flags, with N.
    """
    _, ends = distillation_grid(schedule.num_train_timesteps, flags.num_ddim_timesteps)
    return jnp.asarray(ends)[jax.random.randint(key, n.shape, 0, n + 1)]


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
    step, schedule = lcm.teacher_step(frozen, batch, key, setup), frozen.schedule
    r_key = jax.random.fold_in(key, 6)  # the teacher's step splits the key in six: 0 to 5
    r = end_times(r_key, step.n, schedule, setup.flags)

    def f(theta: Mapping[str, Any], z: Latents, t: Array) -> Latents:
        prediction = predict(setup.student, {**frozen.params, **theta}, z, t, step.conditions, step.guidance)
        x0, eps = schedule.to_x0_eps(prediction, z, t)
        return schedule.ddim_step(x0, eps, r)

    # d(f_θ^{→r}(z_t, t, w), sg f_θ⁻^{→r}(ẑ_s, s, w)).
    target = jax.lax.stop_gradient(f(params if state.ema is None else state.ema, step.z_s, step.s))
    return jnp.mean(lcm.distance(f(params, step.z_t, step.t), target, setup.flags)), {}


TEXT = replace(lcm.TEXT, sampling=sampling, loss=loss)
"""For text-to-image models, with or without a ControlNet."""
EDIT = replace(lcm.EDIT, sampling=sampling, loss=loss)
"""For InstructPix2Pix models."""
