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
from standins import MODULES, make_batch, null_text
from test_dmd import SHAPE, B, schedule_of

from codi_jax.methods import disback
from codi_jax.methods.disback import DisbackFlags, DisbackState, target_index
from codi_jax.methods.dmd import Config, fake_loss, generator_loss
from codi_jax.methods.generator import Generator, generator_unet
from codi_jax.pipeline.conditions import Condition, Inputs, Modules, prepare
from codi_jax.pipeline.prediction import encode
from codi_jax.training import optim

OPTIMIZERS = optax.sgd(0.1), optax.sgd(0.2)


def make(**flags: Any) -> tuple[Config, dict[str, Any], DisbackState, Any]:
    """A step's arguments, with stand-ins for the networks."""
    of_method = DisbackFlags(real_guidance_scale=2.0, **flags)
    config = Config(Generator(dataclasses.replace(MODULES, controlnet=None), of_method, SHAPE), of_method)
    frozen = {"unet": standins.unet_params(1), **null_text(), "schedule": schedule_of("v_prediction")}
    teacher, node = standins.unet_params(1), standins.unet_params(4)
    state = disback.init_state(config, teacher, node, OPTIMIZERS, jax.random.key(0))
    return config, frozen, state, make_batch(B)


def step_of(config: Config, **options: Any) -> Any:
    return jax.jit(functools.partial(disback.train_step, config=config, optimizers=OPTIMIZERS, **options))


def test_the_target_advances_and_arrives():
    """Once every interval of the generator's updates; the reference advances once only and never returns."""
    flags = DisbackFlags(interval=2, dfake_gen_update_ratio=3)
    indices = [target_index(step, flags, 4) for step in range(40)]
    assert indices == [1] * 4 + [2] * 6 + [3] * 6 + [4] * 24
    assert target_index(0, flags, 1) == 1  # a path of one node: the teacher at once
    assert [target_index(step, DisbackFlags(interval=1), 3) for step in range(5)] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_generator_is_updated_every_kth_step_and_the_fake_score_in_all(ratio: int):
    config, frozen, state, batch = make(dfake_gen_update_ratio=ratio)
    step = step_of(config)
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
    config, frozen, state, batch = make()
    new, metrics = step_of(config)(state, frozen, batch)
    key = jax.random.fold_in(optim.step_key(state.generator), 0)
    value, gradient = jax.value_and_grad(
        lambda params: generator_loss(params, state.fake.params, frozen, batch, key, config)[0]
    )(state.generator.params)
    generator = jax.tree.map(lambda p, g: p - 0.1 * g, state.generator.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.generator.params, generator)
    np.testing.assert_allclose(metrics["generator_loss"], value, rtol=1e-5)
    key = jax.random.fold_in(optim.step_key(state.fake), 0)
    gradient = jax.grad(lambda params: fake_loss(params, generator, frozen, batch, key, config)[0])(state.fake.params)
    fake = jax.tree.map(lambda p, g: p - 0.2 * g, state.fake.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new.fake.params, fake)


def test_the_average_is_over_updates_of_the_generator_and_changes_no_training():
    config, frozen, state, batch = make(dfake_gen_update_ratio=2, use_ema=True, ema_decay=0.75)
    plain_config, _, plain, _ = make(dfake_gen_update_ratio=2)
    assert plain.generator.ema is None
    assert plain.generator.result is plain.generator.params
    step, plain_step = step_of(config), step_of(plain_config)
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
    config, frozen, state, batch = make()
    broken = {**frozen, "unet": jax.tree.map(lambda x: x * jnp.nan, frozen["unet"])}
    new, metrics = step_of(config)(state, broken, batch)
    jax.tree.map(np.testing.assert_array_equal, new.generator.params, state.generator.params)
    assert (int(new.generator.skipped), int(new.fake.skipped)) == (1, 0)
    assert int(metrics["skipped_in_a_row"]) == int(metrics["generator_skipped"]) == 1


def test_degradation_trains_on_what_the_untrained_generator_makes():
    """That is the frozen teacher, however far the score that is trained has gone."""
    config, frozen, _, batch = make()
    state = optim.init_state({"unet": standins.unet_params(4)}, OPTIMIZERS[1], jax.random.key(3))
    new, _ = disback.degradation_step(state, frozen, batch, config=config, optimizer=OPTIMIZERS[1])
    key = jax.random.fold_in(optim.step_key(state), 0)
    gradient = jax.grad(lambda p: fake_loss(p, {"unet": frozen["unet"]}, frozen, batch, key, config)[0])(state.params)
    wanted = jax.tree.map(lambda p, g: p - 0.2 * g, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.params, wanted)


def test_accumulation_takes_the_mean_of_the_passes():
    config, frozen, state, _ = make()
    batch = make_batch(2 * B)
    new, metrics = step_of(config, accumulation=2)(state, frozen, batch)
    key = optim.step_key(state.generator)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    losses = [
        generator_loss(state.generator.params, state.fake.params, frozen, part, jax.random.fold_in(key, i), config)[0]
        for i, part in enumerate(parts)
    ]
    np.testing.assert_allclose(metrics["generator_loss"], np.mean(losses), rtol=1e-5)
    assert int(new.step) == 1


# ---- With real networks, small


def real(**flags: Any) -> tuple[Config, dict[str, Any], Any]:
    unet, params = standins.small_unet(standins.SMALL_SD)
    of_method = DisbackFlags(real_guidance_scale=2.0, **flags)
    modules = Modules(unet, standins.StandInVAE(standins.StandInVAE.Config(0.18, 4)))
    null = {"null_context": jnp.zeros((1, 5, 24))}
    config = Config(Generator(modules, of_method, (8, 8, 4)), of_method)
    return config, {"unet": params, **null, "schedule": schedule_of("epsilon")}, params


def prompts(size: int = 2) -> dict[str, Any]:
    return {"context": jax.random.normal(jax.random.key(1), (size, 5, 24))}


def test_a_lora_starts_as_the_teacher_and_is_merged_into_it():
    config, frozen, params = real(generator_lora=True, lora_rank=2)
    frozen |= {"teacher": params, "unet": jax.tree.map(jnp.zeros_like, params)}  # the target is another
    state = disback.init_state(config, params, params, OPTIMIZERS, jax.random.key(0))
    inputs = Inputs(None, Condition(prompts()["context"]))
    make = jax.jit(lambda params: config.generator(params, frozen, inputs, jax.random.key(5)))
    teachers = make({"unet": params})
    np.testing.assert_allclose(make(state.generator.params), teachers, rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(0)
    noised = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape) if x.ndim else 0, jnp.float32),
        state.generator.params,
    )
    merged = make({"unet": generator_unet(noised, params)})
    assert np.abs(merged - teachers).max() > 0.01
    np.testing.assert_allclose(make(noised), merged, rtol=1e-3, atol=1e-3 * np.abs(merged).max())


def test_the_gan_head_tells_real_from_generated_and_leads_the_generator():
    """The losses of DMD2 from the logits of the head, on φ's lowest features of clean latents, at t = 0."""
    weights = {"gen_cls_loss_weight": 0.5, "guidance_cls_loss_weight": 0.25}
    config, frozen, params = real(cls_on_clean_image=True, gen_cls_loss=True, gan_alone=True, **weights)
    fake = disback.init_state(config, params, params, OPTIMIZERS, jax.random.key(0)).fake.params
    batch, key = {**prompts(), "moments": jax.random.normal(jax.random.key(2), (2, 8, 8, 8))}, jax.random.key(7)
    modules = config.generator.modules

    def logits(x: Any, inputs: Any) -> Any:
        low = encode(modules, {"unet": params}, x, jnp.zeros(2, jnp.int32), inputs.cond)[0]
        return config.head.apply({"params": fake["head"]}, low)

    @jax.jit
    def wanted(inputs_key: Any, x_key: Any) -> Any:
        inputs = prepare(modules, frozen, batch, inputs_key)
        return logits(inputs.z0, inputs), logits(config.generator({"unet": params}, frozen, inputs, x_key), inputs)

    (value, _), gradient = jax.jit(
        jax.value_and_grad(lambda p: generator_loss(p, fake, frozen, batch, key, config), has_aux=True)
    )({"unet": params})
    _, made = wanted(*jax.random.split(key, 4)[:2])
    np.testing.assert_allclose(value, 0.5 * np.mean(np.log1p(np.exp(-made))), rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["unet"]["conv_out"]))

    of_fake = jax.jit(lambda p: fake_loss(p, {"unet": params}, frozen, batch, key, config))
    (value, metrics), (without, _) = of_fake(fake), of_fake({"unet": params})
    real_logits, made = wanted(*jax.random.split(key, 5)[:2])
    classification = np.mean(np.log1p(np.exp(-real_logits)) + np.log1p(np.exp(made)))
    np.testing.assert_allclose(metrics["classification"], classification, rtol=1e-5)
    np.testing.assert_allclose(value, without + 0.25 * classification, rtol=1e-5)


def test_the_factor_of_the_generators_lora_is_alpha_by_rank():
    """Merged, and so beside the layers too: see above."""
    config, _, params = real(generator_lora=True, lora_rank=2, lora_alpha=6.0)
    state = disback.init_state(config, params, params, OPTIMIZERS, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 1.0 if x.ndim else x, state.generator.params)
    path = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1", "to_q")
    trees = lora["unet_lora"], params, generator_unet(lora, params)
    layer, teachers, merged = (functools.reduce(lambda tree, name: tree[name], path, tree) for tree in trees)
    product = np.float64(layer["down"]) @ np.float64(layer["up"])
    np.testing.assert_allclose(merged["kernel"], teachers["kernel"] + 6 / 2 * product, rtol=1e-5, atol=1e-5)


def test_the_step_is_lowered_from_shapes():
    """Nothing of the values is needed: so its memory can be told for any machine."""
    config, frozen, _ = real(dfake_gen_update_ratio=5)
    flags = optim.OptimizerFlags(lr_warmup_steps=0)
    optimizers = optim.make_optimizer(flags, 10), optim.make_optimizer(flags, 50)
    unet = config.generator.modules.unet.abstract_params()
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, unet: disback.init_state(config, unet, unet, optimizers, key), key, unet)
    others = jax.eval_shape(lambda: {name: value for name, value in frozen.items() if name != "unet"})
    step = functools.partial(disback.train_step, config=config, optimizers=optimizers)
    lowered = jax.jit(step, donate_argnums=0).lower(state, {**others, "unet": unet}, jax.eval_shape(prompts))
    new, metrics = lowered.out_info
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert {"loss", "generator_loss", "generator_learning_rate", "skipped_in_a_row"} <= metrics.keys()
