"""The times at which samplers evaluate the network, descending, as in diffusers' ``set_timesteps``; on the host."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int

from codi_jax.diffusion.noise_levels import respaced_levels
from codi_jax.diffusion.schedule import NoiseSchedule, distillation_grid
from codi_jax.diffusion.scheduler_config import SamplerName


def default_sampler(schedule: NoiseSchedule) -> SamplerName:
    """The sampler that a model's folder asks for: ``"codi"`` if a CoDi grid is saved, else its scheduler class's.

    Raises:
      ValueError: if there is no sampler for that class.
    """
    if schedule.sampling.sampler is None:
        raise ValueError(
            f"There is no sampler for {schedule.sampling.scheduler}: choose one of {', '.join(get_args(SamplerName))}."
        )
    return schedule.sampling.sampler


def timesteps_for(sampler: SamplerName, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """The descending times of a sampler, as from diffusers' ``set_timesteps``.

    Examples:
      >>> timesteps_for("lcm", schedule, steps=4)

    Args:
      sampler: the sampler's name.
      schedule: the model's noise schedule.
      steps: the number of steps. ``"pndm"`` evaluates the network once more, so it returns one more time; ``"heun"``
        twice in every step but the last.

    Returns:
      The times, int32; float32 for ``"euler"``, ``"euler-ancestral"`` and ``"heun"``.

    Raises:
      ValueError: if the schedule has fewer such times than ``steps``, or its configuration asks for an unsupported
        variant of the sampler.
    """
    _check_variant(sampler, schedule)
    return _TIMES[sampler](schedule.read_by(sampler), steps)


def visited_times(sampler: SamplerName, times: np.ndarray, skipped: int) -> np.ndarray:
    """The times at which a sampler evaluates the network where it leaves out the first ones.

    Args:
      sampler: the sampler's name.
      times: all of its times.
      skipped: how many evaluations are left out.
    """
    if sampler != "pndm" or not skipped:
        return times[skipped:]
    once = np.delete(times, 1)[-max(len(times) - skipped - 1, 1) :]
    return np.concatenate([once[:2], once[1:]])  # of those that are left, too, the second is visited twice


def _ddim_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    return _spaced(schedule, steps).round().astype(np.int32)


def _euler_times(schedule: NoiseSchedule, steps: int) -> Float[np.ndarray, " n"]:
    times = _spaced(schedule, steps)
    if schedule.sampling.levels != "spaced":
        times = _respaced(schedule, times[0], times[-1], steps)
    return times.astype(np.float32)


def _heun_times(schedule: NoiseSchedule, steps: int) -> Float[np.ndarray, " m"]:
    times = _euler_times(schedule, steps)
    return np.concatenate([times[:1], times[1:].repeat(2)])  # a step's end is where the next one begins


def _respaced(schedule: NoiseSchedule, first: float | int, last: float | int, steps: int) -> Float[np.ndarray, " n"]:
    """The times at which log σ/α, linear between the training times, has the values of other levels."""
    levels = np.sqrt((1 - np.asarray(schedule.alphas_cumprod, np.float64)) / np.asarray(schedule.alphas_cumprod))
    numbers = np.arange(len(levels))
    ends = np.interp([first, last], numbers, levels)
    return np.interp(
        np.log(respaced_levels(ends[0], ends[1], steps, schedule.sampling.levels)), np.log(levels), numbers
    )


def _pndm_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    times = _ddim_times(schedule, steps)
    return np.concatenate([times[:2], times[1:]])  # the second time is visited twice, see `time_samplers.pndm`


def _spaced(schedule: NoiseSchedule, steps: int) -> Float[np.ndarray, " n"]:
    """Table 2 of Lin et al., 2024, descending."""
    T = schedule.num_train_timesteps
    _check_steps(steps, T)
    match schedule.sampling.timestep_spacing:
        case "linspace":
            times = np.linspace(0, T - 1, steps)[::-1]
        case "leading":
            times = np.arange(steps)[::-1] * (T // steps) + float(schedule.sampling.steps_offset)
        case "trailing":  # rounding can make arange return one time too many: diffusers then steps on to t = -1
            times = np.arange(T, 0, -T / steps)[:steps].round() - 1
    return _check_range(times, schedule)


def _dpm_solver_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    """Like `_spaced`, but linspace and leading put the last of ``steps`` + 1 times, the end, at 0."""
    T = schedule.num_train_timesteps
    _check_steps(steps, T)
    if schedule.sampling.levels != "spaced":
        return _respaced(schedule, T - 1, 0, steps).round().astype(np.int32)
    match schedule.sampling.timestep_spacing:
        case "linspace":
            times = np.linspace(0, T - 1, steps + 1).round()[:0:-1]
        case "leading":
            times = np.arange(steps + 1)[:0:-1] * (T // (steps + 1)) + float(schedule.sampling.steps_offset)
        case "trailing":
            times = _spaced(schedule, steps)
    if np.any(np.diff(times) >= 0):
        raise ValueError(
            f"steps = {steps}: {T} training timesteps do not have that many distinct times; choose fewer steps."
        )
    return _check_range(times, schedule).astype(np.int32)


def _lcm_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    if schedule.sampling.timesteps is not None:
        # The first ones: at each time, a generator has only seen its own output from the times before.
        times = np.asarray(schedule.sampling.timesteps, np.int32)
        _check_steps(steps, len(times), " (the timesteps that the generator was trained at)")
        return times[:steps]
    return _grid_times(schedule, steps, "original_inference_steps")


def _tcd_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    return _grid_times(schedule, steps, "original_inference_steps")


def _codi_times(schedule: NoiseSchedule, steps: int) -> Int[np.ndarray, " n"]:
    if schedule.sampling.grid_steps is None:
        raise ValueError(
            "The codi sampler needs the grid that the student was distilled on: scheduler_config.json has no "
            "distill_learning_steps. Sample this model with another sampler, such as ddim."
        )
    return _grid_times(schedule, steps, "distill_learning_steps")


def _grid_times(schedule: NoiseSchedule, steps: int, key: str) -> Int[np.ndarray, " n"]:
    """``steps`` evenly spread times of the grid that the model was distilled on, from its last time down."""
    spec = schedule.sampling
    grid, _ = distillation_grid(schedule.num_train_timesteps, spec.grid_steps or 0, spec.grid)
    _check_steps(steps, len(grid), f" ({key}, the grid that the model was distilled on)")
    return grid[::-1][np.linspace(0, len(grid), steps, endpoint=False).astype(int)]


def _check_steps(steps: int, most: int, meaning: str = " (num_train_timesteps)") -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps = {steps}: choose 1 to {most}{meaning}.")


def _check_range(times: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    if times[0] >= schedule.num_train_timesteps:
        raise ValueError(
            f"steps = {len(times)} with steps_offset = {schedule.sampling.steps_offset} starts at t = "
            f"{times[0]:.0f}, beyond the last training timestep {schedule.num_train_timesteps - 1}: choose fewer steps."
        )
    return times


_TIMES: dict[SamplerName, Callable[[NoiseSchedule, int], np.ndarray]] = {
    "ddim": _ddim_times,
    "euler": _euler_times,
    "euler-ancestral": _euler_times,
    "heun": _heun_times,
    "pndm": _pndm_times,
    "dpm-solver++": _dpm_solver_times,
    "dpm-solver++-sde": _dpm_solver_times,
    "unipc": _dpm_solver_times,
    "lcm": _lcm_times,
    "tcd": _tcd_times,
    "codi": _codi_times,
}


# Each class takes the values of the other one for its own default.
_OF_UNIPC, _OF_DPM_SOLVER = ("bh1", "bh2", "logrho"), ("midpoint", "heun", "logrho")


def _check_variant(sampler: SamplerName, schedule: NoiseSchedule) -> None:
    """Refuses options that diffusers would honor and `sampler` does not."""
    config = schedule.to_config()
    needed: dict[str, tuple[Any, ...]] = {}
    if sampler in ("euler", "dpm-solver++", "dpm-solver++-sde", "unipc"):
        needed = {"use_lu_lambdas": (False,), "final_sigmas_type": ("zero",)}
    if sampler == "euler":
        needed |= {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}
    if sampler in ("dpm-solver++", "dpm-solver++-sde"):
        algorithms = ("dpmsolver++", "sde-dpmsolver++")
        needed |= {"algorithm_type": algorithms, "solver_order": (2,), "solver_type": ("midpoint", *_OF_UNIPC)}
        needed |= {"lambda_min_clipped": (-np.inf,)}
    if sampler == "unipc":
        needed |= {"solver_order": (2,), "solver_type": ("bh2", *_OF_DPM_SOLVER), "predict_x0": (True,)}
        needed |= {"disable_corrector": ([],)}
        needed |= {"solver_p": (None,), "lower_order_final": (True,)}
    if sampler == "pndm":
        needed = {"skip_prk_steps": (True,), "prediction_type": ("epsilon", "v_prediction")}
        config.setdefault("skip_prk_steps", schedule.sampling.scheduler != "PNDMScheduler")
    for key, values in needed.items():
        if config.get(key) is not None and config[key] not in values:
            raise ValueError(
                f"scheduler_config.json: the sampler {sampler} does not support {key} = {config[key]!r}, only "
                f"{' or '.join(map(repr, values))}: choose another sampler."
            )
