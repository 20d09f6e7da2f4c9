"""Generators of several steps: their times, and what they start from, against NumPy in float64."""

import jax
import numpy as np
import pytest
from matching import SHAPE, B, Equations, generator_loss, make_problem, schedule_of
from numerics import COLUMN, draw_latents
from standins import float64

from codi_jax.methods import disback
from codi_jax.methods.generator import generator_schedule
from codi_jax.pipeline.conditions import prepare


def test_the_times_of_a_generator():
    assert disback.DisbackFlags(conditioning_timestep=399).timesteps == (399,)
    assert disback.DisbackFlags(denoising=True, num_denoising_step=4).timesteps == (999, 749, 499, 249)
    assert disback.DisbackFlags(denoising=True, num_denoising_step=3).timesteps == (999, 666, 333)


def test_backward_simulation_starts_from_what_the_generator_made():
    """The sampler's own steps, of any number up to n, and a gradient through the last one alone."""
    problem = make_problem(
        generator_loss, "text", "epsilon", denoising=True, num_denoising_step=3, backward_simulation=True
    )
    equations, generator = Equations(problem), problem.setup.generator
    inputs = prepare(generator.networks, problem.frozen.params, problem.batch, problem.key)
    unet = float64(problem.state.params)["unet"]
    seen = set()
    make = jax.jit(lambda params, key: generator(params, problem.frozen, inputs, key))
    slope = jax.jit(jax.grad(lambda params, key: generator(params, problem.frozen, inputs, key).sum()))
    for seed in range(8):
        key = jax.random.key(seed)
        noise_key, n_key, steps_key = jax.random.split(key, 3)
        n = int(jax.random.randint(n_key, (), 0, 3))
        z = float64(jax.random.normal(noise_key, (B, *SHAPE)))
        x = t = np.zeros(0)
        for i, t in enumerate(np.full(B, time) for time in (999, 666, 333)[: n + 1]):
            x = equations.x0(equations.output(unet, z, t, equations.full), z, t)
            if i < n:
                noise = float64(jax.random.normal(jax.random.fold_in(steps_key, i), x.shape))
                z = equations.add_noise(x, noise, np.full(B, [999, 666, 333][i + 1]))
        np.testing.assert_allclose(make(problem.state.params, key), x, rtol=1e-4, atol=1e-4 * np.abs(x).max())
        seen.add(n)
        gradient = slope(problem.state.params, key)

        def total(a: float) -> float:
            return equations.x0(equations.output({**unet, "c": a * unet["c"]}, z, t, equations.full), z, t).sum()  # noqa: B023

        wanted = (total(1 + 1e-6) - total(1 - 1e-6)) / 2e-6
        ours = float((gradient["unet"]["c"] * problem.state.params["unet"]["c"]).sum())
        np.testing.assert_allclose(ours, wanted, rtol=1e-3)
    assert seen == {0, 1, 2}


def test_without_simulation_it_starts_from_real_latents():
    problem = make_problem(generator_loss, "text", "epsilon", denoising=True, num_denoising_step=2)
    equations, generator = Equations(problem), problem.setup.generator
    inputs = prepare(generator.networks, problem.frozen.params, problem.batch, problem.key)
    z0 = draw_latents(equations.batch, problem.key)
    noise_key, n_key, _ = jax.random.split(problem.key, 3)
    n = np.asarray(jax.random.randint(n_key, (B,), 0, 2))
    assert set(n) == {0, 1}
    noise, t = float64(jax.random.normal(noise_key, z0.shape)), np.asarray([999, 499])[n]
    z = np.where((n == 0)[COLUMN], noise, equations.add_noise(z0, noise, t))
    wanted = equations.x0(equations.output(float64(problem.state.params)["unet"], z, t, equations.full), z, t)
    ours = generator(problem.state.params, problem.frozen, inputs, problem.key)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_time_off_the_schedule_is_refused():
    for flags, name in [
        ({"conditioning_timestep": 1000}, "conditioning_timestep 1000"),
        ({"conditioning_timestep": -1}, "conditioning_timestep -1"),
        ({"denoising": True, "denoising_timestep": 1200}, "denoising_timestep 1200"),
    ]:
        with pytest.raises(ValueError, match=f"--{name} is off the model's schedule, which has the timesteps 0 to 999"):
            generator_schedule(schedule_of("epsilon"), disback.DisbackFlags(**flags))
