"""Samplers: from noise to z_0, one function each, to be read next to the paper it names.

All of them are called the same way,

    z_0 = sampler(denoise, schedule, z, timesteps)

with ``denoise(z, t)``, the network's raw output, guidance included, for a float32 z of unit variance and one time t for
the whole batch (a scalar: int32, or float32 where a sampler goes between the training times); z ~ N(0, I); and the
descending times of `codi_jax.diffusion.timesteps`. Samplers that add noise between steps take that noise too.

Each is one loop, so ``denoise`` is traced and compiled once whatever the number of steps, and all of it works inside
the caller's `jax.jit`. Samplers marked as counted in `SAMPLERS` can take the number of steps as an input, so that one
program serves several. ``on_step`` is called on the host with the index of every finished step; ``None`` costs nothing.
Times and steps match diffusers' schedulers up to rounding; the notation is `codi_jax.diffusion.schedule`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, Shaped

from codi_jax.diffusion.noise_levels import respaced_levels
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, x0_eps
from codi_jax.diffusion.scheduler_config import SamplerName

Denoise = Callable[[Latents, Shaped[Array, ""]], Latents]
OnStep = Callable[[Any], None] | None
Times = Num[Array, " n"] | Num[np.ndarray, " n"]
Count = Int[Array, ""] | None
Noise = Float[Array, "m b h w c"]
Carry = TypeVar("Carry")


def sample(
    sampler: SamplerName,
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    gamma: Float[ArrayLike, ""] = 0.3,
    num_steps: Count = None,
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
    options: dict[str, Any] = {"on_step": on_step}
    if entry.is_stochastic:
        options["noise"] = noise
    if entry.is_counted:
        options["num_steps"] = num_steps
    if sampler == "tcd":
        options["gamma"] = gamma
    return entry.function(denoise, schedule.read_by(sampler), z, timesteps, **options)


def ddim(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    *,
    num_steps: Count = None,
    on_step: OnStep = None,
) -> Latents:
    """DDIM without added noise (Song et al., 2021, equation 12 with σ = 0): z_s = α_s x̂ + σ_s ε̂.

    As in diffusers, each step ends ⌊T/n⌋ below its start, which with linspace spacing is not where the next one starts,
    and the last step ends at ᾱ_{−1} (see `NoiseSchedule`).
    """
    timesteps = jnp.asarray(timesteps)
    stride = schedule.num_train_timesteps // (len(timesteps) if num_steps is None else num_steps)

    def step(z: Latents, t: Array, s: Array) -> Latents:
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        return schedule.ddim_step(x0, eps, s)

    return _scan(step, z.astype(jnp.float32), (timesteps, timesteps - stride), on_step, num_steps)


def euler(
    denoise: Denoise, schedule: NoiseSchedule, z: Latents, timesteps: Times, *, on_step: OnStep = None
) -> Latents:
    """Euler's method on the probability flow ODE (Karras et al., 2022, algorithm 1 without the correction).

    In x = z/α, whose noise level is σ/α (here ``sigma``): d = (x − x̂)/sigma = ε̂, and x + (sigma' − sigma) d =
    x̂ + sigma' ε̂, down to sigma = 0.
    """
    sigmas = _noise_levels(schedule, timesteps)

    def step(x: Latents, t: Array, sigma: Array, next_sigma: Array) -> Latents:
        x0, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        return x0 + next_sigma * eps

    x = z.astype(jnp.float32) * _initial_scale(schedule, sigmas[0])
    return _scan(step, x, (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:]), on_step)


def euler_ancestral(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    on_step: OnStep = None,
) -> Latents:
    """Euler steps to below the next level, then noise up to it: ancestral sampling (Ho et al., 2020, algorithm 2).

    In the variables of `euler`: the step ends at sigma'²/sigma, and the noise has the variance of the posterior
    q(x' | x, x_0), sigma'² (1 − sigma'²/sigma²) (Song et al., 2021, equation 16 with η = 1).
    """
    sigmas = _noise_levels(schedule, timesteps)
    noise = _for_every_step(noise, z, timesteps)

    def step(x: Latents, t: Array, sigma: Array, next_sigma: Array, noise: Latents) -> Latents:
        x0, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        ratio = next_sigma / sigma
        return x0 + next_sigma * (ratio * eps + jnp.sqrt(1 - ratio**2) * noise)

    x = z.astype(jnp.float32) * _initial_scale(schedule, sigmas[0])
    return _scan(step, x, (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:], noise), on_step)


def pndm(denoise: Denoise, schedule: NoiseSchedule, z: Latents, timesteps: Times, *, on_step: OnStep = None) -> Latents:
    """PLMS: DDIM steps with an Adams-Bashforth combination of the last four outputs (Liu et al., 2022, algorithm 2).

    Their Runge-Kutta start is replaced, as in Stable Diffusion (``skip_prk_steps``), by a step that is repeated with
    the mean of the outputs at its two ends; hence the second time is visited twice. Orders 2, 3, 4, 4 … follow.
    """
    timesteps = jnp.asarray(timesteps)
    n = len(timesteps)
    stride = schedule.num_train_timesteps // max(n - 1, 1)
    repeats = jnp.arange(n) == 1
    start = timesteps + stride * repeats
    weights = jnp.array([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]])
    last = jnp.array([[55 / 24, -59 / 24, 37 / 24, -9 / 24]])
    weights = jnp.concatenate([weights, jnp.repeat(last, max(n - 4, 0), axis=0)])[:n]
    first_z = z = z.astype(jnp.float32)

    def step(carry: tuple, t: Array, start: Array, w: Array, repeats: Array) -> tuple:
        z, (e1, e2, e3) = carry
        e = denoise(z, t).astype(jnp.float32)
        combined = w[0] * e + w[1] * e1 + w[2] * e2 + w[3] * e3
        z = jnp.where(repeats, first_z, z)
        x0, eps = schedule.to_x0_eps(combined, z, start)
        history = jax.lax.cond(repeats, lambda: (e1, e2, e3), lambda: (e, e1, e2))
        return schedule.ddim_step(x0, eps, start - stride), history

    history = (jnp.zeros_like(z),) * 3
    z, _ = _scan(step, (z, history), (timesteps, start, weights, repeats), on_step)
    return z


def dpm_solver_pp_2m(
    denoise: Denoise, schedule: NoiseSchedule, z: Latents, timesteps: Times, *, on_step: OnStep = None
) -> Latents:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), with first-order steps at the start and to the end, σ = 0.

    With λ = log(α/σ) and h = λ' − λ: z' = (σ'/σ) z − α' (e^−h − 1) D, D = x̂ + h/(2 h_previous) (x̂ − x̂_previous).
    """
    sigmas = _noise_levels(schedule, timesteps)  # σ/α = e^−λ
    extrapolation = _extrapolation(sigmas)

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array, extrapolation: Array) -> tuple:
        x, previous = carry  # x = z/α
        x0, _ = _x0_eps_at(denoise, schedule, x, t, sigma)
        D = x0 + extrapolation * (x0 - previous)
        ratio = next_sigma / sigma  # e^−h
        return ratio * x + (1 - ratio) * D, x0

    z = z.astype(jnp.float32)
    x = z * jnp.sqrt(1 + sigmas[0] ** 2)
    steps = (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:], extrapolation)
    x, _ = _scan(step, (x, jnp.zeros_like(z)), steps, on_step)
    return x


def dpm_solver_pp_2m_sde(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    on_step: OnStep = None,
) -> Latents:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, section 5.2 and appendix B.4): `dpm_solver_pp_2m` on the reverse SDE.

    z' = (σ'/σ) e^−h z + α' (1 − e^−2h) D + σ' √(1 − e^−2h) ε, with the same D.
    """
    sigmas = _noise_levels(schedule, timesteps)
    extrapolation = _extrapolation(sigmas)
    noise = _for_every_step(noise, z, timesteps)

    def step(carry: tuple, t: Array, sigma: Array, next_sigma: Array, extrapolation: Array, noise: Latents) -> tuple:
        x, previous = carry  # x = z/α
        x0, _ = _x0_eps_at(denoise, schedule, x, t, sigma)
        D = x0 + extrapolation * (x0 - previous)
        kept = (next_sigma / sigma) ** 2  # e^−2h
        return kept * x + (1 - kept) * D + next_sigma * jnp.sqrt(1 - kept) * noise, x0

    z = z.astype(jnp.float32)
    x = z * jnp.sqrt(1 + sigmas[0] ** 2)
    steps = (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:], extrapolation, noise)
    x, _ = _scan(step, (x, jnp.zeros_like(z)), steps, on_step)
    return x


def heun(denoise: Denoise, schedule: NoiseSchedule, z: Latents, timesteps: Times, *, on_step: OnStep = None) -> Latents:
    """Heun's method on the probability flow ODE (Karras et al., 2022, algorithm 1 without churn).

    In the variables of `euler`: a step to sigma', and the same step again with the mean of the slopes at its two ends,
    except for the last one, to sigma = 0. The times have each end twice: for the second slope, and for the next step.
    """
    timesteps = jnp.asarray(timesteps)
    sigmas = _noise_levels(schedule, jnp.concatenate([timesteps[:1], timesteps[1::2]]))
    number = np.arange(len(timesteps))
    is_second, step_of = number % 2 == 1, number // 2
    level = sigmas[np.where(is_second, step_of + 1, step_of)]
    length = jnp.diff(sigmas)[step_of]

    def step(carry: tuple, t: Array, sigma: Array, length: Array, is_second: Array) -> tuple:
        x, start, slope = carry
        _, eps = _x0_eps_at(denoise, schedule, x, t, sigma)
        once, again = x + length * eps, start + length * (slope + eps) / 2
        kept = jax.tree.map(lambda old, new: jnp.where(is_second, old, new), (start, slope), (x, eps))
        return jnp.where(is_second, again, once), *kept

    x = z.astype(jnp.float32) * _initial_scale(schedule, sigmas[0])
    x, *_ = _scan(step, (x, x, jnp.zeros_like(x)), (timesteps, level, length, jnp.asarray(is_second)), on_step)
    return x


def lcm(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    num_steps: Count = None,
    on_step: OnStep = None,
) -> Latents:
    """Multistep consistency sampling (Song et al., 2023, algorithm 1; Luo et al., 2023, algorithm 3).

    x̂ = f(z_t, t), then fresh noise up to the next time; the last x̂ is returned. Any descending times work: a one-step
    generator that starts at t = 399 is sampled with ``timesteps = [399]``.
    """
    timesteps = jnp.asarray(timesteps)

    def step(carry: tuple, t: Array, s: Array, noise: Latents) -> tuple:
        z, _ = carry
        x0, _ = schedule.to_x0_eps(denoise(z, t), z, t)
        x0 = schedule.consistency(z, x0, t)
        return schedule.add_noise(x0, noise, s), x0

    z = z.astype(jnp.float32)
    noise = _for_every_step(noise, z, timesteps)
    _, x0 = _scan(step, (z, z), (timesteps, _following(timesteps), noise), on_step, num_steps)
    return x0


def tcd(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    gamma: Float[ArrayLike, ""] = 0.3,
    num_steps: Count = None,
    on_step: OnStep = None,
) -> Latents:
    """Strategic stochastic sampling of TCD (Zheng et al., 2024, algorithm 4).

    From t the trajectory function leads past the next time t' to s = ⌊(1 − γ) t'⌋, and fresh noise back up to t':
    z' = (α'/α_s) f^{→s}(z_t, t) + √(1 − (α'/α_s)²) ε. The last step goes to t' = 0. γ, diffusers' ``eta``, is 0 for
    deterministic sampling and 1 for consistency sampling.
    """
    timesteps = jnp.asarray(timesteps)
    last = (len(timesteps) if num_steps is None else num_steps) - 1
    following = jnp.where(jnp.arange(len(timesteps)) == last, 0, _following(timesteps))

    def step(z: Latents, t: Array, t_next: Array, noise: Latents) -> Latents:
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        s = jnp.floor((1 - gamma) * t_next).astype(jnp.int32)
        a_s, a = schedule.alphas_cumprod_at(s), schedule.alphas_cumprod_at(t_next)  # α²
        # Exactly no noise where s = t', which 1 - (α'/α_s)² would not give; the padding after the last visited time is
        # arbitrary.
        z_s, added = schedule.ddim_step(x0, eps, s), jnp.maximum(a_s - a, 0)
        return (jnp.sqrt(a) * z_s + jnp.where(added > 0, jnp.sqrt(added) * noise, 0)) / jnp.sqrt(a_s)

    noise = _for_every_step(noise, z, timesteps)
    return _scan(step, z.astype(jnp.float32), (timesteps, following, noise), on_step, num_steps)


def codi(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    *,
    num_steps: Count = None,
    on_step: OnStep = None,
) -> Latents:
    """The sampler of CoDi (Mei et al., 2024): DDIM from x̂ = f(z_t, t), along the grid that the student was trained on.

    The boundary scalings affect only x̂, not ε̂; the last x̂ is returned.
    """
    timesteps = jnp.asarray(timesteps)

    def step(carry: tuple, t: Array, s: Array) -> tuple:
        z, _ = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        x0 = schedule.consistency(z, x0, t)
        return schedule.ddim_step(x0, eps, s), x0

    z = z.astype(jnp.float32)
    _, x0 = _scan(step, (z, z), (timesteps, _following(timesteps)), on_step, num_steps)
    return x0


def _scan(
    step: Callable[..., Carry],
    carry: Carry,
    per_step: tuple[Array, ...],
    on_step: OnStep,
    num_steps: Count = None,
) -> Carry:
    """``carry = step(carry, *values)`` with the values of every step, or of the first ``num_steps``."""

    def body(index: Array, carry: Carry) -> Carry:
        carry = step(carry, *(values[index] for values in per_step))
        if on_step is not None:
            # Passing one element of the step's result makes the report wait for it.
            done = jax.tree.leaves(carry)[0][0, 0, 0, 0]
            jax.debug.callback(lambda index, _, report=on_step: report(index), index, done)
        return carry

    return jax.lax.fori_loop(0, len(per_step[0]) if num_steps is None else num_steps, body, carry)


def _following(timesteps: Int[Array, " n"]) -> Int[Array, " n"]:
    """The time that follows each one; the last one's is never used."""
    return jnp.concatenate([timesteps[1:], timesteps[-1:]])


def _for_every_step(noise: Noise | None, z: Latents, timesteps: Times) -> Float[Array, "n b h w c"]:
    """The noise added after each step: zeros after the last."""
    given, needed = 0 if noise is None else len(noise), len(timesteps) - 1
    if given != needed:
        raise ValueError(f"{needed + 1} steps need {needed} arrays of noise, but {given} were given.")
    zeros = jnp.zeros((1, *z.shape))
    return zeros if noise is None else jnp.concatenate([noise, zeros])


def _noise_levels(schedule: NoiseSchedule, timesteps: Times) -> Float[Array, " n+1"]:
    """σ/α at the times, linear between the training times or as the schedule spreads them, and 0 at the end.

    Where α_{T−1} = 0 the first level would be infinite; ᾱ = 2⁻²⁴ stands for 0, as in diffusers.
    """
    alphas_cumprod = jnp.where(schedule.alphas_cumprod == 0, 2.0**-24, schedule.alphas_cumprod)
    levels = jnp.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    times = jnp.asarray(timesteps, jnp.float32)
    levels = jnp.interp(times, jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32), levels)
    if schedule.sampling.levels != "spaced":
        levels = respaced_levels(levels[0], levels[-1], len(times), schedule.sampling.levels).astype(jnp.float32)
    return jnp.append(levels, 0.0)


def _extrapolation(sigmas: Float[Array, " n"]) -> Float[Array, " n-1"]:
    """h/(2 h_previous) of each step of the second order, and 0 for the first step and the last."""
    h = -jnp.diff(jnp.log(sigmas[:-1]))
    return jnp.zeros(len(sigmas) - 1).at[1:-1].set(h[1:] / (2 * h[:-1]))


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
      function: the sampler, a function of this file.
      is_stochastic: whether it adds fresh noise between its steps, and so takes ``noise``.
      is_counted: whether it takes ``num_steps``: how many of ``timesteps`` to visit; the rest only pad the array.
    """

    function: Callable[..., Latents]
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
