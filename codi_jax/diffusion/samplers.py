"""Samplers: from noise to z_0, or from an image to another one.

`sample` runs them, with ``denoise(z, t)``, the network's raw output, guidance included, for a float32 z of unit
variance and one time t for the whole batch (a scalar: int32, or float32 where a sampler goes between the training
times); with z ~ N(0, I); and with the descending times of `codi_jax.diffusion.timesteps`. Samplers that add noise
between steps take that noise too. Given an image, `sample` starts from it, or keeps a part of it, whatever the sampler.

Each sampler, in `codi_jax.diffusion.time_samplers` or `codi_jax.diffusion.level_samplers`, describes its steps as a
`codi_jax.diffusion.courses.Course`: one function for all of them, so ``denoise`` is traced and compiled once whatever
their number, and all of it works inside the caller's `jax.jit`. Samplers marked as counted in `SAMPLERS` can take the
number of steps as an input, so that one program serves several. ``on_step`` is called on the host with the index of
every finished step; ``None`` costs nothing. Times and steps match diffusers' schedulers up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from codi_jax.diffusion import level_samplers, time_samplers
from codi_jax.diffusion.courses import Course, Denoise, Visits
from codi_jax.diffusion.schedule import Latents, NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName

OnStep = Callable[[Any], None] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Original:
    """An image to start from instead of noise (Meng et al., 2022), or to change only in part.

    Attributes:
      z0: its latents, times the scaling factor.
      skipped: how many evaluations of the network are left out at the start, where the image's latents with noise take
        the place of what they would have made. ``None``: sampling starts from noise alone.
      mask: where the image may change: elsewhere each step ends at the image's latents with the noise that they started
        with, and the last one at these latents. ``None``: everywhere.
    """

    z0: Latents
    skipped: Int[Array, ""] | int | None = None
    mask: Float[Array, "b h w 1"] | None = None


def sample(
    sampler: SamplerName,
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Num[Array, " n"] | Num[np.ndarray, " n"],
    noise: Float[Array, "m b h w c"] | None = None,
    *,
    original: Original | None = None,
    gamma: Float[ArrayLike, ""] = 0.3,
    eta: Float[ArrayLike, ""] | None = None,
    num_steps: Int[Array, ""] | None = None,
    on_step: OnStep = None,
) -> Latents:
    """Runs the sampler of that name.

    Examples:
      >>> z0 = sample("ddim", denoise, schedule, z, timesteps_for("ddim", schedule, 50))

    Args:
      sampler: the sampler's name.
      denoise: the network, see the top of this file.
      schedule: the model's noise schedule.
      z: noise, N(0, I).
      timesteps: from `codi_jax.diffusion.timesteps.timesteps_for`.
      noise: what stochastic samplers, and ddim with η, add, N(0, I), one array fewer than there are times. The others
        ignore it.
      original: an image to start from.
      gamma: γ of the sampler tcd.
      eta: η of the sampler ddim; ``None`` is 0, without noise.
      num_steps: how many of the times to visit, for counted samplers. Default: all.
      on_step: called with the index of every finished step.

    Returns:
      The clean latents z_0, float32.

    Raises:
      ValueError: if the number of noise arrays is not one less than the number of times, or the sampler is not counted.
    """
    entry = SAMPLERS[sampler]
    if num_steps is not None and not entry.is_counted:
        raise ValueError(f"the sampler {sampler} visits all of its timesteps: give no num_steps.")
    count = len(timesteps) if num_steps is None else num_steps
    first = 0 if original is None or original.skipped is None else original.skipped
    options: dict[str, Any] = {}
    visits = Visits(jnp.asarray(timesteps), first, count)
    if sampler == "ddim" and eta is not None:
        options["eta"] = eta
    if entry.is_stochastic or "eta" in options:
        options["noise"] = _for_every_step(noise, z, visits)
    if sampler == "tcd":
        options["gamma"] = gamma
    course = entry.function(denoise, schedule.read_by(sampler), visits, **options)
    return _follow(course, z.astype(jnp.float32), original, visits, on_step)


def _follow(course: Course, z: Latents, original: Original | None, visits: Visits, on_step: OnStep) -> Latents:
    """Takes the steps of a course from the noise ``z``."""
    pasted = None if original is None or original.mask is None else original

    def body(index: Array, carry: tuple[Latents, ...]) -> tuple[Latents, ...]:
        x, *kept = course.step(carry, *(values[index] for values in course.values))
        if pasted is not None:
            alphas, sigmas = course.ends
            x = _pasted(x, pasted, alphas[index] * pasted.z0 + sigmas[index] * z)
        if on_step is not None:
            # Passing one element of the step's result makes the report wait for it.
            jax.debug.callback(lambda index, _, report=on_step: report(index), index, x[0, 0, 0, 0])
        return x, *kept

    if original is None or original.skipped is None:
        x = course.scale * z
    else:
        alpha, sigma = course.start
        x = alpha * original.z0 + sigma * z
    kept = (jnp.zeros_like(z),) * course.memory
    x, *_ = jax.lax.fori_loop(visits.first, visits.count, body, (x, *kept))
    return x if pasted is None else _pasted(x, pasted, pasted.z0)


def _pasted(x: Latents, original: Original, outside: Latents) -> Latents:
    """The latents where the image may change, and others elsewhere."""
    mask: Any = original.mask
    return jnp.where(mask > 0, x, outside)


def _for_every_step(noise: Float[Array, "m b h w c"] | None, z: Latents, visits: Visits) -> Float[Array, "n b h w c"]:
    """The noise added after each step: zeros after the last."""
    given, needed = 0 if noise is None else len(noise), len(visits.times) - 1
    if given != needed:
        raise ValueError(f"{needed + 1} steps need {needed} arrays of noise, but {given} were given.")
    zeros = jnp.zeros((1, *z.shape))
    noise = zeros if noise is None else jnp.concatenate([noise, zeros])
    return jnp.where(visits.is_last[:, None, None, None, None], 0, noise)


@dataclass(frozen=True)
class Sampler:
    """An entry of `SAMPLERS`.

    Attributes:
      function: the sampler, a function that returns its course.
      is_stochastic: whether it adds fresh noise between its steps, and so takes ``noise``.
      is_counted: whether it takes ``num_steps``: how many of ``timesteps`` to visit; the rest only pad the array.
    """

    function: Callable[..., Course]
    is_stochastic: bool = False
    is_counted: bool = False


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": Sampler(time_samplers.ddim, is_counted=True),
    "euler": Sampler(level_samplers.euler),
    "euler-ancestral": Sampler(level_samplers.euler_ancestral, is_stochastic=True),
    "heun": Sampler(level_samplers.heun),
    "pndm": Sampler(time_samplers.pndm),
    "dpm-solver++": Sampler(level_samplers.dpm_solver_pp_2m),
    "dpm-solver++-sde": Sampler(level_samplers.dpm_solver_pp_2m_sde, is_stochastic=True),
    "unipc": Sampler(level_samplers.unipc),
    "lcm": Sampler(time_samplers.lcm, is_stochastic=True, is_counted=True),
    "tcd": Sampler(time_samplers.tcd, is_stochastic=True, is_counted=True),
    "codi": Sampler(time_samplers.codi, is_counted=True),
}
"""The samplers by the names that users know them by."""
