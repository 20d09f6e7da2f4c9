"""The noise schedule against diffusers' schedulers, and against NumPy in float64 from the papers' equations."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from schedulers import PREDICTION_TYPES, PUBLISHED, SD, diffusers_scheduler, make

from codi_jax.diffusion.schedule import NoiseSchedule, boundary_scalings, distillation_grid, x0_eps

# torch 2.13 and NumPy's conversion protocol, inside diffusers and in comparisons.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


SHAPE = (3, 4, 5, 2)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def float64_alpha_sigma(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)[t].reshape(-1, 1, 1, 1)
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


# ---- Equations


def test_add_noise_and_velocity_are_those_of_diffusers():
    schedule, theirs = make(), diffusers_scheduler(SD)
    z0, noise, t = normal(0), normal(1), np.array([0, 500, 999])
    tensors = torch.tensor(z0), torch.tensor(noise), torch.tensor(t)
    np.testing.assert_allclose(
        schedule.add_noise(z0 * jnp.ones(()), jnp.asarray(noise), t), theirs.add_noise(*tensors), atol=1e-6
    )
    np.testing.assert_allclose(
        schedule.velocity(jnp.asarray(z0), jnp.asarray(noise), t), theirs.get_velocity(*tensors), atol=1e-6
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_signal_and_noise(prediction_type: str):
    schedule = make(prediction_type=prediction_type)
    z0, noise, t = jnp.asarray(normal(0)), jnp.asarray(normal(1)), jnp.array([1, 500, 999])
    z_t = schedule.add_noise(z0, noise, t)
    x0, eps = schedule.to_x0_eps(schedule.target(z0, noise, t), z_t, t)
    # Dividing by α = 0.07 or σ = 0.04 amplifies the rounding of z_t by up to 30.
    np.testing.assert_allclose(x0, z0, atol=5e-6)
    np.testing.assert_allclose(eps, noise, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_in_float64(prediction_type: str):
    schedule = make(prediction_type=prediction_type)
    z, F, t = normal(0).astype(np.float64), normal(1).astype(np.float64), np.array([20, 500, 980])
    α, σ = float64_alpha_sigma(schedule, t)
    expected = {
        "epsilon": ((z - σ * F) / α, F),
        "v_prediction": (α * z - σ * F, α * F + σ * z),
        "sample": (F, (z - α * F) / σ),
    }[prediction_type]
    ours = schedule.to_x0_eps(jnp.asarray(F, jnp.float32), jnp.asarray(z, jnp.float32), t)
    for mine, theirs in zip(ours, expected):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_is_that_of_diffusers(prediction_type: str):
    config = {**SD, "prediction_type": prediction_type}
    schedule, theirs = NoiseSchedule.from_config(config), diffusers_scheduler(config)
    theirs.set_timesteps(50)
    z, prediction = normal(0), normal(1)
    for t in (981, 501, 1):
        expected = theirs.step(torch.tensor(prediction), t, torch.tensor(z)).prev_sample
        x0, eps = schedule.to_x0_eps(jnp.asarray(prediction), jnp.asarray(z), t)
        np.testing.assert_allclose(schedule.ddim_step(x0, eps, t - 20), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_where_the_last_step_ends(set_alpha_to_one: bool):
    schedule = make(set_alpha_to_one=set_alpha_to_one)
    alpha, _ = schedule.alpha_sigma(-19)
    expected = 1.0 if set_alpha_to_one else np.sqrt(schedule.alphas_cumprod[0])
    assert alpha.item() == pytest.approx(expected, rel=1e-7)


def test_a_time_past_the_end_is_nan_and_not_the_last_one():
    alpha, sigma = make().alpha_sigma(jnp.array([999, 1000]))
    np.testing.assert_array_equal(np.isnan(alpha.ravel()), [False, True])
    np.testing.assert_array_equal(np.isnan(sigma.ravel()), [False, True])


def test_snr():
    schedule, t = make(), np.array([0, 500, 999])
    α, σ = float64_alpha_sigma(schedule, t)
    ours = schedule.snr(t)
    assert ours.shape == (3,)
    np.testing.assert_allclose(ours, (α**2 / σ**2).ravel(), rtol=5e-5)  # 1 − ᾱ_0 = 8.5e-4 loses three digits


def test_bfloat16_goes_in_and_float32_comes_out():
    schedule = make()
    z = jnp.ones(SHAPE, jnp.bfloat16)
    t = jnp.array([1, 2, 3])
    x0, eps = schedule.to_x0_eps(z, z, t)
    outputs = [x0, eps, schedule.add_noise(z, z, t), schedule.target(z, z, t), schedule.ddim_step(x0, eps, t)]
    outputs += x0_eps(z, z, jnp.float32(0.6) * jnp.ones(()), jnp.float32(0.8) * jnp.ones(()), "v_prediction")
    assert all(x.dtype == jnp.float32 for x in outputs)


def test_one_time_for_all_samples_or_one_for_each():
    schedule, z = make(prediction_type="v_prediction"), jnp.asarray(normal(0))
    for t in (7, np.int64(7), jnp.int32(7), np.array([7, 7, 7])):
        np.testing.assert_array_equal(schedule.add_noise(z, z, t), schedule.add_noise(z, z, jnp.array([7, 7, 7])))


# ---- Boundary scalings


def test_boundary_scalings_are_those_of_diffusers():
    t = np.arange(1000)
    theirs = diffusers_scheduler(PUBLISHED["lcm-dreamshaper"]).get_scalings_for_boundary_condition_discrete(t)
    for mine, expected in zip(boundary_scalings(t), theirs):
        np.testing.assert_allclose(mine.ravel(), expected, rtol=1e-6)


def test_boundary_scalings_at_the_boundary_and_far_from_it():
    c_skip, c_out = boundary_scalings(jnp.array([0, 999]))
    np.testing.assert_allclose(c_skip.ravel(), [1, 0], atol=1e-8)
    np.testing.assert_allclose(c_out.ravel(), [0, 1], atol=1e-8)  # σ_d τ/√(τ² + σ_d²) would end at 0.5


def test_consistency_function_uses_the_schedules_own_scaling():
    schedule = make(_class_name="LCMScheduler", timestep_scaling=0.01)
    z, x0, t = jnp.asarray(normal(0)), jnp.asarray(normal(1)), np.array([0, 10, 100])
    τ = 0.01 * t.reshape(-1, 1, 1, 1)
    expected = 0.25 / (τ**2 + 0.25) * np.asarray(z) + τ / np.sqrt(τ**2 + 0.25) * np.asarray(x0)
    np.testing.assert_allclose(schedule.consistency(z, x0, t), expected, rtol=1e-5, atol=1e-6)


# ---- The distillation grid


def test_trailing_grid():
    t, s = distillation_grid(1000, 50)
    np.testing.assert_array_equal(t, range(19, 1000, 20))
    np.testing.assert_array_equal(s, [0, *range(19, 980, 20)])


def test_leading_grid():
    t, s = distillation_grid(1000, 50, "leading")
    np.testing.assert_array_equal(t, range(0, 1000, 20))
    np.testing.assert_array_equal(s, [0, *range(0, 980, 20)])


@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 50, 999, 1000])
def test_trailing_grid_is_that_of_lcm(num_steps: int):
    theirs = diffusers.LCMScheduler()
    theirs.set_timesteps(num_steps, original_inference_steps=num_steps)
    t, s = distillation_grid(1000, num_steps)
    np.testing.assert_array_equal(t[::-1], theirs.timesteps)
    assert np.all(s >= 0)
    assert np.all(s <= t)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_grids(num_steps: int):
    with pytest.raises(ValueError, match=rf"grid of {num_steps} steps is impossible: choose 1 to 1000"):
        distillation_grid(1000, num_steps)


# ---- As a pytree


def test_a_schedule_is_a_tree_with_one_leaf():
    schedule = make()
    assert len(jax.tree.leaves(schedule)) == 1
    shapes = jax.eval_shape(lambda s: s, schedule)
    assert shapes.prediction_type == schedule.prediction_type
    assert jax.tree.map(lambda _: "a sharding", schedule).alphas_cumprod == "a sharding"


def test_jit_compiles_once_for_schedules_that_differ_in_numbers_only():
    traces = []

    @jax.jit
    def add_noise(schedule: NoiseSchedule, z: jax.Array, t: jax.Array) -> jax.Array:
        traces.append(1)
        return schedule.add_noise(z, z, t)

    z, t = jnp.asarray(normal(0)), jnp.array([1, 2, 3])
    schedule = make()
    np.testing.assert_allclose(add_noise(schedule, z, t), schedule.add_noise(z, z, t), rtol=1e-6)
    add_noise(make(), z, t)
    assert len(traces) == 1
    add_noise(make(prediction_type="sample"), z, t)
    assert len(traces) == 2
