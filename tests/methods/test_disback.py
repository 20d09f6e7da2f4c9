"""The steps of DisBack: who is trained when, on what, and that all of it can be compiled without values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
from matching import SIDE, B, schedule_of
from standins import CONTROLNET, DISTILLED, EDITING, INPAINTING, TEXT_TO_IMAGE, make_batch, null_text

from codi_jax.methods import disback
from codi_jax.methods.disback import DisbackFlags, DisbackSetup, DisbackState, target_index
from codi_jax.methods.dmd import fake_loss, generator_loss
from codi_jax.methods.generator import generator_unet
from codi_jax.models.unet import UNet2DCondition
from codi_jax.pipeline.conditions import Condition, Conditions, Frozen, Inputs, NullText, prepare
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim

OPTIMIZERS = optax.sgd(0.1), optax.sgd(0.2)


def make(**flags: Any) -> tuple[DisbackSetup, Frozen, DisbackState, Any]:
    """A step's arguments, with stand-ins for the networks; φ starts as the end of a path, and the teacher is target."""
    method, of_method = disback.backtracking(SIDE, has_path=True), DisbackFlags(real_guidance_scale=2.0, **flags)
    setup = method.configure(TEXT_TO_IMAGE, of_method)
    teacher, node = standins.unet_params(1), standins.unet_params(4)
    frozen = Frozen({}, schedule_of("v_prediction"), null_text=null_text(), target=teacher)
    state = method.init(setup, {"unet": teacher, "path_end": node}.__getitem__, OPTIMIZERS, jax.random.key(0))
    return setup, frozen, state, make_batch(B)


def step_of(setup: DisbackSetup, accumulation: int = 1) -> Any:
    return jax.jit(disback.backtracking(SIDE, has_path=True).step(setup, OPTIMIZERS, accumulation))


def test_the_target_advances_and_arrives():
    """Once every interval of the generator's updates; the reference advances once only and never returns."""
    flags = DisbackFlags(interval=2, dfake_gen_update_ratio=3)
    indices = [target_index(step, flags, 4) for step in range(40)]
    assert indices == [1] * 4 + [2] * 6 + [3] * 6 + [4] * 24
    assert target_index(0, flags, 1) == 1  # a path of one node: the teacher at once
    assert [target_index(step, DisbackFlags(interval=1), 3) for step in range(5)] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_generator_is_updated_every_kth_step_and_the_fake_score_in_all(ratio: int):
    setup, frozen, state, batch = make(dfake_gen_update_ratio=ratio)
    step = step_of(setup)
    updates = 0
    for i in range(4):
        before = state
        state, metrics = step(state, frozen, batch)
        is_turn = i % ratio == 0
        updates += is_turn
        changed = [
            bool(jnp.any(a != b))
            for a, b in zip(*map(jax.tree.leaves, (before.generator.params, state.generator.params)))
        ]
        assert all(changed) == any(changed) == is_turn
        assert np.isfinite(metrics["generator_loss"]) == is_turn
        assert int(state.generator.step) == updates
        assert int(state.step) == i + 1
        assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before.fake.params, state.fake.params))))


def test_a_step_is_the_generators_update_and_then_the_fake_scores():
    """The fake score is taught what the generator makes now, and the generator by the fake score as it was."""
    setup, frozen, state, batch = make()
    new, metrics = step_of(setup)(state, frozen, batch)
    key = jax.random.fold_in(optim.step_key(state.generator), 0)
    value, gradient = jax.value_and_grad(
        lambda params: generator_loss(params, state.fake.params, frozen, batch, key, setup)[0]
    )(state.generator.params)
    generator = jax.tree.map(lambda p, g: p - 0.1 * g, state.generator.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.generator.params, generator)
    np.testing.assert_allclose(metrics["generator_loss"], value, rtol=1e-5)
    key = jax.random.fold_in(optim.step_key(state.fake), 0)
    gradient = jax.grad(lambda params: fake_loss(params, generator, frozen, batch, key, setup)[0])(state.fake.params)
    fake = jax.tree.map(lambda p, g: p - 0.2 * g, state.fake.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new.fake.params, fake)


def test_the_average_is_over_updates_of_the_generator_and_changes_no_training():
    setup, frozen, state, batch = make(dfake_gen_update_ratio=2, use_ema=True, ema_decay=0.75)
    plain_setup, _, plain, _ = make(dfake_gen_update_ratio=2)
    assert plain.generator.ema is None
    assert plain.generator.result is plain.generator.params
    step, plain_step = step_of(setup), step_of(plain_setup)
    average = jax.tree.map(np.float64, state.generator.params)
    for i in range(3):
        state, _ = step(state, frozen, batch)
        plain, _ = plain_step(plain, frozen, batch)
        if i % 2 == 0:
            average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.float64(p), average, state.generator.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.generator.result, average)
    for ours, theirs in ((state.generator, plain.generator), (state.fake, plain.fake)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours.params, theirs.params)
    assert state.fake.ema is None


def test_the_two_draw_different_noise():
    _, _, state, _ = make()
    assert jax.random.key_data(state.generator.key).tolist() != jax.random.key_data(state.fake.key).tolist()


def test_what_is_not_finite_is_skipped_for_each_of_them():
    setup, frozen, state, batch = make()
    broken = dataclasses.replace(frozen, target=jax.tree.map(lambda x: x * jnp.nan, frozen.target))
    new, metrics = step_of(setup)(state, broken, batch)
    jax.tree.map(np.testing.assert_array_equal, new.generator.params, state.generator.params)
    assert (int(new.generator.skipped), int(new.fake.skipped)) == (1, 0)
    assert int(metrics["skipped_in_a_row"]) == int(metrics["generator_skipped"]) == 1


def test_degradation_trains_on_what_the_untrained_generator_makes():
    """That is the frozen teacher, however far the score that is trained has gone."""
    method, batch = disback.degradation(SIDE), make_batch(B)
    setup = method.configure(TEXT_TO_IMAGE, DisbackFlags())
    teacher = standins.unet_params(1)
    frozen = Frozen({"unet": teacher}, schedule_of("v_prediction"))
    state = method.init(setup, {"unet": teacher}.__getitem__, OPTIMIZERS[1], jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, state.params, {"unet": teacher})
    state = dataclasses.replace(state, params={"unet": standins.unet_params(4)})
    new, _ = method.step(setup, OPTIMIZERS[1])(state, frozen, batch)
    key = jax.random.fold_in(optim.step_key(state), 0)
    gradient = jax.grad(lambda p: fake_loss(p, {"unet": teacher}, frozen, batch, key, setup)[0])(state.params)
    wanted = jax.tree.map(lambda p, g: p - 0.2 * g, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.params, wanted)


def test_accumulation_takes_the_mean_of_the_passes():
    setup, frozen, state, _ = make()
    batch = make_batch(2 * B)
    new, metrics = step_of(setup, accumulation=2)(state, frozen, batch)
    key = optim.step_key(state.generator)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    losses = [
        generator_loss(state.generator.params, state.fake.params, frozen, part, jax.random.fold_in(key, i), setup)[0]
        for i, part in enumerate(parts)
    ]
    np.testing.assert_allclose(metrics["generator_loss"], np.mean(losses), rtol=1e-5)
    assert int(new.step) == 1


# ---- What is trained, where it starts, and what is left of it


def test_the_scores_start_as_the_teacher_and_as_the_end_of_the_path() -> None:
    """Without a path both are the teacher, which is then the target; with one, that is a node."""
    given = {"unet": standins.unet_params(1), "path_end": standins.unet_params(4)}
    for has_path in (False, True):
        method = disback.backtracking(SIDE, has_path)
        setup = method.configure(CONTROLNET, DisbackFlags(use_ema=True, ema_decay=0.9), remat=True)
        assert (setup.target, {*setup.frozen}) == (None if has_path else "unet", {"vae", "controlnet"})
        assert (setup.trained, setup.ema_decay, setup.needs_null_text) == (("unet",), 0.9, True)
        assert setup.networks.unet.remat
        assert setup.generator.latent_shape == (3, 3, 3)
        state = method.init(setup, given.__getitem__, OPTIMIZERS, jax.random.key(0))
        for tree, name in (
            (state.generator.params, "unet"),
            (state.generator.ema, "unet"),
            (state.fake.params, "path_end" if has_path else "unet"),
        ):
            jax.tree.map(np.testing.assert_array_equal, tree, {"unet": given[name]})


def test_the_first_stage_keeps_the_teacher_and_leaves_no_model() -> None:
    method = disback.degradation(SIDE)
    setup = method.configure(CONTROLNET, DisbackFlags(use_ema=True))
    assert {*setup.frozen} == {"unet", "vae", "controlnet"}
    assert (setup.target, setup.needs_null_text, setup.ema_decay) == (None, False, None)
    state = method.init(setup, {"unet": standins.unet_params(1)}.__getitem__, OPTIMIZERS[1], jax.random.key(0))
    export = method.export(state, setup, {}.__getitem__)
    assert (export.networks, export.beside, export.lora) == ({}, {}, {})
    assert (export.is_whole, export.has_schedule) == (False, False)


def test_the_generator_is_exported_and_its_average_where_one_is_kept() -> None:
    for options in ({}, {"use_ema": True}):
        setup, _, state, _ = make(**options)
        wanted = {"unet": standins.unet_params(7)}
        kept = dataclasses.replace(state.generator, **{"ema" if options else "params": wanted})
        state, method = dataclasses.replace(state, generator=kept), disback.backtracking(SIDE, has_path=True)
        assert method.result(state, setup, {}.__getitem__) == wanted
        export = method.export(state, setup, {}.__getitem__)
        assert export.networks == {"unet": (TEXT_TO_IMAGE.unet, wanted["unet"])}
        assert (export.lora, export.is_whole) == ({}, True)


def test_each_network_has_its_learning_rate_and_the_generator_fewer_updates() -> None:
    made = []

    def make_optimizer(num_updates: int, learning_rate: float | None = None) -> Any:
        made.append((num_updates, learning_rate))
        return optax.identity()

    flags = DisbackFlags(dfake_gen_update_ratio=5, generator_lr=1e-5, guidance_lr=2e-5)
    disback.backtracking(SIDE, True).optimizer(flags, make_optimizer, 11)
    disback.degradation(SIDE).optimizer(flags, make_optimizer, 11)
    assert made == [(3, 1e-5), (11, 2e-5), (11, 2e-5)]


@pytest.mark.parametrize("method", [disback.degradation(SIDE), disback.backtracking(SIDE, True)], ids=["1", "2"])
def test_models_that_cannot_be_distilled_are_named(method: Any) -> None:
    with pytest.raises(ValueError, match=r"it has been distilled already: give the model that it was distilled from\."):
        method.configure(DISTILLED, DisbackFlags())
    with pytest.raises(ValueError, match="the teacher is for the task 'inpaint', which DisBack is not implemented for"):
        method.configure(INPAINTING, DisbackFlags())
    method.configure(EDITING, DisbackFlags())


# ---- With real networks, small


def real(**flags: Any) -> tuple[DisbackSetup, Frozen, Any]:
    unet, params = standins.small_unet(standins.SMALL_SD)
    networks = Networks(unet, standins.StandInVAE(standins.StandInVAE.Config(0.18, 4)))
    setup = disback.configure(networks, DisbackFlags(real_guidance_scale=2.0, **flags), side=8)
    frozen = {"unet": params} if "unet" in setup.frozen else {}
    null = NullText(jnp.zeros((1, 5, 24)))
    return setup, Frozen(frozen, schedule_of("epsilon"), null_text=null, target=params), params


def real_state(setup: DisbackSetup, params: Any) -> DisbackState:
    return disback.init(setup, {"unet": params}.__getitem__, OPTIMIZERS, jax.random.key(0))


def prompts(size: int = 2) -> dict[str, Any]:
    return {"context": jax.random.normal(jax.random.key(1), (size, 5, 24))}


@pytest.mark.slow
def test_a_lora_starts_as_the_teacher_and_is_merged_into_it():
    setup, frozen, params = real(generator_lora=True, lora_rank=2)
    frozen = dataclasses.replace(frozen, target=jax.tree.map(jnp.zeros_like, params))  # the target is another
    state = real_state(setup, params)
    inputs = Inputs(None, Conditions(Condition(prompts()["context"])))
    make = jax.jit(lambda params: setup.generator(params, frozen, inputs, jax.random.key(5)))
    teachers = make({"unet": params})
    np.testing.assert_allclose(make(state.generator.params), teachers, rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(0)
    noised = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape) if x.ndim else 0, jnp.float32),
        state.generator.params,
    )
    # What is shown and exported is one UNet, with the LoRA as a file beside it.
    state = dataclasses.replace(state, generator=dataclasses.replace(state.generator, params=noised))
    load = {"unet": params}.__getitem__
    export = disback.export(state, setup, load)
    unet, exported = export.networks["unet"]
    assert unet == setup.student.unet
    assert export.lora == {"unet": noised["unet_lora"]}
    assert export.is_whole
    jax.tree.map(np.testing.assert_array_equal, disback.result(state, setup, load), {"unet": exported})
    merged = make({"unet": exported})
    assert np.abs(merged - teachers).max() > 0.01
    np.testing.assert_allclose(make(noised), merged, rtol=1e-3, atol=1e-3 * np.abs(merged).max())


@pytest.mark.slow
def test_the_gan_head_tells_real_from_generated_and_leads_the_generator():
    """The losses of DMD2 from the logits of the head, on φ's lowest features of clean latents, at t = 0."""
    weights = {"gen_cls_loss_weight": 0.5, "guidance_cls_loss_weight": 0.25}
    setup, frozen, params = real(cls_on_clean_image=True, gen_cls_loss=True, gan_alone=True, **weights)
    fake = real_state(setup, params).fake.params
    batch, key = {**prompts(), "moments": jax.random.normal(jax.random.key(2), (2, 8, 8, 8))}, jax.random.key(7)
    networks = setup.networks

    def encode(unet: UNet2DCondition, z: jax.Array, context: jax.Array) -> jax.Array:
        temb = unet.embed_time(jnp.zeros(len(z), jnp.int32))
        return unet.encode(unet.conv_in(z), temb, context)[0]

    def logits(x: Any, inputs: Any) -> Any:
        low = networks.unet.apply({"params": params}, x, inputs.conditions.full.context, method=encode)
        return setup.head.apply({"params": fake["head"]}, low)

    @jax.jit
    def wanted(inputs_key: Any, x_key: Any) -> Any:
        inputs = prepare(networks, frozen.params, batch, inputs_key)
        return logits(inputs.z0, inputs), logits(setup.generator({"unet": params}, frozen, inputs, x_key), inputs)

    (value, _), gradient = jax.jit(
        jax.value_and_grad(lambda p: generator_loss(p, fake, frozen, batch, key, setup), has_aux=True)
    )({"unet": params})
    _, made = wanted(*jax.random.split(key, 4)[:2])
    np.testing.assert_allclose(value, 0.5 * np.mean(np.log1p(np.exp(-made))), rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["unet"]["conv_out"]))

    of_fake = jax.jit(lambda p: fake_loss(p, {"unet": params}, frozen, batch, key, setup))
    (value, metrics), (without, _) = of_fake(fake), of_fake({"unet": params})
    real_logits, made = wanted(*jax.random.split(key, 5)[:2])
    classification = np.mean(np.log1p(np.exp(-real_logits)) + np.log1p(np.exp(made)))
    np.testing.assert_allclose(metrics["classification"], classification, rtol=1e-5)
    np.testing.assert_allclose(value, without + 0.25 * classification, rtol=1e-5)


def test_the_factor_of_the_generators_lora_is_alpha_by_rank():
    """Merged, and so beside the layers too: see above."""
    setup, _, params = real(generator_lora=True, lora_rank=2, lora_alpha=6.0)
    state = real_state(setup, params)
    lora = jax.tree.map(lambda x: x + 1.0 if x.ndim else x, state.generator.params)
    path = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1", "to_q")
    trees = lora["unet_lora"], params, generator_unet(lora, params)
    layer, teachers, merged = (functools.reduce(lambda tree, name: tree[name], path, tree) for tree in trees)
    product = np.float64(layer["down"]) @ np.float64(layer["up"])
    np.testing.assert_allclose(merged["kernel"], teachers["kernel"] + 6 / 2 * product, rtol=1e-5, atol=1e-5)


def test_the_step_is_lowered_from_shapes():
    """Nothing of the values is needed: so its memory can be told for any machine."""
    setup, frozen, _ = real(dfake_gen_update_ratio=5)
    flags = optim.OptimizerFlags(lr_warmup_steps=0)
    optimizers = optim.make_optimizer(flags, 10), optim.make_optimizer(flags, 50)
    unet = setup.networks.unet.abstract_params()
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, unet: disback.init(setup, lambda _: unet, optimizers, key), key, unet)
    frozen = dataclasses.replace(jax.eval_shape(lambda: frozen), target=unet)
    step = disback.backtracking(side=8, has_path=False).step(setup, optimizers)
    lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, jax.eval_shape(prompts))
    new, metrics = lowered.out_info
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert {"loss", "generator_loss", "generator_learning_rate", "skipped_in_a_row"} <= metrics.keys()
