"""Samplers: from noise to z_0, one function each, to be read next to the paper it names.

`sample` runs them, with ``denoise(z, t)``, the network's raw output, guidance included, for a float32 z of unit
variance and one time t for the whole batch (a scalar: int32, or float32 where a sampler goes between the training
times); with z ~ N(0, I); and with the descending times of `codi_jax.diffusion.timesteps`. Samplers that add noise
between steps take that noise too. Given an image, `sample` starts from it, or keeps a part of it, whatever the sampler.

Each sampler describes its steps as a `Course`: one function for all of them, so ``denoise`` is traced and compiled once
whatever their number, and all of it works inside the caller's `jax.jit`. Samplers marked as counted in `SAMPLERS` can
take the number of steps as an input, so that one program serves several. ``on_step`` is called on the host with the
index of every finished step; ``None`` costs nothing. Times and steps match diffusers' schedulers up to rounding; the
notation is `codi_jax.diffusion.schedule`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from codi_jax.diffusion.noise_levels import respaced_levels
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, x0_eps
from codi_jax.diffusion.scheduler_config import SamplerName

Denoise = Callable[[Latents, Shaped[Array, ""]], Latents]
OnStep = Callable[[Any], None] | None
Times = Num[Array, " n"]
Count = int | Int[Array, ""]
Noise = Float[Array, "n b h w c"]
Levels = tuple[Float[Array, " n"], Float[Array, " n"]]
"""α and σ at several places."""


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
    num_steps: Int[Array, ""] | None = None,
    on_step: OnStep = None,
) -> Latents:
    """Runs the sampler of that name.

    Example:
      >>> z0 = sample("ddim", denoise, schedule, z, timesteps_for("ddim", schedule, 50))

    Args:
      sampler: the sampler's name.
      denoise: the network, see the top of this file.
      schedule: the model's noise schedule.
      z: noise, N(0, I).
      timesteps: from `codi_jax.diffusion.timesteps.timesteps_for`.
      noise: what stochastic samplers add, N(0, I), one array fewer than there are times. The others ignore it.
      original: an image to start from.
      gamma: γ of `tcd`.
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
    if entry.is_stochastic:
        options["noise"] = _for_every_step(noise, z, visits)
    if sampler == "tcd":
        options["gamma"] = gamma
    course = entry.function(denoise, schedule.read_by(sampler), visits, **options)
    return _follow(course, z.astype(jnp.float32), original, visits, on_step)


@dataclass(frozen=True)
class Visits:
    """The times that a sampler visits.

    Attributes:
      times: all times of the sampler, and padding.
      first: the index of the first one that is visited.
      count: how many times there are without the padding.
    """

    times: Times
    first: Count
    count: Count

    @property
    def number(self) -> Int[Array, " n"]:
        """For each time, how many are visited before it."""
        return jnp.arange(len(self.times)) - self.first

    @property
    def is_last(self) -> Bool[Array, " n"]:
        """For each time, whether it is the last one."""
        return jnp.arange(len(self.times)) == self.count - 1

    @property
    def following(self) -> Times:
        """The time that follows each one; the last one's is arbitrary."""
        return jnp.concatenate([self.times[1:], self.times[-1:]])


@dataclass(frozen=True)
class Course:
    """How a sampler goes from noise to z_0, in a variable of its own: z, or z/α.

    Attributes:
      step: ``(x, *kept) = step((x, *kept), *values)``, one step of the variable and of what the sampler remembers.
      values: the values of all steps, by their first axis.
      start: α and σ such that α z_0 + σ ε is the variable where sampling starts.
      ends: the same where each step ends.
      scale: the standard deviation of the variable where sampling starts from noise.
      memory: how many arrays of latents the sampler remembers; zeros at the start.
    """

    step: Callable[..., tuple[Latents, ...]]
    values: tuple[Any, ...]
    start: tuple[ArrayLike, ArrayLike]
    ends: Levels
    scale: ArrayLike = 1.0
    memory: int = 0


def _follow(course: Course, z: Latents, original: Original | None, visits: Visits, on_step: OnStep) -> Latents:
    """Takes the steps of a course from the noise ``z``."""

    def at(levels: tuple[ArrayLike, ArrayLike], original: Original) -> Latents:
        alpha, sigma = levels
        return alpha * original.z0 + sigma * z

    def body(index: Array, carry: tuple[Latents, ...]) -> tuple[Latents, ...]:
        x, *kept = course.step(carry, *(values[index] for values in course.values))
        if original is not None and original.mask is not None:
            alphas, sigmas = course.ends
            x = jnp.where(original.mask > 0, x, at((alphas[index], sigmas[index]), original))
        if on_step is not None:
            # Passing one element of the step's result makes the report wait for it.
            jax.debug.callback(lambda index, _, report=on_step: report(index), index, x[0, 0, 0, 0])
        return x, *kept

    is_from_noise = original is None or original.skipped is None
    x = course.scale * z if is_from_noise else at(course.start, original)
    kept = (jnp.zeros_like(z),) * course.memory
    x, *_ = jax.lax.fori_loop(visits.first, visits.count, body, (x, *kept))
    return x if original is None or original.mask is None else jnp.where(original.mask > 0, x, original.z0)


def ddim(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """DDIM without added noise (Song et al., 2021, equation 12 with σ = 0): z_s = α_s x̂ + σ_s ε̂.

    As in diffusers, each step ends ⌊T/n⌋ below its start, which with linspace spacing is not where the next one starts,
    and the last step ends at ᾱ_{−1} (see `NoiseSchedule`).
    """

    def step(carry: tuple, t: Array, s: Array) -> tuple:
        (z,) = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        return (schedule.ddim_step(x0, eps, s),)

    ends = visits.times - schedule.num_train_timesteps // visits.count
    return Course(step, (visits.times, ends), _at_first(schedule, visits), _levels(schedule, ends))


def euler(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """Euler's method on the probability flow ODE (Karras et al., 2022, algorithm 1 without the correction).

    In x = z/α, whose noise level is σ/α (here ``sigma``): d = (x − x̂)/sigma = ε̂, and x + (sigma' − sigma) d =
    x̂ + sigma' ε̂, down to sigma = 0.
    """
    sigmas = _noise_levels(schedule, visits.times)

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array) -> tuple:
        (x,) = carry
        x0, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        return (x0 + next_sigma * eps,)

    return _over_alpha(step, visits, sigmas, _initial_scale(schedule, sigmas[0]))


def euler_ancestral(denoise: Denoise, schedule: NoiseSchedule, visits: Visits, noise: Noise) -> Course:
    """Euler steps to below the next level, then noise up to it: ancestral sampling (Ho et al., 2020, algorithm 2).

    In the variables of `euler`: the step ends at sigma'²/sigma, and the noise has the variance of the posterior
    q(x' | x, x_0), sigma'² (1 − sigma'²/sigma²) (Song et al., 2021, equation 16 with η = 1).
    """
    sigmas = _noise_levels(schedule, visits.times)

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array, noise: Latents) -> tuple:
        (x,) = carry
        x0, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        ratio = next_sigma / sigma
        return (x0 + next_sigma * (ratio * eps + jnp.sqrt(1 - ratio**2) * noise),)

    return _over_alpha(step, visits, sigmas, _initial_scale(schedule, sigmas[0]), noise)


def pndm(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """PLMS: DDIM steps with an Adams-Bashforth combination of the last four outputs (Liu et al., 2022, algorithm 2).

    Their Runge-Kutta start is replaced, as in Stable Diffusion (``skip_prk_steps``), by a step that is repeated with
    the mean of the outputs at its two ends; hence the second time is visited twice. Orders 2, 3, 4, 4 … follow.
    """
    number = visits.number
    # Of all times the second one is there twice: instead, the second one that is visited should be.
    once = jnp.arange(len(number)) - (number > 1)
    times = visits.times[jnp.where(once > 1, once + 1, once)]
    stride = schedule.num_train_timesteps // max(len(times) - 1, 1)
    is_repeated = number == 1
    starts = times + stride * is_repeated
    ends = starts - stride
    orders = jnp.array([
        [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ])  # fmt: skip
    weights = orders[jnp.clip(number, 0, len(orders) - 1)]

    def step(carry: tuple, t: Array, start: Array, end: Array, w: Array, number: Array) -> tuple:
        z, first_z, e1, e2, e3 = carry
        e = denoise(z, t).astype(jnp.float32)
        combined = w[0] * e + w[1] * e1 + w[2] * e2 + w[3] * e3
        first_z = jnp.where(number == 0, z, first_z)
        x0, eps = schedule.to_x0_eps(combined, jnp.where(number == 1, first_z, z), start)
        history = jax.lax.cond(number == 1, lambda: (e1, e2, e3), lambda: (e, e1, e2))
        return schedule.ddim_step(x0, eps, end), first_z, *history

    values = times, starts, ends, weights, number
    start = schedule.alpha_sigma(times[visits.first])
    return Course(step, values, start, _levels(schedule, ends), memory=4)


def dpm_solver_pp_2m(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), with first-order steps at the start and to the end, σ = 0.

    With λ = log(α/σ) and h = λ' − λ: z' = (σ'/σ) z − α' (e^−h − 1) D, D = x̂ + h/(2 h_previous) (x̂ − x̂_previous).
    """
    sigmas = _noise_levels(schedule, visits.times)  # σ/α = e^−λ

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array, extrapolation: Array) -> tuple:
        x, previous = carry  # x = z/α
        x0, _ = _x0_eps_at(denoise, schedule, x, t, sigma)
        D = x0 + extrapolation * (x0 - previous)
        ratio = next_sigma / sigma  # e^−h
        return ratio * x + (1 - ratio) * D, x0

    scale = jnp.sqrt(1 + sigmas[0] ** 2)
    return _over_alpha(step, visits, sigmas, scale, _extrapolation(sigmas, visits), memory=1)


def dpm_solver_pp_2m_sde(denoise: Denoise, schedule: NoiseSchedule, visits: Visits, noise: Noise) -> Course:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, section 5.2 and appendix B.4): `dpm_solver_pp_2m` on the reverse SDE.

    z' = (σ'/σ) e^−h z + α' (1 − e^−2h) D + σ' √(1 − e^−2h) ε, with the same D.
    """
    sigmas = _noise_levels(schedule, visits.times)

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array, extrapolation: Array, noise: Latents) -> tuple:
        x, previous = carry  # x = z/α
        x0, _ = _x0_eps_at(denoise, schedule, x, t, sigma)
        D = x0 + extrapolation * (x0 - previous)
        kept = (next_sigma / sigma) ** 2  # e^−2h
        return kept * x + (1 - kept) * D + next_sigma * jnp.sqrt(1 - kept) * noise, x0

    scale = jnp.sqrt(1 + sigmas[0] ** 2)
    return _over_alpha(step, visits, sigmas, scale, _extrapolation(sigmas, visits), noise, memory=1)


def heun(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """Heun's method on the probability flow ODE (Karras et al., 2022, algorithm 1 without churn).

    In the variables of `euler`: a step to sigma', and the same step again with the mean of the slopes at its two ends,
    except for the last one, to sigma = 0. The times have each end twice: for the second slope, and for the next step.
    """
    times = visits.times
    sigmas = _noise_levels(schedule, jnp.concatenate([times[:1], times[1::2]]))
    number = np.arange(len(times))
    is_second, step_of = number % 2 == 1, number // 2
    level = sigmas[np.where(is_second, step_of + 1, step_of)]
    length = jnp.diff(sigmas)[step_of]

    def step(carry: tuple, t: Array, sigma: Array, length: Array, is_second: Array) -> tuple:
        x, start, slope = carry
        _, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        once, again = x + length * eps, start + length * (slope + eps) / 2
        kept = jax.tree.map(lambda old, new: jnp.where(is_second, old, new), (start, slope), (x, eps))
        return jnp.where(is_second, again, once), *kept

    ends = sigmas[step_of + 1]
    return Course(
        step,
        (times, level, length, jnp.asarray(is_second)),
        (1.0, level[visits.first]),
        (jnp.ones_like(ends), ends),
        _initial_scale(schedule, sigmas[0]),
        memory=2,
    )


def lcm(denoise: Denoise, schedule: NoiseSchedule, visits: Visits, noise: Noise) -> Course:
    """Multistep consistency sampling (Song et al., 2023, algorithm 1; Luo et al., 2023, algorithm 3).

    x̂ = f(z_t, t), then fresh noise up to the next time; the last x̂ is returned. Any descending times work: a one-step
    generator that starts at t = 399 is sampled with ``timesteps = [399]``.
    """

    def step(carry: tuple, t: Array, alpha: Array, sigma: Array, noise: Latents) -> tuple:
        (z,) = carry
        x0, _ = schedule.to_x0_eps(denoise(z, t), z, t)
        return (alpha * schedule.consistency(z, x0, t) + sigma * noise,)

    ends = _levels_to_zero(schedule, visits)
    return Course(step, (visits.times, *ends, noise), _at_first(schedule, visits), ends)


def tcd(
    denoise: Denoise, schedule: NoiseSchedule, visits: Visits, noise: Noise, gamma: Float[ArrayLike, ""] = 0.3
) -> Course:
    """Strategic stochastic sampling of TCD (Zheng et al., 2024, algorithm 4).

    From t the trajectory function leads past the next time t' to s = ⌊(1 − γ) t'⌋, and fresh noise back up to t':
    z' = (α'/α_s) f^{→s}(z_t, t) + √(1 − (α'/α_s)²) ε. The last step goes to t' = 0. γ, diffusers' ``eta``, is 0 for
    deterministic sampling and 1 for consistency sampling.
    """
    following = jnp.where(visits.is_last, 0, visits.following)

    def step(carry: tuple, t: Array, t_next: Array, noise: Latents) -> tuple:
        (z,) = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        s = jnp.floor((1 - gamma) * t_next).astype(jnp.int32)
        a_s, a = schedule.alphas_cumprod_at(s), schedule.alphas_cumprod_at(t_next)  # α²
        # Exactly no noise where s = t', which 1 - (α'/α_s)² would not give; the padding after the last visited time is
        # arbitrary.
        z_s, added = schedule.ddim_step(x0, eps, s), jnp.maximum(a_s - a, 0)
        return ((jnp.sqrt(a) * z_s + jnp.where(added > 0, jnp.sqrt(added) * noise, 0)) / jnp.sqrt(a_s),)

    values = visits.times, following, noise
    return Course(step, values, _at_first(schedule, visits), _levels(schedule, following))


def codi(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """The sampler of CoDi (Mei et al., 2024): DDIM from x̂ = f(z_t, t), along the grid that the student was trained on.

    The boundary scalings affect only x̂, not ε̂; the last x̂ is returned.
    """

    def step(carry: tuple, t: Array, alpha: Array, sigma: Array) -> tuple:
        (z,) = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        return (alpha * schedule.consistency(z, x0, t) + sigma * eps,)

    ends = _levels_to_zero(schedule, visits)
    return Course(step, (visits.times, *ends), _at_first(schedule, visits), ends)


def _over_alpha(
    step: Callable[..., tuple],
    visits: Visits,
    sigmas: Float[Array, " m"],
    scale: ArrayLike,
    *values: Array,
    memory: int = 0,
) -> Course:
    """A course in x = z/α, whose steps take the time, the noise levels at both ends and other values."""
    ends = jnp.ones(len(sigmas) - 1), sigmas[1:]
    all_values = visits.times, sigmas[:-1], sigmas[1:], *values
    return Course(step, all_values, (1.0, sigmas[visits.first]), ends, scale, memory)


def _at_first(schedule: NoiseSchedule, visits: Visits) -> tuple[ArrayLike, ArrayLike]:
    """α and σ at the first time that is visited."""
    return schedule.alpha_sigma(visits.times[visits.first])


def _levels(schedule: NoiseSchedule, times: Times) -> Levels:
    """α and σ at the times."""
    alphas_cumprod = schedule.alphas_cumprod_at(times)
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def _levels_to_zero(schedule: NoiseSchedule, visits: Visits) -> Levels:
    """α and σ at the time that follows each one, and of z_0 after the last one."""
    alphas, sigmas = _levels(schedule, visits.following)
    return jnp.where(visits.is_last, 1.0, alphas), jnp.where(visits.is_last, 0.0, sigmas)


def _for_every_step(noise: Float[Array, "m b h w c"] | None, z: Latents, visits: Visits) -> Float[Array, "n b h w c"]:
    """The noise added after each step: zeros after the last."""
    given, needed = 0 if noise is None else len(noise), len(visits.times) - 1
    if given != needed:
        raise ValueError(f"{needed + 1} steps need {needed} arrays of noise, but {given} were given.")
    zeros = jnp.zeros((1, *z.shape))
    noise = zeros if noise is None else jnp.concatenate([noise, zeros])
    return jnp.where(visits.is_last[:, None, None, None, None], 0, noise)


def _noise_levels(schedule: NoiseSchedule, times: Times) -> Float[Array, " n+1"]:
    """σ/α at the times, linear between the training times or as the schedule spreads them, and 0 at the end.

    Where α_{T−1} = 0 the first level would be infinite; ᾱ = 2⁻²⁴ stands for 0, as in diffusers.
    """
    alphas_cumprod = jnp.where(schedule.alphas_cumprod == 0, 2.0**-24, schedule.alphas_cumprod)
    levels = jnp.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    times = times.astype(jnp.float32)
    levels = jnp.interp(times, jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32), levels)
    if schedule.sampling.levels != "spaced":
        levels = respaced_levels(levels[0], levels[-1], len(times), schedule.sampling.levels).astype(jnp.float32)
    return jnp.append(levels, 0.0)


def _extrapolation(sigmas: Float[Array, " m"], visits: Visits) -> Float[Array, " m-1"]:
    """h/(2 h_previous) of each step of the second order, and 0 for the first step and the last."""
    h = -jnp.diff(jnp.log(sigmas[:-1]))
    ratios = jnp.zeros(len(sigmas) - 1).at[1:-1].set(h[1:] / (2 * h[:-1]))
    return jnp.where(visits.number == 0, 0, ratios)


def _initial_scale(schedule: NoiseSchedule, sigma: Float[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of x = z/α at the start, as in diffusers: of σ/α ε alone, or of z_0 + σ/α ε."""
    return jnp.sqrt(1 + sigma**2) if schedule.sampling.timestep_spacing == "leading" else sigma


def _x0_eps_at(
    denoise: Denoise, schedule: NoiseSchedule, x: Latents, t: Shaped[Array, ""], sigma: Float[Array, ""]
) -> tuple[Latents, Latents]:
    """x̂ and ε̂ at x = z/α, of noise level ``sigma`` = σ/α."""
    alpha = jax.lax.rsqrt(1 + sigma**2)
    z = alpha * x
    return x0_eps(denoise(z, t), z, alpha, alpha * sigma, schedule.prediction_type)


@dataclass(frozen=True)
class Sampler:
    """An entry of `SAMPLERS`.

    Attributes:
      function: the sampler, a function of this file that returns its `Course`.
      is_stochastic: whether it adds fresh noise between its steps, and so takes ``noise``.
      is_counted: whether it takes ``num_steps``: how many of ``timesteps`` to visit; the rest only pad the array.
    """

    function: Callable[..., Course]
    is_stochastic: bool = False
    is_counted: bool = False


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": Sampler(ddim, is_counted=True),
    "euler": Sampler(euler),
    "euler-ancestral": Sampler(euler_ancestral, is_stochastic=True),
    "heun": Sampler(heun),
    "pndm": Sampler(pndm),
    "dpm-solver++": Sampler(dpm_solver_pp_2m),
    "dpm-solver++-sde": Sampler(dpm_solver_pp_2m_sde, is_stochastic=True),
    "lcm": Sampler(lcm, is_stochastic=True, is_counted=True),
    "tcd": Sampler(tcd, is_stochastic=True, is_counted=True),
    "codi": Sampler(codi, is_counted=True),
}
"""The samplers by the names that users know them by."""
