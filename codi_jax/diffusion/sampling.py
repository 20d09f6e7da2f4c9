"""Samplers: from noise to z_0, one function each, to be read against the paper that it names.

All of them are called alike,

    z_0 = sampler(denoise, schedule, z, timesteps)

with ``denoise(z, t)``, the network's raw output, guidance included, for a float32 z of unit variance and one time t for
the whole batch (a scalar: int32, or float32 where a sampler goes between the training times); z ~ N(0, I); and the
descending times of `timesteps_for`. Those that add noise between their steps also take that noise.

Each is one loop, so ``denoise`` is traced and compiled once whatever the number of steps, and all of it works inside
the caller's `jax.jit`. Those of `COUNTED` can take that number as an input, so that one program serves several of them.
``on_step`` is called on the host with the index of every step that is done, ``None`` costs nothing. Times and steps are
those of diffusers' schedulers, to rounding; the notation is `codi_jax.diffusion.schedule`'s.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, assert_never, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, Shaped

from codi_jax.diffusion.schedule import Latents, NoiseSchedule, distillation_grid, x0_eps

Sampler = Literal["ddim", "euler", "euler-ancestral", "pndm", "dpm-solver++", "lcm", "codi"]

Denoise = Callable[[Latents, Shaped[Array, ""]], Latents]

_SCHEDULERS: dict[Sampler, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
    "codi": "DDIMScheduler",  # after "ddim", which a file that names this class and has no grid asks for
}
"""The class of diffusers that samples alike, and whose defaults hold where a file leaves keys out."""

COUNTED: tuple[Sampler, ...] = ("ddim", "lcm", "codi")
"""Samplers that take ``num_steps``: how many of ``timesteps`` to visit, the others being there to fill the array."""

OnStep = Callable[[Any], None] | None
Scale = Num[ArrayLike, ""] | Num[ArrayLike, " b"]
Times = Num[Array, " n"] | Num[np.ndarray, " n"]
Count = Int[Array, ""] | None
Noise = Float[Array, "m b h w c"]
Carry = TypeVar("Carry")
Tree = TypeVar("Tree")


# ---- Guidance


def stack_branches(*branches: Tree) -> Tree:
    """Stacks the inputs of several predictions into one batch, in the order in which they are given.

    Everywhere in this package that order is ``[uncond, cond]``, and for InstructPix2Pix ``[uncond, image_only, full]``
    (diffusers' pipeline for InstructPix2Pix has the opposite order: text, image, uncond).

    Args:
      branches: arrays, or trees of arrays, with a leading batch axis.

    Returns:
      The same tree, with the branches one after the other along the batch axis.
    """
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *branches)


def split_branches(prediction: Float[Array, "b ..."], count: int) -> list[Float[Array, "_b ..."]]:
    """Splits the prediction for a batch of `stack_branches` into ``count`` branches, in the order of the stack."""
    return jnp.split(prediction, count)


def is_guided(guidance_scale: float | int, image_guidance_scale: float | int = 1.0) -> bool:
    """Whether scales ask for guidance: that of the text must be above 1, and that of an edit's image at least 1.

    So it is in all of diffusers' pipelines: at lower scales the prediction is that of the condition alone, not one that
    is led to the unconditional one, which a scale of 0 would be in the formulas below.

    Args:
      guidance_scale: of the text.
      image_guidance_scale: of the image, for InstructPix2Pix.
    """
    return guidance_scale > 1 and image_guidance_scale >= 1


def classifier_free_guidance(uncond: Latents, cond: Latents, guidance_scale: Scale) -> Latents:
    """ε_u + s (ε_c − ε_u) (Ho and Salimans, 2021, equation 6, with s = 1 + w).

    Args:
      uncond: the prediction without the condition.
      cond: the prediction with it.
      guidance_scale: s, one for all samples or one for each; 1 is no guidance.

    Returns:
      The guided prediction.
    """
    return uncond + _latent_rank(guidance_scale) * (cond - uncond)


def instruct_pix2pix_guidance(
    uncond: Latents, image_only: Latents, full: Latents, guidance_scale: Scale, image_guidance_scale: Scale
) -> Latents:
    """ε_u + s_I (ε_i − ε_u) + s_T (ε_t − ε_i) (Brooks et al., 2023, equation 3).

    At s_I = 1 the ε_u cancel, and two passes suffice: ``classifier_free_guidance(image_only, full, guidance_scale)``.

    Args:
      uncond: the prediction with neither text nor image, ε_u.
      image_only: the prediction with the image and the null text, ε_i.
      full: the prediction with both, ε_t.
      guidance_scale: s_T, one for all samples or one for each.
      image_guidance_scale: s_I, likewise.

    Returns:
      The guided prediction.
    """
    s_T, s_I = _latent_rank(guidance_scale), _latent_rank(image_guidance_scale)
    return uncond + s_I * (image_only - uncond) + s_T * (full - image_only)


def _latent_rank(scale: Scale) -> Array:
    scale = jnp.asarray(scale)
    return scale.reshape(scale.shape + (1,) * (4 - scale.ndim))


def guidance_embedding(
    w: Float[Array, " b"], dim: int = 256, w_image: Float[Array, " b"] | None = None
) -> Float[Array, "b {dim}"]:
    """The embedding of a guidance weight for a guidance-distilled network: sin ‖ cos of 1000 w (Luo et al., 2023).

    ``w`` is LCM's weight, the usual guidance scale *minus 1*: a pipeline embeds ``guidance_scale - 1``.

    Args:
      w: guidance weights.
      dim: the network's ``time_cond_proj_dim``, an even number.
      w_image: weights of the image guidance, for a network that takes both: each is embedded in half of ``dim``.

    Returns:
      The embeddings, float32: of the frequencies 10000^(−i/(dim/2 − 1)), first the sines, then the cosines.
    """
    if w_image is not None:
        return jnp.concatenate([guidance_embedding(w, dim // 2), guidance_embedding(w_image, dim // 2)], axis=1)
    frequencies = 10_000.0 ** -np.linspace(0, 1, dim // 2)
    angles = 1000 * w.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


# ---- Times, on the host


def default_sampler(schedule: NoiseSchedule) -> Sampler:
    """The sampler that a model's folder asks for: ``"codi"`` where a CoDi grid is saved, else its scheduler class.

    Raises:
      ValueError: if there is none for that class.
    """
    if schedule.distill_learning_steps is not None:
        return "codi"
    for sampler, scheduler in _SCHEDULERS.items():
        if scheduler == schedule.scheduler:
            return sampler
    raise ValueError(f"There is no sampler for {schedule.scheduler}: choose one of {', '.join(get_args(Sampler))}.")


def most_steps(schedule: NoiseSchedule, wanted: int) -> int:
    """So many steps of the default sampler, or as many as a model that was distilled for fewer can take."""
    if schedule.generator_timesteps is not None:
        return min(wanted, len(schedule.generator_timesteps))
    grids = {"lcm": schedule.original_inference_steps, "codi": schedule.distill_learning_steps}
    return min(wanted, grids.get(default_sampler(schedule)) or wanted)


def timesteps_for(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """The descending times of a sampler, as diffusers' ``set_timesteps`` gives them.

    Args:
      sampler: which one.
      schedule: the model's.
      steps: their number. ``"pndm"`` evaluates the network once more, and so returns one time more.

    Returns:
      The times, int32; float32 for ``"euler"`` and ``"euler-ancestral"``.

    Raises:
      ValueError: if the schedule has fewer such times than ``steps``, or its configuration asks for a variant of the
        sampler that is not implemented.
    """
    _check_variant(sampler, schedule)
    schedule = schedule.read_by(_SCHEDULERS[sampler])
    match sampler:
        case "ddim":
            return _spaced(schedule, steps).round().astype(np.int32)
        case "euler" | "euler-ancestral":
            return _spaced(schedule, steps).astype(np.float32)
        case "pndm":
            times = _spaced(schedule, steps).round().astype(np.int32)
            return np.concatenate([times[:2], times[1:]])  # the second time is visited twice, see `pndm`
        case "dpm-solver++":
            return _dpm_solver_times(schedule, steps)
        case "lcm":
            return _lcm_times(schedule, steps)
        case "codi":
            return _codi_times(schedule, steps)
        case _:
            assert_never(sampler)


def _spaced(schedule: NoiseSchedule, steps: int) -> Float[np.ndarray, " n"]:
    """Table 2 of Lin et al., 2024, descending."""
    T = schedule.num_train_timesteps
    _check_steps(steps, T)
    match schedule.timestep_spacing:
        case "linspace":
            times = np.linspace(0, T - 1, steps)[::-1]
        case "leading":
            times = np.arange(steps)[::-1] * (T // steps) + float(schedule.steps_offset)
        case "trailing":  # arange may give one time too many, by rounding: diffusers then steps on to t = -1
            times = np.arange(T, 0, -T / steps)[:steps].round() - 1
    return _check_range(times, schedule)


def _dpm_solver_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    """As `_spaced`, but linspace and leading put the last of ``steps`` + 1 times, the end, at 0."""
    T = schedule.num_train_timesteps
    _check_steps(steps, T)
    match schedule.timestep_spacing:
        case "linspace":
            times = np.linspace(0, T - 1, steps + 1).round()[:0:-1]
        case "leading":
            times = np.arange(steps + 1)[:0:-1] * (T // (steps + 1)) + float(schedule.steps_offset)
        case "trailing":
            times = _spaced(schedule, steps)
    if np.any(np.diff(times) >= 0):
        raise ValueError(
            f"steps = {steps}: {T} training timesteps have not so many distinct times; choose fewer steps."
        )
    return _check_range(times, schedule).astype(np.int32)


def _lcm_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    if schedule.generator_timesteps is not None:
        # The first ones: a generator has seen nothing but what it makes of noise at the times before.
        times = np.asarray(schedule.generator_timesteps, np.int32)
        _check_steps(steps, len(times), " (the timesteps that the generator was trained at)")
        return times[:steps]
    grid, _ = distillation_grid(schedule.num_train_timesteps, schedule.original_inference_steps)
    return _thinned(grid, steps, "original_inference_steps")


def _codi_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    if schedule.distill_learning_steps is None:
        raise ValueError(
            "The codi sampler needs the grid that the student was distilled on: scheduler_config.json has no "
            "distill_learning_steps. Sample this model with another sampler, such as ddim."
        )
    grid, _ = distillation_grid(schedule.num_train_timesteps, schedule.distill_learning_steps, schedule.distill_grid)
    return _thinned(grid, steps, "distill_learning_steps")


def _thinned(grid: Int[np.ndarray, " N"], steps: int, key: str) -> Int[np.ndarray, " n"]:
    """``steps`` evenly spread times of an ascending grid, from its last one down."""
    _check_steps(steps, len(grid), f" ({key}, the grid that the model was distilled on)")
    return grid[::-1][np.linspace(0, len(grid), steps, endpoint=False).astype(int)]


def _check_steps(steps: int, most: int, meaning: str = " (num_train_timesteps)") -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps = {steps}: choose 1 to {most}{meaning}.")


def _check_range(times: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    if times[0] >= schedule.num_train_timesteps:
        raise ValueError(
            f"steps = {len(times)} with steps_offset = {schedule.steps_offset} starts at t = {times[0]:.0f}, beyond "
            f"the last training timestep {schedule.num_train_timesteps - 1}: choose fewer steps."
        )
    return times


def _check_variant(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """Refuses what diffusers would honor and `sampler` does not."""
    config = schedule.to_config()
    needed: dict[str, tuple[Any, ...]] = {}
    if sampler in ("euler", "dpm-solver++"):
        spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        needed = {**dict.fromkeys(spacings, (False,)), "final_sigmas_type": ("zero",)}
    if sampler == "euler":
        needed |= {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}
    if sampler == "dpm-solver++":
        needed |= {"algorithm_type": ("dpmsolver++",), "solver_order": (2,), "solver_type": ("midpoint",)}
        needed |= {"lambda_min_clipped": (-np.inf,)}
    if sampler == "pndm":
        needed = {"skip_prk_steps": (True,), "prediction_type": ("epsilon", "v_prediction")}
        config.setdefault("skip_prk_steps", schedule.scheduler != "PNDMScheduler")
    for key, values in needed.items():
        if config.get(key) is not None and config[key] not in values:
            raise ValueError(
                f"scheduler_config.json: the sampler {sampler} does not support {key} = {config[key]!r}, only "
                f"{' or '.join(map(repr, values))}: choose another sampler."
            )


# ---- Samplers


def sample(
    sampler: Sampler,
    denoise: Denoise,
    schedule: NoiseSchedule,
    z: Latents,
    timesteps: Times,
    noise: Noise | None = None,
    *,
    num_steps: Count = None,
    on_step: OnStep = None,
) -> Latents:
    """Runs the sampler of that name.

    Args:
      sampler: which one.
      denoise: the network, see the top of this file.
      schedule: the model's.
      z: noise, N(0, I).
      timesteps: from `timesteps_for`.
      noise: N(0, I), one less than there are times: what `is_stochastic` samplers add. The others ignore it.
      num_steps: how many of the times to visit, for the samplers of `COUNTED`; ``None`` is all.
      on_step: called with the index of every step that is done.

    Returns:
      The clean latents z_0, float32.

    Raises:
      ValueError: if there is not one array of noise less than there are times, or the sampler cannot be counted.
    """
    if num_steps is not None and sampler not in COUNTED:
        raise ValueError(f"the sampler {sampler} visits all of its timesteps: give no num_steps.")
    schedule = schedule.read_by(_SCHEDULERS[sampler])
    match sampler:
        case "ddim":
            return ddim(denoise, schedule, z, timesteps, num_steps=num_steps, on_step=on_step)
        case "euler":
            return euler(denoise, schedule, z, timesteps, on_step=on_step)
        case "euler-ancestral":
            return euler_ancestral(denoise, schedule, z, timesteps, noise, on_step=on_step)
        case "pndm":
            return pndm(denoise, schedule, z, timesteps, on_step=on_step)
        case "dpm-solver++":
            return dpm_solver_pp_2m(denoise, schedule, z, timesteps, on_step=on_step)
        case "lcm":
            return lcm(denoise, schedule, z, timesteps, noise, num_steps=num_steps, on_step=on_step)
        case "codi":
            return codi(denoise, schedule, z, timesteps, num_steps=num_steps, on_step=on_step)
        case _:
            assert_never(sampler)


def is_stochastic(sampler: Sampler) -> bool:
    """Whether the sampler adds fresh noise between its steps, and so takes ``noise``."""
    return sampler in ("euler-ancestral", "lcm")


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

    As in diffusers each step ends ⌊T/n⌋ below its start, which for linspace spacing is not where the next one starts,
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

    Their Runge-Kutta start is replaced, as in Stable Diffusion (``skip_prk_steps``), by a step that is repeated
    with the mean of the outputs at its two ends, so the second time is visited twice. Orders 2, 3, 4, 4 … follow.
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
    h = -jnp.diff(jnp.log(sigmas[:-1]))
    extrapolation = jnp.zeros(len(sigmas) - 1).at[1:-1].set(h[1:] / (2 * h[:-1]))

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

    x̂ = f(z_t, t), then fresh noise up to the next time; the last x̂ is returned. Any descending times will do: a
    one-step generator that starts at t = 399 is sampled with ``timesteps = [399]``.
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

    The boundary scalings enter x̂ alone, not ε̂; the last x̂ is returned.
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
            # A number of the step's result makes the report wait for it.
            done = jax.tree.leaves(carry)[0][0, 0, 0, 0]
            jax.debug.callback(lambda index, _, report=on_step: report(index), index, done)
        return carry

    return jax.lax.fori_loop(0, len(per_step[0]) if num_steps is None else num_steps, body, carry)


def _following(timesteps: Int[Array, " n"]) -> Int[Array, " n"]:
    """The time after each; the last one's is never used."""
    return jnp.concatenate([timesteps[1:], timesteps[-1:]])


def _for_every_step(noise: Noise | None, z: Latents, timesteps: Times) -> Float[Array, "n b h w c"]:
    """The noise that follows each step: zeros follow the last."""
    given, needed = 0 if noise is None else len(noise), len(timesteps) - 1
    if given != needed:
        raise ValueError(f"{needed + 1} steps need {needed} arrays of noise, but {given} were given.")
    zeros = jnp.zeros((1, *z.shape))
    return zeros if noise is None else jnp.concatenate([noise, zeros])


def _noise_levels(schedule: NoiseSchedule, timesteps: Times) -> Float[Array, " n+1"]:
    """σ/α at the times, linear between the training times, and 0 at the end.

    Where α_{T−1} = 0 the first level would be infinite; ᾱ = 2⁻²⁴ stands for 0, as in diffusers.
    """
    alphas_cumprod = jnp.where(schedule.alphas_cumprod == 0, 2.0**-24, schedule.alphas_cumprod)
    levels = jnp.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    times = jnp.asarray(timesteps, jnp.float32)
    levels = jnp.interp(times, jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32), levels)
    return jnp.append(levels, 0.0)


def _initial_scale(schedule: NoiseSchedule, sigma: Float[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of x = z/α at the start, as diffusers has it: of σ/α ε alone, or of z_0 + σ/α ε."""
    return jnp.sqrt(1 + sigma**2) if schedule.timestep_spacing == "leading" else sigma


def _x0_eps_at(
    denoise: Denoise, schedule: NoiseSchedule, x: Latents, t: Shaped[Array, ""], sigma: Float[Array, ""]
) -> tuple[Latents, Latents]:
    """x̂ and ε̂ at x = z/α, of noise level ``sigma`` = σ/α."""
    alpha = jax.lax.rsqrt(1 + sigma**2)
    z = alpha * x
    return x0_eps(denoise(z, t), z, alpha, alpha * sigma, schedule.prediction_type)
