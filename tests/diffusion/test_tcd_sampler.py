"""The sampler of TCD against diffusers' `TCDScheduler`, with the same noise."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import TCDScheduler
from diffusers.schedulers import scheduling_tcd

from codi_jax.diffusion import samplers
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import timesteps_for

CONFIG = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE, ROOM = (2, 4, 4, 3), 8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_are_those_of_diffusers(
    prediction_type: str, gamma: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule.from_config({**CONFIG, "prediction_type": prediction_type}).sampled(SamplingSpec.tcd(50))
    scheduler = TCDScheduler.from_config(schedule.to_config())
    scheduler.set_timesteps(steps)
    times = timesteps_for("tcd", schedule, steps)
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy())
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(steps - 1, *SHAPE)).astype(np.float32)
    drawn = iter(noise)
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *_, **__: torch.tensor(next(drawn)))
    wanted = torch.tensor(z)
    for t in scheduler.timesteps:
        wanted = scheduler.step(torch.tanh(0.7 * wanted + t / 1000), t, wanted, eta=gamma, return_dict=False)[0]
    assert next(drawn, None) is None or gamma == 0

    def denoise(z, t):
        return jnp.tanh(0.7 * z + t / 1000)

    # Padded to a program for more steps, as pipelines do; those beyond the count would change the result.
    padding = [(0, ROOM - steps), *[(0, 0)] * 4]
    result = samplers.sample(
        "tcd",
        denoise,
        schedule,
        jnp.asarray(z),
        np.pad(times, (0, ROOM - steps), mode="edge"),
        jnp.pad(jnp.asarray(noise), padding),
        gamma=gamma,
        num_steps=jnp.int32(steps),
    )
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


def test_gamma_is_of_this_sampler() -> None:
    """At γ = 1 each step ends at s = 0, so what follows depends on the noise; at γ = 0 not at all."""
    schedule = NoiseSchedule.from_config(CONFIG).sampled(SamplingSpec.tcd(10))
    times, z = timesteps_for("tcd", schedule, 3), jnp.ones(SHAPE)

    def run(gamma: float, scale: float):
        noise = jnp.full((2, *SHAPE), scale)
        return samplers.tcd(lambda z, t: jnp.tanh(z), schedule, z, times, noise, gamma=gamma)

    np.testing.assert_array_equal(run(0.0, 1.0), run(0.0, 5.0))
    assert np.abs(np.asarray(run(1.0, 1.0) - run(1.0, 5.0))).max() > 0.1
