"""What holds for each way to train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
from standins import CHANNELS, CONTROLNET, EDITING, SCHEDULER, TEXT_TO_IMAGE, make_batch, null_text

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import autoencoder, bk_sdm, codi, denoising, disback, lcm, tcd
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training.method import Method

# Each with a model that it trains.
METHODS: dict[str, tuple[Method[Any, Any], Networks]] = {
    "codi": (codi.METHOD, CONTROLNET),
    "lcm": (lcm.TEXT, TEXT_TO_IMAGE),
    "lcm, edit": (lcm.EDIT, EDITING),
    "tcd": (tcd.TEXT, CONTROLNET),
    "tcd, edit": (tcd.EDIT, EDITING),
    "text to image": (denoising.TEXT_TO_IMAGE, TEXT_TO_IMAGE),
    "controlnet": (denoising.CONTROLNET, CONTROLNET),
    "instruct-pix2pix": (denoising.INSTRUCT_PIX2PIX, EDITING),
    "bk-sdm": (bk_sdm.method(None), TEXT_TO_IMAGE),
    "disback, stage 1": (disback.degradation(CHANNELS), CONTROLNET),
    "disback, stage 2": (disback.backtracking(CHANNELS, has_path=True), CONTROLNET),
    "dmd": (disback.backtracking(CHANNELS, has_path=False), EDITING),
    "autoencoder": (autoencoder.METHOD, TEXT_TO_IMAGE),
}
WITH_REAL_NETWORKS_ONLY = ("bk-sdm", "autoencoder")  # a choice of blocks, and images


def in_all_methods(*, with_stand_ins: bool = False) -> Any:
    names = [name for name in METHODS if not (with_stand_ins and name in WITH_REAL_NETWORKS_ONLY)]
    return pytest.mark.parametrize("name", names)


@in_all_methods()
def test_it_has_a_loss_or_a_step_of_its_own(name: str) -> None:
    method, _ = METHODS[name]
    assert (method.loss is None) != (method.train_step is None)
    for changes in ({"loss": codi.loss, "train_step": disback.train_step}, {"loss": None, "train_step": None}):
        with pytest.raises(TypeError, match=r"a method has either a loss or a train_step\."):
            dataclasses.replace(method, **changes)


@in_all_methods()
def test_its_flags_have_defaults_that_are_possible(name: str) -> None:
    METHODS[name][0].flags().check()


def setup_of(name: str) -> Any:
    method, networks = METHODS[name]
    return method.configure(networks, method.flags())


@in_all_methods(with_stand_ins=True)
def test_its_setup_is_static_and_names_networks_that_there_are(name: str) -> None:
    setup, (_, networks) = setup_of(name), METHODS[name]
    assert hash(setup) == hash(setup_of(name))
    assert setup == setup_of(name)
    assert setup.trained
    assert {*setup.trained} <= setup.student.by_name().keys()
    assert {*setup.frozen} <= networks.by_name().keys()


@in_all_methods(with_stand_ins=True)
def test_it_recomputes_in_what_is_trained_if_it_is_asked_to(name: str) -> None:
    method, networks = METHODS[name]
    student = method.configure(networks, method.flags(), remat=True).student.by_name()
    assert all(student[name].remat for name in method.configure(networks, method.flags()).trained)


@in_all_methods(with_stand_ins=True)
def test_its_schedule_keeps_the_noise_of_the_teacher(name: str) -> None:
    method, _ = METHODS[name]
    teacher = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": "v_prediction"})
    student = method.sampling(teacher, method.flags())
    np.testing.assert_array_equal(student.alphas_cumprod, teacher.alphas_cumprod)
    assert student.prediction_type == "v_prediction"
    # What is saved says the same when it is read again.
    again = NoiseSchedule.from_config(student.to_config())
    assert again.sampling == student.sampling


@in_all_methods(with_stand_ins=True)
def test_it_steps_shows_and_exports_by_the_same_calls(name: str) -> None:
    """What the runner does with a method, in shapes alone."""
    method, networks = METHODS[name]
    flags = method.flags()
    setup = method.configure(networks, flags)
    unet = standins.unet_params(1, edits=networks.is_instruct_pix2pix)
    own_time = {"time_embedding": {}} if setup.student.unet.config.time_cond_proj_dim is not None else {}
    given = {"unet": {**unet, **own_time}, "controlnet": standins.controlnet_params(2), "path_end": unet}
    optimizer = method.optimizer(flags, lambda num_updates, learning_rate=None: optax.sgd(0.1), 10)
    schedule = method.sampling(NoiseSchedule.from_config(SCHEDULER), flags)
    frozen = Frozen(
        {network: given[network] for network in setup.frozen if network in given},
        schedule,
        null_text=null_text() if setup.needs_null_text else None,
        target=unet if setup.target or name.startswith("disback, stage 2") else None,
    )

    def train(key: jax.Array) -> Any:
        state = method.init(setup, given.__getitem__, optimizer, key)
        new, metrics = method.step(setup, optimizer, accumulation=2)(state, frozen, make_batch(2 * CHANNELS))
        return state, new, new.step, metrics, method.result(new, setup, given.__getitem__)

    state, new, step, metrics, result = jax.eval_shape(train, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert (step.shape, step.dtype) == ((), jnp.int32)
    assert {"loss", "grad_norm", "skipped", "skipped_in_a_row"} <= metrics.keys()
    assert result.keys() == {*setup.trained}

    state = method.init(setup, given.__getitem__, optimizer, jax.random.key(0))
    export = method.export(state, setup, given.__getitem__)
    for network, (module, params) in export.networks.items():
        assert module == dataclasses.replace(setup.student.by_name()[network], remat=False)
        shown = method.result(state, setup, given.__getitem__)[network]
        assert jax.tree.structure(params) == jax.tree.structure(shown)


def test_a_step_follows_the_gradient_of_the_loss_and_the_average_follows_the_step() -> None:
    method, networks = METHODS["controlnet"]
    setup = method.configure(networks, method.flags(use_ema=True, ema_decay=0.5))
    optimizer, load = optax.sgd(0.1), {"controlnet": standins.controlnet_params(2)}.__getitem__
    state = method.init(setup, load, optimizer, jax.random.key(0))
    frozen, batch = (
        Frozen({"unet": standins.unet_params(1)}, NoiseSchedule.from_config(SCHEDULER)),
        make_batch(CHANNELS),
    )
    new, _ = jax.jit(method.step(setup, optimizer))(state, frozen, batch)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 0)
    slope = jax.jit(jax.grad(lambda params: denoising.loss(params, state, frozen, batch, key, setup)[0]))(state.params)
    trees = (state.params, slope, new.params, new.ema)
    for start, gradient, after, average in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(after, start - 0.1 * gradient, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(average, 0.5 * start + 0.5 * after, rtol=1e-5, atol=1e-7)
