"""A method as a value: its defaults, and the step that a loss makes, against NumPy in float64."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models.vae import AutoencoderKL
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim
from codi_jax.training.method import Method, Setup, export_result

VAE: Any = AutoencoderKL
NETWORKS = Networks(None, vae=VAE)
RATE, DECAY = 0.1, 0.75


@dataclass(frozen=True, kw_only=True)
class LineSetup(Setup):
    slope: float = 2.0


def configure(networks: Networks, flags: Flags, *, remat: bool = False) -> LineSetup:
    return LineSetup(networks=networks, student=networks, trained=("vae",), frozen=(), ema_decay=DECAY)


def init(setup: Setup, load: Any, optimizer: Any, key: Any, *, mixed_precision: Any = "no") -> Any:
    ema = setup.ema_decay is not None
    return optim.init_state({"vae": load("vae")}, optimizer, key, ema=ema, mixed_precision=mixed_precision)


def loss(params: Any, state: Any, frozen: Frozen, batch: Any, key: Any, setup: LineSetup) -> Any:
    """mean (w x − slope · x)², to which the average adds itself, without a gradient."""
    average = 0.0 if state.ema is None else jnp.sum(state.ema["vae"]["w"])
    distance = jnp.mean((params["vae"]["w"] * batch["x"] - setup.slope * batch["x"]) ** 2)
    return distance + frozen.params["offset"], {"average": average + 0.0 * distance}


METHOD = Method(flags=Flags, configure=configure, init=init, loss=loss)


@pytest.mark.parametrize("ema_decay", [DECAY, None])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_of_a_loss_is_one_of_gradient_descent(accumulation: int, ema_decay: float | None) -> None:
    setup = replace(configure(NETWORKS, Flags()), ema_decay=ema_decay)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
    state = METHOD.init(setup, lambda name: {"w": jnp.asarray([1.0])}, optimizer, jax.random.key(0))
    x = np.random.default_rng(0).standard_normal(8)
    step = METHOD.step(setup, optimizer, accumulation)
    frozen: Any = Frozen({"offset": jnp.float32(0.5)}, None)
    w, average = 1.0, 1.0
    for _ in range(2):
        state, metrics = step(state, frozen, {"x": jnp.asarray(x, jnp.float32)})
        np.testing.assert_allclose(metrics["loss"], np.mean(((w - 2) * x) ** 2) + 0.5, rtol=1e-5)
        np.testing.assert_allclose(metrics["average"], 0 if ema_decay is None else average, rtol=1e-5)
        w -= RATE * np.mean(2 * (w - 2) * x**2)
        average = DECAY * average + (1 - DECAY) * w
        np.testing.assert_allclose(state.params["vae"]["w"], [w], rtol=1e-5)
    # What is shown and exported is the average where there is one.
    (shown,) = METHOD.result(state, setup, lambda _: {})["vae"].values()
    np.testing.assert_allclose(shown, [w if ema_decay is None else average], rtol=1e-5)
    export = METHOD.export(state, setup, lambda _: {})
    assert export == export_result(state, setup, lambda _: {})
    network, params = export.networks["vae"]
    assert network is VAE
    assert params["w"] is shown
    assert export.is_whole


def test_a_method_samples_as_its_teacher_and_has_one_optimizer_unless_it_says_otherwise() -> None:
    schedule, made = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"}), []

    def make(*given: Any, **more: Any) -> optax.GradientTransformation:
        made.append((given, more))
        return optax.sgd(RATE)

    assert METHOD.sampling(schedule, Flags()) is schedule
    METHOD.optimizer(Flags(), make, 7)
    assert made == [((7,), {})]


def test_a_method_has_one_way_to_train() -> None:
    for ways in ({}, {"loss": loss, "train_step": METHOD.step}):
        with pytest.raises(TypeError, match="either a loss or a train_step"):
            Method(flags=Flags, configure=configure, init=init, **ways)
