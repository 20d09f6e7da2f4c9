"""Optimizer, schedules and updates against PyTorch and diffusers, and the state's bookkeeping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler

from codi_jax.training import optim
from codi_jax.training.optim import OptimizerFlags, TrainState, init_state, learning_rate_schedule, make_optimizer


def tree(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"layer_{i}": {"kernel": jnp.asarray(rng.standard_normal(s), jnp.float32)} for i, s in enumerate(shapes)}


def leaves(x: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(x)]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- Schedules


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.5}),
    ],
)
def test_learning_rates_are_those_of_diffusers(name: str, numbers: dict[str, Any], warmup: int) -> None:
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, torch_optimizer, num_warmup_steps=warmup, num_training_steps=41, **numbers)
    flags = OptimizerFlags(
        learning_rate=3e-4, lr_scheduler=name, lr_warmup_steps=warmup, **{f"lr_{k}": v for k, v in numbers.items()}
    )
    ours = jax.jit(learning_rate_schedule(flags, 41))
    for step in range(45):  # beyond the end too, but for the cosine, which rises again there
        if step > 41 and name == "cosine":
            break
        wanted = torch_optimizer.param_groups[0]["lr"]
        np.testing.assert_allclose(ours(step), wanted, rtol=2e-5, atol=1e-10, err_msg=str(step))
        torch_optimizer.step()
        theirs.step()


def test_scale_lr_multiplies_by_the_samples_of_an_update() -> None:
    flags = OptimizerFlags(learning_rate=1e-5, scale_lr=True)
    np.testing.assert_allclose(learning_rate_schedule(flags, 10, batch_size=64)(0), 64e-5, rtol=1e-6)
    unscaled = dataclasses.replace(flags, scale_lr=False)
    np.testing.assert_allclose(learning_rate_schedule(unscaled, 10, batch_size=64)(0), 1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "--learning_rate -1.0 is not possible: it must be at least 0"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm 0.0 is not possible: it must be positive; inf is no limit"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon"),
    ],
)
def test_impossible_flags_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        OptimizerFlags(**values).check()


def test_a_polynomial_schedule_needs_a_learning_rate_above_its_end() -> None:
    with pytest.raises(ValueError, match="--learning_rate 1e-08 must be above"):
        make_optimizer(OptimizerFlags(lr_scheduler="polynomial", learning_rate=1e-8), 10)


# ---- AdamW


@pytest.mark.parametrize("max_grad_norm", [0.05, 1.0, float("inf")])
def test_updates_are_those_of_torch(max_grad_norm: float) -> None:
    """AdamW behind clip_grad_norm_, with a schedule; torch adds 1e-6 to the norm."""
    flags = OptimizerFlags(
        learning_rate=1e-2, lr_scheduler="linear", lr_warmup_steps=2, adam_beta1=0.8, adam_beta2=0.95,
        adam_weight_decay=0.1, adam_epsilon=1e-6, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    params = tree((5, 4), (4,), (3, 3, 2, 2))
    optimizer = make_optimizer(flags, 12)
    update = jax.jit(optimizer.update)
    opt_state = optimizer.init(params)

    theirs = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in leaves(params)]
    torch_optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    schedule = get_scheduler("linear", torch_optimizer, num_warmup_steps=2, num_training_steps=12)
    for i in range(12):
        grads = jax.tree.map(lambda g, i=i: g * 10.0 ** (i % 3 - 2), tree((5, 4), (4,), (3, 3, 2, 2), seed=i + 1))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        for parameter, g in zip(theirs, leaves(grads), strict=True):
            parameter.grad = torch.from_numpy(g.copy())
        torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        torch_optimizer.step()
        schedule.step()
    for a, b in zip(leaves(params), theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_constants_of_a_lora_are_neither_decayed_nor_changed(use_8bit_adam: bool) -> None:
    params = {"to_q": {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 4)), "alpha": jnp.float32(4)}}
    params["stacked"] = {"alpha": jnp.ones(3), "down": jnp.ones((3, 4, 2))}
    flags = OptimizerFlags(learning_rate=0.1, adam_weight_decay=0.5, use_8bit_adam=use_8bit_adam)
    optimizer = make_optimizer(flags, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert updates["to_q"]["alpha"] == 0
    assert not np.any(updates["stacked"]["alpha"])
    assert np.all(updates["to_q"]["down"] != 0)
    # Nor do they count in the norm that limits the others.
    without = {"to_q": {k: v for k, v in params["to_q"].items() if k != "alpha"}, "stacked": {"d": jnp.ones((3, 4, 2))}}
    alone, _ = optimizer.update(jax.tree.map(jnp.ones_like, without), optimizer.init(without), without)
    np.testing.assert_array_equal(alone["to_q"]["down"], updates["to_q"]["down"])


# ---- One step


def quadratic(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    del key
    loss = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    return loss, {"twice": 2 * loss}


def problem(size: int = 8, **values: Any) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((size, 6)), "y": rng.standard_normal((size, 3))}
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    optimizer = optax.adam(1e-2)
    params = {"w": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    return init_state(params, optimizer, jax.random.key(3), **values), optimizer, batch


def test_a_step_follows_the_gradient_and_counts() -> None:
    state, optimizer, batch = problem()
    x, y, w = (np.asarray(a, np.float64) for a in (batch["x"], batch["y"], state.params["w"]))
    gradient = 2 / y.size * x.T @ (x @ w - y)
    after, metrics = optim.step(state, quadratic, batch, optimizer)
    np.testing.assert_allclose(metrics["loss"], np.mean((x @ w - y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["twice"], 2 * metrics["loss"])
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    updates, _ = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state.opt_state)
    np.testing.assert_allclose(after.params["w"], w + np.asarray(updates["w"]), rtol=1e-5)
    assert after.step == 1
    assert after.skipped == metrics["skipped"] == 0
    assert after.key == state.key


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulation: int) -> None:
    state, optimizer, batch = problem()
    whole, metrics = optim.step(state, quadratic, batch, optimizer)
    parts, same = jax.jit(lambda s, b: optim.step(s, quadratic, b, optimizer, accumulation=accumulation))(state, batch)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-5)


def test_microbatches_and_steps_have_keys_of_their_own() -> None:
    """Their mean is a number that none of them alone has, and the next step has others."""
    state, optimizer, batch = problem()

    def noisy(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return params["w"].sum() * 0, {"draw": jax.random.normal(key)}

    drawn = []
    for _ in range(2):
        key = jax.random.fold_in(state.key, state.step)
        draws = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(4)]
        assert len({float(d) for d in draws}) == 4
        state, metrics = optim.step(state, noisy, batch, optimizer, accumulation=4)
        np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-5)
        drawn.append(float(metrics["draw"]))
    assert drawn[0] != drawn[1]


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    state, optimizer, batch = problem(size=7)
    with pytest.raises(ValueError, match="7 samples cannot be divided by --gradient_accumulation_steps 2"):
        optim.step(state, quadratic, batch, optimizer, accumulation=2)


def test_moving_average() -> None:
    state, optimizer, batch = problem(ema=True)
    first = np.asarray(state.params["w"], np.float64)
    np.testing.assert_array_equal(state.ema["w"], first)
    wanted = first
    for _ in range(3):
        state, _ = optim.step(state, quadratic, batch, optimizer, ema_decay=0.9)
        wanted = 0.9 * wanted + 0.1 * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], wanted, rtol=1e-6)
    assert problem()[0].ema is None


@pytest.mark.parametrize("what", ["loss", "gradient", "one microbatch"])
def test_a_step_with_a_number_that_is_not_finite_changes_nothing(what: str) -> None:
    state, optimizer, batch = problem(ema=True)
    state, _ = optim.step(state, quadratic, batch, optimizer, ema_decay=0.9)
    bad = {**batch, "x": batch["x"].at[5, 2].set(jnp.nan)}

    def infinite_loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, metrics = quadratic(params, batch, key)
        return loss + jax.lax.stop_gradient(jnp.where(jnp.isnan(batch["x"]).any(), jnp.inf, 0.0)), metrics

    def root(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.sqrt(
            jnp.sum((params["w"] - jax.lax.stop_gradient(params["w"])) ** 2)
        ), {}  # finite, its slope is not

    loss = {"loss": infinite_loss, "gradient": root, "one microbatch": quadratic}[what]
    accumulation = 4 if what == "one microbatch" else 1
    step = jax.jit(lambda s, b: optim.step(s, loss, b, optimizer, ema_decay=0.9, accumulation=accumulation))
    before = state
    for i in (1, 2):
        state, metrics = step(state, bad)
        assert state.skipped == state.skipped_in_a_row == metrics["skipped_in_a_row"] == i
        assert_same((state.params, state.opt_state, state.ema), (before.params, before.opt_state, before.ema))
    assert state.step == 3
    good, metrics = optim.step(state, quadratic, batch, optimizer, ema_decay=0.9)
    assert good.skipped == metrics["skipped"] == 2
    assert good.skipped_in_a_row == 0
    assert np.all(np.isfinite(good.params["w"]))
    assert np.any(np.asarray(good.params["w"]) != np.asarray(before.params["w"]))


# ---- float16


def half(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gradients of 2⁻²⁸, which float16 rounds to zero, times ``gain``."""
    del key
    out = (params["w"].astype(jnp.float16) * batch["gain"].astype(jnp.float16)[:, None]).astype(jnp.float32)
    return out.sum() * 2.0**-28, {}


def test_loss_scaling_saves_gradients_that_float16_has_not() -> None:
    optimizer = optax.sgd(2.0**28)
    params = {"w": jnp.ones((1, 3))}
    batch = {"gain": jnp.ones(1)}
    lost = init_state(params, optimizer, jax.random.key(0))
    lost, _ = optim.step(lost, half, batch, optimizer)
    np.testing.assert_array_equal(lost.params["w"], 1)
    state = init_state(params, optimizer, jax.random.key(0), mixed_precision="fp16")
    assert state.loss_scale.scale == 2**16
    state, metrics = optim.step(state, half, batch, optimizer)
    np.testing.assert_array_equal(state.params["w"], 0)
    np.testing.assert_allclose(metrics["loss"], 3 * 2.0**-28)  # as if nothing had been scaled
    np.testing.assert_allclose(metrics["grad_norm"], 3**0.5 * 2.0**-28, rtol=1e-6)


def test_an_overflow_halves_the_scale_until_it_fits() -> None:
    optimizer = optax.sgd(1.0)
    state = init_state({"w": jnp.ones((1, 3))}, optimizer, jax.random.key(0), mixed_precision="fp16")
    state = dataclasses.replace(state, loss_scale=dataclasses.replace(state.loss_scale, scale=jnp.float32(2.0**46)))
    step = jax.jit(lambda s: optim.step(s, half, {"gain": jnp.ones(1)}, optimizer)[0])
    for i in range(1, 4):  # 2^46 · 2^-28 = 2^18: three halvings to below float16's 65504 = 2^16 - 32
        state = step(state)
        assert (state.skipped, state.loss_scale.scale, state.loss_scale.good_steps) == (i, 2.0 ** (46 - i), 0)
    np.testing.assert_array_equal(state.params["w"], 1)
    state = step(state)
    assert (state.skipped, state.skipped_in_a_row, state.loss_scale.scale) == (3, 0, 2.0**43)
    assert state.loss_scale.good_steps == 1
    np.testing.assert_allclose(state.params["w"], 1 - 2.0**-28)


def test_the_scale_grows_after_2000_good_steps_and_stays_above_one() -> None:
    scale = optim.LossScale(jnp.float32(8), jnp.int32(1998))
    scale = scale.after(jnp.bool_(True))
    assert (scale.scale, scale.good_steps) == (8, 1999)
    scale = scale.after(jnp.bool_(True))
    assert (scale.scale, scale.good_steps) == (16, 0)
    for _ in range(9):
        scale = scale.after(jnp.bool_(False))
    assert scale.scale == 1


# ---- State


def test_the_state_owns_its_arrays_so_that_it_can_be_donated() -> None:
    """A second donation of one buffer is an error, and of a frozen network's buffer the end of that network."""
    shared = {"w": jnp.ones((6, 3)), "small": jnp.ones(2)}
    key = jax.random.key(0)
    for use_8bit_adam in (False, True):
        optimizer = make_optimizer(OptimizerFlags(use_8bit_adam=use_8bit_adam), 10)
        state = init_state(shared, optimizer, key, ema=True, mixed_precision="fp16")
        step = jax.jit(lambda s, o=optimizer: optim.step(s, _sum, {}, o, ema_decay=0.5)[0], donate_argnums=0)
        state = step(step(state))
        assert state.step == 2
    assert shared["w"].sum() == 18
    jax.random.normal(key)


def _sum(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return sum(leaf.sum() for leaf in jax.tree.leaves(params)), {}


def test_trained_parameters_are_float32() -> None:
    state = init_state({"w": jnp.ones(3, jnp.bfloat16)}, optax.adam(1e-3), jax.random.key(0), ema=True)
    assert state.params["w"].dtype == state.ema["w"].dtype == jnp.float32


def test_the_dtype_of_each_precision() -> None:
    assert [optim.compute_dtype(p) for p in ("no", "fp16", "bf16")] == [jnp.float32, jnp.float16, jnp.bfloat16]
