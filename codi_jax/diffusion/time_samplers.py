"""Samplers that go from time to time, in z; one function each, to be read next to the paper it names.

See `codi_jax.diffusion.samplers`, which runs them. The notation is `codi_jax.diffusion.schedule`'s.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from codi_jax.diffusion.courses import Course, Denoise, Levels, Noise, Times, Visits
from codi_jax.diffusion.schedule import Latents, NoiseSchedule


def ddim(
    denoise: Denoise, schedule: NoiseSchedule, visits: Visits, noise: Noise | None = None, eta: Float[ArrayLike, ""] = 0
) -> Course:
    """DDIM (Song et al., 2021, equation 12): z_s = α_s x̂ + √(σ_s² − η² v) ε̂ + η √v ε, v = (σ_s/σ)² (1 − (α/α_s)²).

    η = 0 adds no noise, and η = 1 is DDPM (their equation 16); nothing is added after the last step. As in diffusers,
    each step ends ⌊T/n⌋ below its start, which with linspace spacing is not where the next one starts, and the last
    step ends at ᾱ_{−1} (see `NoiseSchedule`).
    """

    def step(carry: tuple, t: Array, s: Array) -> tuple:
        (z,) = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        return (schedule.ddim_step(x0, eps, s),)

    def noisy_step(carry: tuple, t: Array, s: Array, is_last: Array, noise: Latents) -> tuple:
        (z,) = carry
        x0, eps = schedule.to_x0_eps(denoise(z, t), z, t)
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        v = jnp.where(is_last, 0, (eta * sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2))
        return (alpha_s * x0 + jnp.sqrt(sigma_s**2 - v) * eps + jnp.sqrt(v) * noise,)

    ends = visits.times - schedule.num_train_timesteps // visits.count
    start, levels = _at_first(schedule, visits), _levels(schedule, ends)
    if noise is None:
        return Course(step, (visits.times, ends), start, levels)
    return Course(noisy_step, (visits.times, ends, visits.is_last, noise), start, levels)


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
