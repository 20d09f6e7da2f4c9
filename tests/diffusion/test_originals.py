"""Sampling from an image, and into a part of it, against the loops of diffusers' pipelines around its schedulers."""

import itertools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from schedulers import config_for, make, replay
from test_samplers import SHAPE, denoise, normal, relative_error

from codi_jax.diffusion.samplers import SAMPLERS, Original, sample
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.diffusion.timesteps import timesteps_for, visited_times

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 10
NOISE = normal(4, 2 * STEPS, *SHAPE)
Z0 = normal(5)
MASK = np.zeros((SHAPE[0], *SHAPE[1:3], 1), np.float32)
MASK[:, 1:, 1:3] = 1
TOLERANCE = 2e-5
OF_DIFFUSERS: list[SamplerName] = [sampler for sampler in SAMPLERS if sampler != "codi"]
CASES = [  # the times of the last two depend on no spacing
    (sampler, spacing)
    for sampler, spacing in itertools.product(OF_DIFFUSERS, ["leading", "trailing"])
    if spacing == "leading" or sampler not in ("lcm", "tcd")
]


@pytest.fixture(autouse=True)
def _replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(NOISE, monkeypatch)


def network(xp: Any) -> Any:
    """One whose output depends on the neighbors of a place, too: what is kept has to be seen by what is painted."""
    prediction, roll = denoise(xp), jnp.roll if xp is jnp else torch.roll
    return lambda z, t: prediction((z + roll(z, 1, 1)) / 2, t)


def theirs(config: dict[str, Any], skipped: int | None, mask: np.ndarray | None) -> tuple[np.ndarray, int]:
    """What comes out of the loop of ``StableDiffusionImg2ImgPipeline`` or ``StableDiffusionInpaintPipeline``.

    Args:
      config: the scheduler's.
      skipped: steps left out at the start; ``None`` starts from noise.
      mask: where to paint.

    Returns:
      The latents, and the number of evaluations that were left out.
    """
    scheduler: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(STEPS)
    all_times, z, z0 = scheduler.timesteps, torch.tensor(normal(0)), torch.tensor(Z0)
    left_out = (skipped or 0) * scheduler.order
    times = all_times[left_out:]
    if config["_class_name"] == "PNDMScheduler" and skipped:
        # Their pipelines leave out the repetition of the second time but not what it is for.
        once = torch.cat([all_times[:1], all_times[2:]])[skipped:]
        times = torch.cat([once[:2], once[1:]]) if len(once) > 1 else once
        left_out = len(all_times) - len(times)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(left_out)
    x = z * scheduler.init_noise_sigma if skipped is None else scheduler.add_noise(z0, z, times[:1])
    model = network(torch)
    for index, t in enumerate(times):
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        if mask is not None:
            kept = z0
            if index < len(times) - 1:
                kept = scheduler.add_noise(z0, z, times[index + 1 : index + 2])
            x = (1 - torch.tensor(mask)) * kept + torch.tensor(mask) * x
    return x.numpy(), left_out


def ours(sampler: SamplerName, schedule: NoiseSchedule, original: Original, skipped: int) -> Any:
    times, noise = timesteps_for(sampler, schedule, STEPS), None
    if SAMPLERS[sampler].is_stochastic:
        noise = jnp.concatenate([jnp.full((skipped, *SHAPE), 1e9), NOISE])[: len(times) - 1]
    return sample(sampler, network(jnp), schedule, jnp.asarray(normal(0)), times, noise, original=original, gamma=0.3)


def configuration(sampler: SamplerName, **more: Any) -> dict[str, Any]:
    if sampler in ("lcm", "tcd"):
        spec = SamplingSpec.lcm(50) if sampler == "lcm" else SamplingSpec.tcd(50)
        return make(**more).sampled(spec).to_config()
    more |= {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm-solver++-sde" else {}
    return config_for(sampler, **more)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("skipped", [0, 3, 8, 9])
@pytest.mark.parametrize(("sampler", "spacing"), CASES)
def test_from_an_image(sampler: SamplerName, spacing: str, skipped: int, masked: bool) -> None:
    config = configuration(sampler, timestep_spacing=spacing)
    mask = MASK if masked else None
    expected, left_out = theirs(config, skipped, mask)
    schedule = NoiseSchedule.from_config(config)
    original = Original(jnp.asarray(Z0), jnp.int32(left_out), None if mask is None else jnp.asarray(mask))
    made = ours(sampler, schedule, original, left_out)
    assert relative_error(made, expected) <= TOLERANCE
    if masked:
        np.testing.assert_array_equal(np.asarray(made)[MASK[..., 0] == 0], Z0[MASK[..., 0] == 0])


@pytest.mark.parametrize("skipped", [0, 1, 5, 8, STEPS])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "pndm"])
def test_the_times_that_are_visited(sampler: SamplerName, skipped: int) -> None:
    schedule, seen = NoiseSchedule.from_config(configuration(sampler)), []
    times = timesteps_for(sampler, schedule, STEPS)
    skipped = min(skipped, len(times) - 1)

    def seen_network(z: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return denoise(jnp)(z, t)

    sample(sampler, seen_network, schedule, jnp.asarray(normal(0)), times, original=Original(jnp.asarray(Z0), skipped))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, visited_times(sampler, times, skipped))


@pytest.mark.parametrize("sampler", OF_DIFFUSERS)
def test_into_a_part_from_noise(sampler: SamplerName) -> None:
    config = configuration(sampler)
    expected, _ = theirs(config, None, MASK)
    made = ours(sampler, NoiseSchedule.from_config(config), Original(jnp.asarray(Z0), mask=jnp.asarray(MASK)), 0)
    assert relative_error(made, expected) <= TOLERANCE


@pytest.mark.parametrize("levels", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm-solver++", "unipc"])
def test_other_levels(sampler: SamplerName, levels: str) -> None:
    """Those of all steps, of which the last ones are taken."""
    config = configuration(sampler, **{f"use_{levels}_sigmas": True})
    expected, left_out = theirs(config, 4, MASK)
    original = Original(jnp.asarray(Z0), jnp.int32(left_out), jnp.asarray(MASK))
    made = ours(sampler, NoiseSchedule.from_config(config), original, left_out)
    # Their DPM-Solver and UniPC cut off the times of levels other than Karras', of 998.99… to 998.
    is_cut = sampler in ("dpm-solver++", "unipc") and levels != "karras"
    assert relative_error(made, expected) <= (2e-3 if is_cut else 1e-4)


def test_codi_goes_on_from_the_image_with_noise() -> None:
    schedule = make().sampled(SamplingSpec.codi(STEPS))
    times, z, z0 = timesteps_for("codi", schedule, STEPS), jnp.asarray(normal(0)), jnp.asarray(Z0)
    whole = ours("codi", schedule, Original(z0, 4), 4)
    rest = sample("codi", network(jnp), schedule, schedule.add_noise(z0, z, times[4]), times[4:])
    np.testing.assert_allclose(whole, rest, rtol=1e-5, atol=1e-5)
