"""TCD against its equations in NumPy, in float64, and what sets it apart from LCM."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from consistency import B, N, make_problem, numpy_distance, numpy_step, real_networks
from numerics import COLUMN, Problem, alpha_sigma, assert_equals
from standins import EDITING, SCHEDULER, float64

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import lcm, tcd
from codi_jax.methods.lcm import LcmTextFlags
from codi_jax.pipeline.conditions import Frozen, NullText
from codi_jax.pipeline.saving import save_schedule

METHODS = {"text": tcd.TEXT, "controlnet": tcd.TEXT, "edit": tcd.EDIT, "edit, two guidances": tcd.EDIT}
COMBINATIONS = list(itertools.product(METHODS, ["epsilon", "v_prediction"], ["l2", "huber"]))


def numpy_loss(problem: Problem) -> Any:
    """The method's equations as a function of θ."""
    step, (alpha, sigma) = numpy_step(problem), alpha_sigma(problem.frozen.schedule)
    k = 1000 // N
    ends = np.maximum(np.arange(N) * k - 1, 0)
    r = ends[np.asarray(jax.random.randint(jax.random.fold_in(problem.key, 6), (B,), 0, step.n + 1))]
    assert 0 < np.sum(r == step.s) < B

    def f(theta: Any, z: np.ndarray, t: np.ndarray) -> np.ndarray:
        x, eps = step.student(theta, z, t)
        return alpha[r][COLUMN] * x + sigma[r][COLUMN] * eps

    target = f(float64(problem.state.ema), step.z_s, step.s)
    # f^{→s}(ẑ_s, s) = ẑ_s: there the target is the teacher's step itself.
    np.testing.assert_allclose(target[r == step.s], step.z_s[r == step.s])
    return lambda theta: numpy_distance(problem, f(theta, step.z_t, step.t), target)


@pytest.mark.parametrize(("task", "prediction_type", "loss_type"), COMBINATIONS)
def test_loss_and_gradient_equal_the_equations(task: str, prediction_type: str, loss_type: str) -> None:
    problem = make_problem(task, prediction_type, loss_type, method=METHODS[task])
    problem.key = jax.random.key(16)  # r = s for one of the samples, and 0 and another time for the others
    assert_equals(problem, numpy_loss(problem))


def test_without_an_average_the_target_is_the_student_as_a_constant() -> None:
    problem = make_problem("text", "epsilon", "l2", method=tcd.TEXT)
    problem.key = jax.random.key(16)
    problem.state = dataclasses.replace(problem.state, ema=problem.state.params)
    wanted = numpy_loss(problem)
    problem.state = dataclasses.replace(problem.state, ema=None)
    assert_equals(problem, wanted)


def test_the_end_is_any_time_of_the_grid_up_to_the_teachers() -> None:
    """For each t_n alike; the last of them is s, and none is at or above t."""
    schedule, size = NoiseSchedule.from_config(SCHEDULER), 16_000
    n = jnp.arange(size) % N
    r = np.asarray(tcd.end_times(jax.random.key(0), n, schedule, LcmTextFlags(num_ddim_timesteps=N)))
    for i in range(N):
        times, counts = np.unique(r[np.asarray(n) == i], return_counts=True)
        np.testing.assert_array_equal(times, [0, *(125 * np.arange(1, i + 1) - 1)])
        np.testing.assert_allclose(counts / counts.sum(), 1 / (i + 1), atol=0.05)


def test_the_end_is_drawn_apart_from_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is none of those of latents, dropout, times, noise and weights: ``split`` is ``fold_in`` of an index."""
    problem, seen, real = make_problem("text", "epsilon", "l2", method=tcd.TEXT), [], tcd.end_times
    monkeypatch.setattr(tcd, "end_times", lambda key, *rest: seen.append(key) or real(key, *rest))
    problem.loss()
    (key,) = (jax.random.key_data(key).tolist() for key in seen)
    assert key not in jax.random.key_data(jax.random.split(problem.key, 6)).tolist()


def test_where_the_teacher_ends_the_target_is_its_own() -> None:
    """f^{→s}(ẑ_s, s) = ẑ_s by itself, which LCM needs boundary scalings for."""
    schedule = tcd.sampling(NoiseSchedule.from_config(SCHEDULER), LcmTextFlags(num_ddim_timesteps=4))
    z, out = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    s = jnp.array([0, 249, 749])
    np.testing.assert_allclose(schedule.ddim_step(*schedule.to_x0_eps(out, z, s), s), z, atol=1e-5)


def test_it_is_sampled_by_its_own_sampler(tmp_path: Path) -> None:
    teacher = NoiseSchedule.from_config(SCHEDULER)
    schedule = tcd.TEXT.sampling(teacher, LcmTextFlags(num_ddim_timesteps=20))
    assert schedule.sampling.sampler == "tcd"
    save_schedule(schedule, tmp_path)
    scheduler = diffusers.TCDScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 20
    assert NoiseSchedule.from_pretrained(tmp_path).sampling == schedule.sampling
    with pytest.raises(ValueError, match="grid of 1001 steps is impossible"):
        tcd.TEXT.sampling(teacher, LcmTextFlags(num_ddim_timesteps=1001))


def test_all_else_is_as_in_lcm() -> None:
    for ours, theirs in ((tcd.TEXT, lcm.TEXT), (tcd.EDIT, lcm.EDIT)):
        names = [field.name for field in dataclasses.fields(ours)]
        assert {name for name in names if getattr(ours, name) is not getattr(theirs, name)} == {"sampling", "loss"}
    with pytest.raises(ValueError, match="the teacher is an InstructPix2Pix model"):
        tcd.TEXT.configure(EDITING, LcmTextFlags())


def test_a_lora_can_be_trained() -> None:
    """In shapes: it has no average, so that its target is its own, a constant."""
    networks, _ = real_networks(edits=False)
    setup = tcd.TEXT.configure(networks, LcmTextFlags(use_lora=True, lora_rank=2))
    schedule = tcd.TEXT.sampling(NoiseSchedule.from_config(SCHEDULER), setup.flags)

    def loss(unet: Any, key: jax.Array) -> Any:
        state = tcd.TEXT.init(setup, {"unet": unet}.__getitem__, optax.identity(), key)
        assert state.ema is None
        frozen = Frozen({"unet": unet}, schedule, null_text=NullText(jnp.zeros((1, 5, 24))))
        batch = {"moments": jnp.zeros((2, 8, 8, 8)), "context": jnp.zeros((2, 5, 24))}
        return tcd.TEXT.loss(state.params, state, frozen, batch, key, setup)

    value, _ = jax.eval_shape(loss, networks.unet.abstract_params(), jax.random.key(0))
    assert value.shape == ()
