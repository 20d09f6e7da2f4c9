"""TCD against its equations in NumPy, in float64, and what sets it apart from LCM."""

import dataclasses
import itertools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import COLUMN, Problem, alpha_sigma, assert_equals, draw_latents, x_and_eps
from standins import SCHEDULER, float64, numpy_predict
from test_lcm import DIM, B, N, make_problem, numpy_embedding

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import lcm, tcd
from codi_jax.methods.lcm import LcmTextFlags
from codi_jax.pipeline.saving import save_schedule

STRIDE = 1000 // N


def tcd_problem(task: str, prediction_type: str, loss_type: str) -> Problem:
    problem = make_problem(task, prediction_type, loss_type, 0.0)
    schedule = tcd.sampling(problem.frozen.schedule, problem.setup.flags)
    return dataclasses.replace(
        problem, loss_function=tcd.METHOD.loss, frozen=dataclasses.replace(problem.frozen, schedule=schedule)
    )


def numpy_loss(problem: Problem) -> Any:
    """The method's equations as a function of θ."""
    networks, flags, schedule = problem.setup.networks, problem.setup.flags, problem.frozen.schedule
    batch, frozen = problem.float64()
    alpha, sigma = (x[..., None, None, None] for x in alpha_sigma(schedule))
    control = batch["conditioning"] / 255 if networks.controlnet is not None else None

    keys = jax.random.split(problem.key, 6)
    z0 = draw_latents(batch, keys[0])
    n = np.asarray(jax.random.randint(keys[2], (B,), 0, N))
    m = np.asarray(jax.random.randint(jax.random.fold_in(problem.key, 1), (B,), 0, n + 1))
    noise = float64(jax.random.normal(keys[3], z0.shape))
    w = float64(jax.random.uniform(keys[4], (B,), minval=1.0, maxval=4.0))
    t, s, r = (n + 1) * STRIDE - 1, np.maximum(n * STRIDE - 1, 0), np.maximum(m * STRIDE - 1, 0)
    z_t = alpha[t] * z0 + sigma[t] * noise

    def e(networks, z, t, text, guidance=None):
        out = numpy_predict(networks, z, t, *text, batch["time_ids"], control, None, guidance)
        return x_and_eps(schedule.prediction_type, out, z, alpha[t], sigma[t])

    text = batch["context"], batch["pooled"]
    of_text, of_none = e(frozen, z_t, t, text), e(frozen, z_t, t, problem.null_text())
    x0, eps = of_text + w[COLUMN] * (of_text - of_none)
    z_s = alpha[s] * x0 + sigma[s] * eps

    def f(theta, z, t):
        x0, eps = e({**frozen, **theta}, z, t, text, numpy_embedding(w, DIM))
        return alpha[r] * x0 + sigma[r] * eps

    target = f(float64(problem.state.ema), z_s, s)

    def loss(theta):
        difference = f(theta, z_t, t) - target
        if flags.loss_type == "huber":
            return np.mean(np.sqrt(difference**2 + 0.5**2) - 0.5)
        return np.mean(difference**2)

    return loss


@pytest.mark.parametrize(
    ("task", "prediction_type", "loss_type"),
    [*itertools.product(("text", "controlnet"), ("epsilon", "v_prediction"), ("l2", "huber"))],
)
def test_loss_and_gradient_equal_the_equations(task: str, prediction_type: str, loss_type: str) -> None:
    problem = tcd_problem(task, prediction_type, loss_type)
    assert_equals(problem, numpy_loss(problem))


def test_it_ends_at_every_time_of_the_grid_below() -> None:
    """From t_n: at 0, t_0, …, t_{n−1}, all as often, and never later than the teacher's step."""
    flags = LcmTextFlags(num_ddim_timesteps=4)
    schedule = tcd.sampling(NoiseSchedule.from_config(SCHEDULER), flags)
    for n, ends in enumerate(([0], [0, 249], [0, 249, 499], [0, 249, 499, 749])):
        drawn = np.asarray(tcd.end_times(jax.random.key(n), jnp.full((4000,), n), schedule, flags))
        values, counts = np.unique(drawn, return_counts=True)
        assert values.tolist() == ends
        assert counts.min() > 0.9 * 4000 / len(ends)


def test_where_the_teacher_ends_the_target_is_its_own() -> None:
    """f^{→s}(ẑ_s, s) = ẑ_s by itself, which LCM needs boundary scalings for."""
    flags = LcmTextFlags(num_ddim_timesteps=4)
    schedule = tcd.sampling(NoiseSchedule.from_config(SCHEDULER), flags)
    z, out = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    s = jnp.array([0, 249, 749])
    np.testing.assert_allclose(schedule.ddim_step(*schedule.to_x0_eps(out, z, s), s), z, atol=1e-5)


def test_it_is_sampled_by_its_own_sampler(tmp_path: Any) -> None:
    schedule = tcd.sampling(NoiseSchedule.from_config(SCHEDULER), LcmTextFlags(num_ddim_timesteps=20))
    assert schedule.sampling.sampler == "tcd"
    save_schedule(schedule, tmp_path)
    scheduler = diffusers.TCDScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 20
    assert NoiseSchedule.from_pretrained(tmp_path).sampling == schedule.sampling


def test_all_else_is_as_in_lcm() -> None:
    different = {
        field.name
        for field in dataclasses.fields(tcd.METHOD)
        if getattr(tcd.METHOD, field.name) is not getattr(lcm.TEXT, field.name)
    }
    assert different == {"sampling", "loss"}
