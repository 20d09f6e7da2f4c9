"""Samplers that go from noise level to noise level, in x = z/α; one function each, to be read next to its paper.

See `codi_jax.diffusion.samplers`, which runs them. The notation is `codi_jax.diffusion.schedule`'s; the noise level of
x is σ/α, here ``sigma``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from codi_jax.diffusion.courses import Course, Denoise, Noise, Times, Visits
from codi_jax.diffusion.noise_levels import respaced_levels
from codi_jax.diffusion.schedule import Latents, NoiseSchedule, x0_eps


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

    return _over_alpha(step, visits, sigmas, _of_unit_variance(sigmas[0]), _extrapolation(sigmas, visits), memory=1)


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

    return _over_alpha(
        step, visits, sigmas, _of_unit_variance(sigmas[0]), _extrapolation(sigmas, visits), noise, memory=1
    )


def unipc(denoise: Denoise, schedule: NoiseSchedule, visits: Visits) -> Course:
    """UniPC of order 2 with B(h) = e^h − 1 (Zhao et al., 2023, algorithms 1 and 2, with x̂ instead of ε̂).

    The predictor is `dpm_solver_pp_2m`. Once the network was evaluated where it ends, the corrector takes the same step
    again with that output: with D_i = x̂_i − x̂_0, of the output before the step's own x̂_0 and of the new one,
    x' = (σ'/σ) x + (1 − σ'/σ) (x̂_0 + Σ ρ_i D_i / r_i), where r_i are the distances in λ in units of the step.
    """
    sigmas = _noise_levels(schedule, visits.times)
    ratios, old_shares, new_shares = _correction(sigmas, visits)

    def step(
        carry: tuple, t: Array, sigma: Array, next_sigma: Array, number: Array, extrapolation: Array, ratio: Array,
        old_share: Array, new_share: Array,
    ) -> tuple:  # fmt: skip
        x, start, x0, before = carry  # where the last step began, and the outputs there and one step earlier
        new, _ = _x0_eps_at(denoise, schedule, x, t, sigma)
        D = x0 + old_share * (before - x0) + new_share * (new - x0)
        x = jnp.where(number == 0, x, ratio * start + (1 - ratio) * D)
        ratio = next_sigma / sigma
        D = new + extrapolation * (new - x0)
        return ratio * x + (1 - ratio) * D, x, new, x0

    values = visits.number, _extrapolation(sigmas, visits), ratios, old_shares, new_shares
    return _over_alpha(step, visits, sigmas, _of_unit_variance(sigmas[0]), *values, memory=3)


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


def _correction(sigmas: Float[Array, " m"], visits: Visits) -> tuple[Array, Array, Array]:
    """For each step of `unipc` how the step before it is corrected: its e^−h, and ρ_1/r_1 and ρ_2 with r_2 = 1.

    Of second order, except for the first step, where only the new output counts: ρ = 1/2.
    """
    h = jnp.diff(jnp.log(sigmas[:-1]), prepend=jnp.nan)  # −h of the step that ends at each level
    earlier = jnp.roll(h, 1) / -h  # r_1
    B = jnp.expm1(h)
    b_1 = (B / h - 1) / B
    b_2 = 2 * ((B / h - 1) / h - 1 / 2) / B
    rho_1 = (b_1 - b_2) / (1 - earlier)
    is_second_order = visits.number > 1
    old = jnp.where(is_second_order, rho_1 / earlier, 0)
    new = jnp.where(is_second_order, b_1 - rho_1, 1 / 2)
    return jnp.exp(h), old, new


def _initial_scale(schedule: NoiseSchedule, sigma: Float[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of x = z/α at the start, as in diffusers: of σ/α ε alone, or of z_0 + σ/α ε."""
    return _of_unit_variance(sigma) if schedule.sampling.timestep_spacing == "leading" else sigma


def _of_unit_variance(sigma: Float[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of x = z/α where z has unit variance."""
    return jnp.sqrt(1 + sigma**2)


def _x0_eps_at(
    denoise: Denoise, schedule: NoiseSchedule, x: Latents, t: Shaped[Array, ""], sigma: Float[Array, ""]
) -> tuple[Latents, Latents]:
    """x̂ and ε̂ at x = z/α, of noise level ``sigma`` = σ/α."""
    alpha = jax.lax.rsqrt(1 + sigma**2)
    z = alpha * x
    return x0_eps(denoise(z, t), z, alpha, alpha * sigma, schedule.prediction_type)
