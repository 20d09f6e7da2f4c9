"""CoDi against its equations in NumPy, in float64, and the traps of its reference code."""

import dataclasses
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import optax
import pytest
import standins
from numerics import COLUMN, Problem, alpha_sigma, assert_equals, boundary_scalings, draw_latents, x_and_eps
from published import TINY_VAE
from standins import (
    CONTROLNET,
    DISTILLED,
    SCHEDULER,
    SMALL_SD,
    float64,
    make_batch,
    null_text,
    numpy_predict,
    small_unet,
)

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import codi
from codi_jax.methods.codi import CodiFlags
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.conditions import Condition, Conditions, Frozen, NullText, prepare
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict

SGD = optax.sgd(0.1)
B = standins.CHANNELS
# Every flag that changes the loss, with all of its values. What a network combination ignores is left out of it.
NETWORKS = {
    "uncontrol": {"onestepode": "uncontrol"},
    "control-target": {"onestepode": "control", "onestepode_control_params": "target"},
    "control-online": {"onestepode": "control", "onestepode_control_params": "online"},
    "control-initial": {"onestepode": "control", "onestepode_control_params": "initial"},
}
NETWORKS |= {f"full-{name}": {**flags, "train": "unet"} for name, flags in NETWORKS.items()}
NETWORKS["unconditional"] = {"distill_type": "unconditional"}
CHOICES: dict[str, list[Any]] = {
    "networks": list(NETWORKS),
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "distill_grid": ["trailing", "leading"],
    "distill_loss": ["consistency_x", "consistency_epsilon"],
    "cfg_aware_distill": [False, True],
    "onestepode_cfg": [False, True],
    "onestepode_sample_eps": [None, "epsilon"],
    "snr_gamma": [None, 0.3],
    "snr_weight_space": ["loss", "prediction"],
}


FIRST = {name: values[0] for name, values in CHOICES.items()}


def make_problem(combination: dict[str, Any], **more: Any) -> Problem:
    chosen = dict(combination)
    flags = CodiFlags(
        **NETWORKS[chosen.pop("networks")], distill_learning_steps=8, distill_timestep_scaling=0.01,
        distill_x0_weight=0.7, **{k: v for k, v in chosen.items() if k != "prediction_type"}, **more,
    )  # fmt: skip
    # A timestep scaling so small that c_skip and c_out are far from 0 and 1.
    teacher = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": chosen["prediction_type"]})
    setup = codi.configure(CONTROLNET, flags)
    frozen = {"unet": standins.unet_params(1)}
    if flags.teacher_steps_with_initial:
        frozen["controlnet"] = standins.controlnet_params(6)
    assert frozen.keys() == {*setup.frozen} - {"vae"}
    params = {"unet": standins.unet_params(2), "controlnet": standins.controlnet_params(3)}
    ema = {"unet": standins.unet_params(4), "controlnet": standins.controlnet_params(5)}
    state = codi.init(setup, params.__getitem__, optax.identity(), jax.random.key(0))
    assert state.params.keys() == {*setup.trained}
    state = dataclasses.replace(state, ema={name: ema[name] for name in setup.trained})
    frozen = Frozen(frozen, codi.sampling(teacher, flags), null_text=null_text())
    # By this key a step of the teacher ends at s = 0 for one of the samples.
    return Problem(codi.loss, setup, state, frozen, make_batch(B), jax.random.key(3))


def numpy_loss(problem: Problem) -> Any:
    """The method's equations as a function of θ."""
    flags, schedule = problem.setup.flags, problem.frozen.schedule
    batch, frozen = problem.float64()
    alpha, sigma = alpha_sigma(schedule)
    control = batch["conditioning"] / 255 if flags.distill_type == "conditional" else None

    # What is drawn.
    keys = jax.random.split(problem.key, 4)
    z0 = draw_latents(batch, keys[0])
    n = np.asarray(jax.random.randint(keys[1], (B,), 0, 8))
    noise = float64(jax.random.normal(keys[2], z0.shape))
    w = 2 + 12 * float64(jax.random.uniform(keys[3], (B,)))
    k = 1000 // 8
    t = (n + 1) * k - 1 if flags.distill_grid == "trailing" else n * k
    s = np.maximum(t - k, 0)
    assert 0 < np.sum(s == 0) < B

    def x_eps(networks, z, t, guided, control):
        out = numpy_predict(networks, z, t, batch["context"], batch["pooled"], batch["time_ids"], control)
        if guided:
            uncond = numpy_predict(networks, z, t, *problem.null_text(), batch["time_ids"], control)
            out = uncond + w[COLUMN] * (out - uncond)
        return x_and_eps(schedule.prediction_type, out, z, alpha[t][COLUMN], sigma[t][COLUMN])

    def f(networks, z, t):
        c_skip, c_out = boundary_scalings(t, 0.01)
        x, eps = x_eps(networks, z, t, flags.cfg_aware_distill, control)
        return c_skip * z + c_out * x, c_skip * z + c_out * eps

    theta_now, theta_minus = float64(problem.state.params), float64(problem.state.ema)
    z_t = alpha[t][COLUMN] * z0 + sigma[t][COLUMN] * noise
    with_control = flags.onestepode == "control" and control is not None
    sources = {"target": theta_minus, "online": theta_now, "initial": frozen}
    source = sources[flags.onestepode_control_params] if with_control else {}
    teacher = {"unet": frozen["unet"], **({"controlnet": source["controlnet"]} if with_control else {})}
    x, eps = x_eps(teacher, z_t, t, flags.onestepode_cfg, control if with_control else None)
    if flags.onestepode_sample_eps == "epsilon":
        eps = noise
    z_s = alpha[s][COLUMN] * x + sigma[s][COLUMN] * eps
    target = f({"unet": frozen["unet"], **theta_minus}, z_s, s)

    # Hang et al., 2023: min(SNR, γ) ‖Δx‖², and ‖Δx‖² = ‖Δε‖²/SNR = ‖Δv‖²/(SNR + 1).
    snr = (alpha[t] / sigma[t]) ** 2
    of_loss = {"consistency_x": "sample", "consistency_epsilon": "epsilon"}[flags.distill_loss]
    space = {"loss": of_loss, "prediction": schedule.prediction_type}[flags.snr_weight_space]
    of_space = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones(B)}[space]
    w_snr = np.ones(B) if flags.snr_gamma is None else np.minimum(snr, flags.snr_gamma) / of_space
    if flags.distill_loss == "consistency_epsilon":
        w_snr = np.where(s == 0, 0, w_snr)  # there the clean latent would be the target of a noise
    index = 0 if flags.distill_loss == "consistency_x" else 1

    def loss(theta):
        online = f({"unet": frozen["unet"], **theta}, z_t, t)
        consistency = ((online[index] - target[index]) ** 2).mean((1, 2, 3))
        return np.mean(w_snr * consistency) + 0.7 * np.mean((online[0] - z0) ** 2)

    return loss


@pytest.mark.parametrize("distill_grid", ["trailing", "leading"])
def test_a_perfect_network_has_no_loss(distill_grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ε: the reference compares ε̂ with the clean latent where the teacher's step ends at s = 0."""
    problem = make_problem({**FIRST, "distill_loss": "consistency_epsilon", "distill_grid": distill_grid})
    schedule, problem.batch = problem.frozen.schedule, make_batch(64)
    z0 = prepare(problem.setup.networks, {}, problem.batch, jax.random.split(problem.key, 4)[0]).z0

    def perfect(networks: Any, params: Any, z: Any, t: Any, *_: Any) -> Any:
        alpha, sigma = schedule.alpha_sigma(t)
        return (z - alpha * z0) / sigma

    monkeypatch.setattr(codi, "predict", perfect)
    as_in_training = dataclasses.replace(schedule.sampling, timestep_scaling=10.0)  # c_skip is 0 but at s = 0
    schedule = dataclasses.replace(schedule, sampling=as_in_training)
    problem.frozen = dataclasses.replace(problem.frozen, schedule=schedule)
    value, metrics = problem.loss()
    np.testing.assert_allclose(metrics["consistency"], 0, atol=1e-6)
    # f(z, 0) = z, with its noise: of variance 8.5e-4 at t = 0, which the leading grid has.
    np.testing.assert_allclose(value, 0, atol=1e-4 if distill_grid == "leading" else 1e-6)


COVERING = numerics.covering_combinations(CHOICES)


@pytest.mark.parametrize("combination", COVERING, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_loss_and_gradient_equal_the_equations(combination: dict[str, Any]) -> None:
    problem = make_problem(combination)
    assert_equals(problem, numpy_loss(problem))


@pytest.mark.slow
def test_loss_and_gradient_equal_the_equations_for_every_combination() -> None:
    for combination in numerics.all_combinations(CHOICES):
        problem = make_problem(combination)
        assert_equals(problem, numpy_loss(problem))


# ---- With the real networks, small


@functools.cache
def real_model() -> tuple[Networks, dict[str, Any], NullText, NoiseSchedule]:
    unet, unet_params = small_unet(SMALL_SD)
    vae = AutoencoderKL(VAEConfig.from_dict(TINY_VAE))
    null = NullText(jnp.asarray(np.random.default_rng(3).standard_normal((1, 5, 24)), jnp.float32))
    return Networks(unet, vae), {"unet": unet_params}, null, NoiseSchedule.from_config(SCHEDULER)


def real_problem(flags: CodiFlags, size: int = 4) -> Problem:
    networks, params, null, teacher = real_model()
    setup = codi.configure(networks, flags)
    frozen = Frozen(params, codi.sampling(teacher, flags), null_text=null)
    rng = np.random.default_rng(0)
    batch = {
        "moments": rng.standard_normal((size, 8, 8, 8)).astype("f2"),
        "context": rng.standard_normal((size, 5, 24)).astype("f2"),
        "conditioning": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
    }
    state = codi.init(setup, params.__getitem__, SGD, jax.random.key(0))
    return Problem(codi.loss, setup, state, frozen, jax.tree.map(jnp.asarray, batch), jax.random.key(7))


def perturbed(tree: Any, seed: int) -> Any:
    """Away from the start, where a ControlNet puts out zeros."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def with_trained(problem: Problem) -> Problem:
    state = problem.state
    state = dataclasses.replace(state, params=perturbed(state.params, 1), ema=perturbed(state.ema, 2))
    return dataclasses.replace(problem, state=state)


@pytest.mark.parametrize("onestepode", ["uncontrol", "control"])
def test_the_student_starts_as_the_teacher(onestepode: str) -> None:
    """To the bit: a new ControlNet adds zeros."""
    problem = real_problem(CodiFlags(onestepode=onestepode))
    frozen, batch = problem.frozen, problem.batch
    context, control = batch["context"], batch["conditioning"] / 255.0
    z, t = batch["moments"][..., :4].astype(jnp.float32), jnp.array([19, 259, 519, 999])
    conditions = Conditions(Condition(context, None, control))

    @jax.jit
    def outputs(params: Any) -> Any:
        return tuple(predict(problem.setup.networks, {**frozen.params, **p}, z, t, conditions) for p in ({}, params))

    teacher, student = outputs(problem.state.params)
    assert np.abs(np.asarray(teacher)).max() > 0.01
    np.testing.assert_array_equal(student, teacher)
    for a, b in zip(jax.tree.leaves(problem.state.ema), jax.tree.leaves(problem.state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_teacher_that_stays_as_it_started_needs_a_trained_controlnet() -> None:
    flags = CodiFlags(onestepode_control_params="initial")
    with pytest.raises(ValueError, match="distills a ControlNet that has been trained already: name it with"):
        real_problem(flags)
    for harmless in ({"onestepode": "uncontrol"}, {"distill_type": "unconditional"}):
        codi.configure(real_model()[0], dataclasses.replace(flags, **harmless))


def test_a_given_controlnet_is_where_training_starts_and_is_trained() -> None:
    problem = make_problem(FIRST)
    given, optimizer = standins.controlnet_params(21), optax.adam(0.1)
    load = {"unet": standins.unet_params(1), "controlnet": given}.__getitem__
    state = codi.init(problem.setup, load, optimizer, jax.random.key(0))
    for tree in (state.params, state.ema):
        assert jax.tree.all(jax.tree.map(np.array_equal, tree, {"controlnet": given}))
    after, metrics = jax.jit(codi.METHOD.step(problem.setup, optimizer))(state, problem.frozen, problem.batch)
    assert metrics.keys() >= {"loss", "grad_norm", "consistency", "reconstruction", "skipped"}
    for name, start in given.items():
        moved = np.asarray(after.params["controlnet"][name] - start)
        assert np.all(np.abs(moved) > 0.05)
        averaged = np.asarray(after.ema["controlnet"][name] - start)
        np.testing.assert_allclose(averaged, 0.001 * moved, rtol=1e-2)


def test_the_teachers_step_takes_the_controlnet_of_now() -> None:
    """One program for all steps: with other parameters it gives what the equations say of those."""
    for networks, trees in (("control-target", ("ema",)), ("control-online", ("params",))):
        problem = make_problem({**FIRST, "networks": networks})
        loss = jax.jit(lambda state, p=problem: codi.loss(state.params, state, p.frozen, p.batch, p.key, p.setup)[0])
        for seed in (11, 12):
            later = {tree: {"controlnet": standins.controlnet_params(seed)} for tree in trees}
            problem = dataclasses.replace(problem, state=dataclasses.replace(problem.state, **later))
            wanted = numpy_loss(problem)(float64(problem.state.params))
            np.testing.assert_allclose(loss(problem.state), wanted, rtol=1e-5)
        assert loss._cache_size() == 1


def test_all_that_is_random_is_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, noise, time and guidance: no two of them agree, nor do those of two steps."""
    size, calls, latents = 1000, [], []
    real_predict, real_prepare = codi.predict, codi.prepare

    def record(networks: Any, params: Any, z: Any, t: Any, conditions: Any, guidance: Any = None) -> Any:
        calls.append((np.asarray(z), np.asarray(t), None if guidance is None else np.asarray(guidance.scale)))
        return real_predict(networks, params, z, t, conditions, guidance)

    def record_latents(*arguments: Any) -> Any:
        inputs = real_prepare(*arguments)
        latents.append(np.asarray(inputs.z0))
        return inputs

    monkeypatch.setattr(codi, "predict", record)
    monkeypatch.setattr(codi, "prepare", record_latents)
    problem = make_problem({**FIRST, "cfg_aware_distill": True}, distill_guidance_min=3.0, distill_guidance_max=5.0)
    batch = make_batch(size)
    problem.batch = {**batch, "moments": jnp.zeros_like(batch["moments"])}
    alpha = np.sqrt(np.asarray(problem.frozen.schedule.alphas_cumprod, np.float64))
    draws = []
    for seed in (0, 1):
        calls.clear()
        latents.clear()
        problem.key = jax.random.key(seed)
        problem.loss()
        (z_teacher, t_teacher, w_teacher), (z_t, t, w), (_, s, w_target) = calls
        (z0,) = latents
        assert w_teacher is None
        np.testing.assert_array_equal(z_teacher, z_t)
        np.testing.assert_array_equal(t_teacher, t)
        np.testing.assert_array_equal(w, w_target)
        np.testing.assert_array_equal(s, np.maximum(t - 125, 0))
        a = alpha[t][:, None, None, None]
        noise = (z_t - a * z0) / np.sqrt(1 - a**2)
        assert set(np.unique(t)) == set(range(124, 1000, 125))
        np.testing.assert_allclose(np.bincount(t // 125) / size, 1 / 8, atol=0.05)
        assert 3 <= w.min() < 3.02
        assert 4.98 < w.max() < 5
        # Two draws of different shapes from one key agree in their first numbers.
        draws += [z0.ravel()[:size], noise.ravel()[:size], noise[:, 1, 2, 1], t, w]
        np.testing.assert_allclose(noise.std(), 1, atol=0.03)
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / size**0.5
    assert np.abs(np.corrcoef([draws[3], np.abs(draws[1]), draws[4] ** 2]) - np.eye(3)).max() < 5 / size**0.5


def test_microbatches_draw_apart_too() -> None:
    """A batch of one sample four times over: alike draws would make the microbatches alike."""
    problem = make_problem(FIRST)
    batch = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, axis=0), problem.batch)
    step = jax.jit(codi.METHOD.step(problem.setup, optax.identity(), accumulation=4))
    _, metrics = step(problem.state, problem.frozen, batch)
    seen = []
    key = jax.random.fold_in(problem.state.key, 0)
    one = jax.tree.map(lambda x: x[:1], batch)
    for i in range(4):
        problem.batch, problem.key = one, jax.random.fold_in(key, i)
        seen.append(float(problem.loss()[0]))
    assert len(set(seen)) == 4
    np.testing.assert_allclose(metrics["loss"], np.mean(seen), rtol=1e-4)


# ---- Configuration


def test_the_schedule_of_the_student_has_the_grid() -> None:
    flags = CodiFlags(distill_learning_steps=20, distill_grid="leading", distill_timestep_scaling=3.0)
    schedule = codi.sampling(NoiseSchedule.from_config(SCHEDULER), flags)
    t, s = codi.grid(schedule)
    np.testing.assert_array_equal(t, np.arange(20) * 50)
    np.testing.assert_array_equal(s, np.maximum(t - 50, 0))
    assert schedule.sampling.timestep_scaling == 3
    t, s = codi.grid(codi.sampling(NoiseSchedule.from_config(SCHEDULER), CodiFlags()))
    assert (len(t), t[0], t[-1], s[0], s[-1]) == (50, 19, 999, 0, 979)
    with pytest.raises(ValueError, match=r"use the one from codi\.sampling"):
        codi.grid(NoiseSchedule.from_config(SCHEDULER))


def test_the_teachers_prediction_type_is_not_overridden() -> None:
    teacher = NoiseSchedule.from_config(SCHEDULER)
    for name in ("v_prediction", "vprediction", "x_prediction", "xprediction"):
        with pytest.warns(UserWarning, match=f"--onestepode_sample_eps {name} has no effect.*epsilon"):
            schedule = codi.sampling(teacher, CodiFlags(onestepode_sample_eps=name))
        assert schedule.prediction_type == "epsilon"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (None, "epsilon", "nprediction"):
            codi.sampling(teacher, CodiFlags(onestepode_sample_eps=name))
        of_v = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": "v_prediction"})
        codi.sampling(of_v, CodiFlags(onestepode_sample_eps="vprediction"))


@pytest.mark.parametrize(
    ("flags", "trained", "frozen"),
    [
        ({}, {"controlnet"}, {"unet", "vae"}),
        ({"train": "unet"}, {"controlnet", "unet"}, {"unet", "vae"}),
        ({"onestepode_control_params": "initial"}, {"controlnet"}, {"unet", "vae", "controlnet"}),
        ({"onestepode_control_params": "initial", "onestepode": "uncontrol"}, {"controlnet"}, {"unet", "vae"}),
        ({"distill_type": "unconditional"}, {"unet"}, {"unet", "vae"}),
    ],
)
def test_what_is_trained_and_what_is_frozen(flags: dict[str, Any], trained: set[str], frozen: set[str]) -> None:
    setup = codi.configure(CONTROLNET, CodiFlags(ema_decay=0.9, **flags), remat=True)
    assert ({*setup.trained}, {*setup.frozen}) == (trained, frozen)
    assert setup.student == setup.networks
    assert all(network.remat for name, network in setup.student.by_name().items() if name != "vae")
    assert (setup.student.controlnet is None) == ("controlnet" not in trained)
    assert (setup.ema_decay, setup.needs_null_text) == (0.9, False)
    for guided in ("cfg_aware_distill", "onestepode_cfg"):
        assert codi.configure(CONTROLNET, CodiFlags(**flags, **{guided: True})).needs_null_text


def test_a_teacher_that_takes_its_guidance_as_an_input_is_refused() -> None:
    message = r"takes its guidance as an input \(time_cond_proj_dim\), which CoDi does not give it: start from"
    with pytest.raises(ValueError, match=message):
        codi.configure(DISTILLED, CodiFlags())


def test_the_average_is_shown_and_exported() -> None:
    for networks in ("control-target", "full-uncontrol"):
        problem = make_problem({**FIRST, "networks": networks})
        result = codi.METHOD.result(problem.state, problem.setup, {}.__getitem__)
        assert result is problem.state.ema
        export = codi.METHOD.export(problem.state, problem.setup, {}.__getitem__)
        assert export.networks.keys() == {*problem.setup.trained}
        for name, (network, params) in export.networks.items():
            assert network == problem.setup.student.by_name()[name]
            assert params is problem.state.ema[name]
        assert (export.beside, export.lora, export.is_whole) == ({}, {}, True)


def test_without_condition_the_unet_is_trained_alone() -> None:
    problem = real_problem(CodiFlags(distill_type="unconditional", cfg_aware_distill=True))
    assert problem.setup.networks.controlnet is None
    assert set(problem.state.params) == {"unet"}
    del problem.batch["conditioning"]
    value, _ = jax.eval_shape(problem.loss)
    assert value.shape == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill_guidance_min": 20.0}, "--distill_guidance_min 20.0 .* at most --distill_guidance_max 14.0"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0"),
        ({"distill_learning_steps": 0}, "--distill_learning_steps 0 is not possible: it must be at least 1"),
        ({"snr_gamma": 0.0}, "--snr_gamma 0.0 is not possible: it must be positive"),
        (
            {"distill_loss": "consistency_epsilon", "distill_learning_steps": 1},
            "--distill_learning_steps 1 is not possible: it must be at least 2 with --distill_loss consistency_epsilon",
        ),
        (
            {"distill_loss": "consistency_epsilon", "distill_learning_steps": 2, "distill_grid": "leading"},
            "--distill_learning_steps 2 is not possible: it must be at least 3 with --distill_loss consistency_epsilon",
        ),
    ],
)
def test_impossible_flags_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodiFlags(**values).check()


# ---- Devices

SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import test_codi as tests

assert jax.device_count() == 8
problem = tests.guided_problem(sys.argv[1], size=16)

step = jax.jit(tests.codi.METHOD.step(problem.setup, tests.SGD, accumulation=2))

mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
everywhere = NamedSharding(mesh, PartitionSpec())
spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
def shard(x):
    last = NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))
    return last if x.ndim and x.shape[-1] % 2 == 0 else everywhere

one = jax.device_put((problem.state, problem.frozen, problem.batch), jax.devices()[0])
eight = (
    jax.device_put(problem.state, jax.tree.map(shard, problem.state)),
    jax.device_put(problem.frozen, jax.tree.map(shard, problem.frozen)),
    jax.device_put(problem.batch, spread),
)
for _ in range(2):
    (state_1, metrics_1), (state_8, metrics_8) = step(*one), step(*eight)
    one, eight = (state_1, *one[1:]), (state_8, *eight[1:])
    for name in metrics_1:
        np.testing.assert_allclose(metrics_8[name], metrics_1[name], rtol=1e-4, err_msg=name)
for a, b in zip(jax.tree.leaves(state_1.params), jax.tree.leaves(state_8.params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(a).max(), 1e-3))
"""


def guided_problem(networks: str, size: int) -> Problem:
    if networks == "real":
        flags = CodiFlags(cfg_aware_distill=True, snr_gamma=5.0)
        return with_trained(real_problem(flags, size))
    problem = make_problem({**FIRST, "networks": "control-target", "cfg_aware_distill": True, "snr_gamma": 5.0})
    state = dataclasses.replace(problem.state, opt_state=SGD.init(problem.state.params))
    return dataclasses.replace(problem, state=state, batch=make_batch(size))


@pytest.mark.parametrize("networks", ["stand-ins", pytest.param("real", marks=pytest.mark.slow)])
def test_one_device_and_eight_agree(networks: str) -> None:
    folder = Path(__file__).resolve().parent
    paths = ":".join(str(p) for p in (folder, folder.parent, folder.parent.parent))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": paths}
    command = [sys.executable, "-c", SCRIPT, networks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
