"""LCM against its equations in NumPy, in float64, and the traps of its reference code."""

import dataclasses
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
import torch
from consistency import B, condition_of, make_problem, numpy_distance, numpy_step, real_networks
from diffusers import UNet2DConditionModel
from flax import traverse_util
from numerics import Problem, all_combinations, assert_equals, boundary_scalings
from standins import (
    CONTROLNET,
    DISTILLED,
    EDITING,
    INPAINTING,
    SCHEDULER,
    TEXT_TO_IMAGE,
    float64,
)

from codi_jax.diffusion.guidance import Guidance
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import lcm
from codi_jax.methods.baking import bake_guidance
from codi_jax.methods.lcm import LcmEditFlags, LcmFlags, LcmTextFlags
from codi_jax.models.lora import lora_layers
from codi_jax.models.unet import UNet2DCondition
from codi_jax.pipeline.conditions import Conditions, Frozen, NullText, drop_conditions, prepare
from codi_jax.pipeline.prediction import predict

CHOICES: dict[str, list[Any]] = {
    "task": ["edit", "edit, two guidances", "text", "controlnet"],
    "prediction_type": ["epsilon", "v_prediction"],
    "loss_type": ["l2", "huber"],
    "dropout": [0.0, 0.3],
}


def possible_combinations() -> list[dict[str, Any]]:
    return [c for c in all_combinations(CHOICES) if not c["dropout"] or c["task"].startswith("edit")]


def numpy_loss(problem: Problem) -> Any:
    """The method's equations as a function of θ."""
    step = numpy_step(problem)

    def f(theta: Any, z: np.ndarray, t: np.ndarray) -> np.ndarray:
        c_skip, c_out = boundary_scalings(t, 0.01)
        return c_skip * z + c_out * step.student(theta, z, t)[0]

    target = f(float64(problem.state.ema), step.z_s, step.s)
    return lambda theta: numpy_distance(problem, f(theta, step.z_t, step.t), target)


@pytest.mark.parametrize("combination", possible_combinations(), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_loss_and_gradient_equal_the_equations(combination: dict[str, Any]) -> None:
    problem = make_problem(**combination)
    assert_equals(problem, numpy_loss(problem))


def test_without_an_average_the_target_is_the_student_as_a_constant() -> None:
    problem = make_problem("text", "epsilon", "l2")
    problem.state = dataclasses.replace(problem.state, ema=problem.state.params)
    wanted = numpy_loss(problem)
    problem.state = dataclasses.replace(problem.state, ema=None)
    assert_equals(problem, wanted)


# ---- With the real networks, small


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_the_student_starts_as_the_teacher(is_sdxl: bool) -> None:
    """The reference leaves the projection of the guidance weights random."""
    networks, params = real_networks(is_sdxl=is_sdxl)
    setup = lcm.configure(networks, LcmFlags())
    state = lcm.init(setup, {"unet": params}.__getitem__, optax.identity(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    z, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999])
    conditions = Conditions(condition_of(is_sdxl))
    teacher = predict(networks, {"unet": params}, z, t, conditions)
    student = predict(setup.student, state.params, z, t, conditions, Guidance.embedded(jnp.array([2.0, 9.0])))
    assert np.abs(np.asarray(teacher)).max() > 0.01
    np.testing.assert_array_equal(student, teacher)


def test_the_guided_step_is_that_of_diffusers() -> None:
    """Their DDIM scheduler steps from the guided prediction to the time before, on the same grid of 50."""
    problem = make_problem("text", "epsilon", "l2", 0.0)
    schedule = lcm.sampling(NoiseSchedule.from_config(SCHEDULER), LcmFlags())
    options = {key: value for key, value in SCHEDULER.items() if key[0] != "_"}
    scheduler = diffusers.DDIMScheduler(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    networks, params = problem.setup.networks, problem.frozen.params
    inputs = prepare(networks, params, problem.batch, jax.random.key(0), problem.frozen.null_text)
    z, w, c = inputs.z0, jnp.array([3.0, 7.5, 11.0]), inputs.conditions
    for t in (999, 519, 39):
        times = jnp.full((B,), t)
        prediction = predict(networks, params, z, times, c, Guidance.classifier_free(w + 1))
        ours = schedule.ddim_step(*schedule.to_x0_eps(prediction, z, times), times - 20)
        halves = [predict(networks, params, z, times, Conditions(one)) for one in (c.of("null"), c.full)]
        uncond, cond = (torch.from_numpy(np.asarray(half).copy()) for half in halves)
        # Theirs, with w = scale - 1: noise_pred = cond + w (cond - uncond).
        noise_pred = cond + torch.from_numpy(np.array(w))[:, None, None, None] * (cond - uncond)
        theirs = scheduler.step(noise_pred, t, torch.from_numpy(np.asarray(z).copy())).prev_sample
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_lora_student_is_the_teacher_at_first_and_the_teacher_stays() -> None:
    networks, params = real_networks(edits=False)
    setup = lcm.TEXT.configure(networks, LcmTextFlags(num_ddim_timesteps=10, use_lora=True, lora_rank=2))
    optimizer, load = optax.sgd(1.0), {"unet": params}.__getitem__
    state = lcm.init(setup, load, optimizer, jax.random.key(0))
    assert state.ema is None
    rng = np.random.default_rng(0)
    batch = {
        "moments": jnp.asarray(rng.standard_normal((2, 8, 8, 8)), jnp.float32),
        "context": condition_of(False).context,
    }
    null = NullText(jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32))
    schedule = lcm.sampling(NoiseSchedule.from_config(SCHEDULER), setup.flags)
    frozen = Frozen({"unet": params}, schedule, null_text=null)
    after, _ = jax.jit(lcm.TEXT.step(setup, optimizer))(state, frozen, batch)
    z, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999])
    conditions = Conditions(dataclasses.replace(condition_of(False), image=None))
    teacher, first, then, shown = (
        predict(networks, {**frozen.params, **p}, z, t, conditions)
        for p in ({}, state.params, after.params, lcm.result(after, setup, load))
    )
    np.testing.assert_array_equal(first, teacher)
    assert np.abs(np.asarray(then - teacher)).max() > 1e-4
    # What is shown is the teacher with the LoRA merged into it; what is exported, the LoRA and no network.
    np.testing.assert_allclose(shown, then, rtol=1e-3, atol=1e-4)
    export = lcm.export(after, setup, load)
    assert (export.networks, export.beside, export.is_whole) == ({}, {}, False)
    assert export.lora == {"unet": after.params["unet_lora"]}


@pytest.mark.slow
def test_the_gradient_of_a_lora_is_alpha_by_rank_and_none_goes_through_its_target() -> None:
    """θ⁻ is θ, but a constant: the target is computed apart here, and given as numbers."""
    networks, params = real_networks(edits=False)
    of_lora = {"use_lora": True, "lora_rank": 2, "lora_alpha": 6.0}
    flags = LcmTextFlags(num_ddim_timesteps=10, timestep_scaling_factor=0.01, **of_lora)
    setup = lcm.TEXT.configure(networks, flags)
    state = lcm.init(setup, {"unet": params}.__getitem__, optax.identity(), jax.random.key(0))
    rng, key = np.random.default_rng(0), jax.random.key(3)
    theta = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)) if x.ndim else x, state.params)
    batch = {"moments": rng.standard_normal((2, 8, 8, 8)), "context": rng.standard_normal((2, 5, 24))}
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    schedule = lcm.sampling(NoiseSchedule.from_config(SCHEDULER), flags)
    null = NullText(jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32))
    frozen = Frozen({"unet": params}, schedule, null_text=null)

    keys = jax.random.split(key, 6)
    inputs = prepare(networks, frozen.params, batch, keys[0], null)
    conditions = inputs.conditions
    t = 100 * jax.random.randint(keys[2], (2,), 0, 10) + 99
    s = jnp.maximum(t - 100, 0)
    z_t = schedule.add_noise(inputs.z0, jax.random.normal(keys[3], inputs.z0.shape), t)
    w = jax.random.uniform(keys[4], (2,), minval=flags.w_min, maxval=flags.w_max)

    def merged(theta: Any) -> Any:
        """The teacher with W + α/r B A in place of W."""
        flat = traverse_util.flatten_dict(params)
        for path, layer in lora_layers(theta["unet_lora"]).items():
            up = layer["up"].reshape(layer["up"].shape[-2:])
            flat[*path, "kernel"] = flat[*path, "kernel"] + 6 / 2 * layer["down"] @ up
        return {"unet": traverse_util.unflatten_dict(flat)}

    def f(theta: Any, z: Any, t: Any) -> Any:
        c_skip, c_out = (jnp.asarray(c, jnp.float32) for c in boundary_scalings(np.asarray(t), 0.01))
        return c_skip * z + c_out * schedule.to_x0_eps(predict(networks, merged(theta), z, t, conditions), z, t)[0]

    of_teacher = predict(networks, frozen.params, z_t, t, conditions, Guidance.classifier_free(w + 1))
    z_s = schedule.ddim_step(*schedule.to_x0_eps(of_teacher, z_t, t), s)
    target = np.asarray(jax.jit(lambda theta: f(theta, z_s, s))(theta))

    def wanted(theta: Any, target: Any) -> Any:
        return jnp.mean((f(theta, z_t, t) - target) ** 2)

    def ours(theta: Any) -> Any:
        return lcm.loss(theta, state, frozen, batch, key, setup)[0]

    value, gradient = jax.jit(jax.value_and_grad(ours))(theta)
    theirs, slope = jax.jit(jax.value_and_grad(wanted))(theta, target)
    np.testing.assert_allclose(value, theirs, rtol=1e-4)
    largest = max(np.abs(like).max() for like in jax.tree.leaves(slope) if like.ndim)
    for layer, like in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        if layer.ndim:
            np.testing.assert_allclose(layer, like, rtol=1e-2, atol=1e-4 * largest)
        else:
            assert layer == 0  # α is not trained


def test_conditions_are_dropped_together_and_in_these_shares() -> None:
    problem = make_problem("edit", "epsilon", "l2", 0.1)
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 1000), problem.batch)
    inputs = prepare(problem.setup.networks, {}, batch, jax.random.key(0), problem.frozen.null_text)
    given, null = inputs.conditions, inputs.conditions.null
    assert null is not None
    dropped = drop_conditions(inputs, jax.random.key(3), 0.1).conditions

    def same(a, b):
        return np.all(np.asarray(a == b).reshape(len(a), -1), axis=1)

    text = same(dropped.full.context, null.context)
    pooled = same(dropped.full.added_cond["text_embeds"], null.added_cond["text_embeds"])
    image = same(dropped.full.image, null.image)
    np.testing.assert_array_equal(text, pooled)
    np.testing.assert_array_equal(dropped.full.added_cond["time_ids"], batch["time_ids"])
    for share in (text & ~image, text & image, ~text & image):
        assert abs(share.mean() - 0.1) < 0.02
    kept = ~text & ~image
    np.testing.assert_array_equal(dropped.full.context[kept], given.full.context[kept])
    np.testing.assert_array_equal(dropped.full.image[~image], given.full.image[~image])
    assert dropped.image_only is not None
    np.testing.assert_array_equal(dropped.image_only.image, dropped.full.image)
    np.testing.assert_array_equal(dropped.image_only.context, null.context)


def test_the_source_image_is_its_mode_and_not_scaled() -> None:
    problem = make_problem("edit", "epsilon", "l2", 0.0)
    first, second = (
        prepare(problem.setup.networks, {}, problem.batch, jax.random.key(i)).conditions.full.image for i in (0, 1)
    )
    np.testing.assert_array_equal(first, second)
    mean, _ = np.split(np.asarray(problem.batch["conditioning_moments"], "f4"), 2, axis=-1)
    np.testing.assert_array_equal(first, mean)


def test_diffusers_loads_a_student_of_two_guidances(tmp_path) -> None:
    networks, _ = real_networks()
    student = lcm.configure(networks, LcmFlags(w_image_min=0.0, w_image_max=1.0)).student.unet
    assert isinstance(student, UNet2DCondition)
    values = student.config.to_dict()
    assert values["embeds_image_guidance"] is True
    assert "embeds_image_guidance" not in networks.unet.config.to_dict()
    theirs = UNet2DConditionModel.from_config({k: v for k, v in values.items() if v is not None})
    assert theirs.time_embedding.cond_proj.weight.shape == (16, 512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"w_min": 5.0, "w_max": 4.0}, "--w_min 5.0 is not possible: it must be at most --w_max 4.0"),
        ({"w_image_min": 1.0}, "--w_image_min and --w_image_max go together"),
        ({"w_image_min": 2.0, "w_image_max": 1.0}, "--w_image_min 2.0 is not possible"),
        ({"huber_c": 0.0}, "--huber_c 0.0 is not possible"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0 is not possible"),
        ({"unet_time_cond_proj_dim": 7}, "--unet_time_cond_proj_dim 7 is not possible"),
    ],
)
def test_impossible_flags_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LcmFlags(**flags).check()


def test_models_that_cannot_be_distilled_are_named() -> None:
    edit_student = lcm.EDIT.configure(EDITING, LcmEditFlags()).student
    for method, networks in ((lcm.TEXT, DISTILLED), (lcm.EDIT, edit_student)):
        with pytest.raises(ValueError, match="so it has been distilled already: give the model that it was distilled"):
            method.configure(networks, method.flags())
    with pytest.raises(ValueError, match="--w_image_min is for InstructPix2Pix models, but the teacher takes no image"):
        lcm.TEXT.configure(TEXT_TO_IMAGE, LcmTextFlags(w_image_min=0.0, w_image_max=1.0))
    with pytest.raises(ValueError, match="--w_image_min is of no use to a LoRA, which takes no guidance weights"):
        lcm.configure(EDITING, LcmTextFlags(w_image_min=0.0, w_image_max=1.0, use_lora=True))


def test_each_script_takes_the_models_of_its_task() -> None:
    with pytest.raises(ValueError, match="InstructPix2Pix model: distill it with train_lcm_distil_instruct_pix2pix"):
        lcm.TEXT.configure(EDITING, LcmTextFlags())
    with pytest.raises(ValueError, match="the teacher is for the task 'inpaint', which LCM is not implemented for"):
        lcm.TEXT.configure(INPAINTING, LcmTextFlags())
    for networks, channels in ((TEXT_TO_IMAGE, 3), (INPAINTING, 7)):
        message = (
            f"--pretrained_teacher_model: its UNet has {channels} input channels, but an .* model's has 6: train one"
        )
        with pytest.raises(ValueError, match=message):
            lcm.EDIT.configure(networks, LcmEditFlags())
    for networks in (TEXT_TO_IMAGE, CONTROLNET):
        setup = lcm.TEXT.configure(networks, LcmTextFlags(), remat=True)
        assert setup.student.unet.remat
        assert not setup.networks.unet.remat
        assert setup.trained == ("unet",)
        assert {*setup.frozen} == networks.by_name().keys()
        assert setup.needs_null_text


# ---- What is left of a run


def test_the_student_is_exported_beside_its_average() -> None:
    """θ as the UNet, θ⁻ as unet_target; what is shown is θ⁻."""
    problem = make_problem("text", "epsilon", "l2", 0.0)
    state, setup = problem.state, lcm.TEXT.configure(TEXT_TO_IMAGE, problem.setup.flags, remat=True)
    assert lcm.TEXT.result(state, setup, {}.__getitem__) == {"unet": state.ema["unet"]}
    export = lcm.TEXT.export(state, setup, {}.__getitem__)
    assert (export.networks.keys(), export.beside.keys()) == ({"unet"}, {"unet_target"})
    for (unet, params), wanted in ((export.networks["unet"], state.params), (export.beside["unet_target"], state.ema)):
        assert unet == problem.setup.student.unet  # which does not recompute
        assert params is wanted["unet"]
    assert (export.lora, export.is_whole) == ({}, True)


@pytest.mark.parametrize("scales", [(4.5, None), (4.5, 1.7)], ids=["one guidance", "two guidances"])
def test_a_guidance_scale_is_baked_into_both_exports(scales: tuple[float, float | None]) -> None:
    networks, params = real_networks()
    weights = {"w_image_min": 0.0, "w_image_max": 2.0} if scales[1] is not None else {}
    scale, image_scale = scales
    of_export = {"bake_guidance_scale": scale, "bake_image_guidance_scale": image_scale}
    flags = LcmEditFlags(unet_time_cond_proj_dim=16, **weights, **of_export)
    flags.check()
    setup = lcm.EDIT.configure(networks, flags)
    state = lcm.EDIT.init(setup, {"unet": params}.__getitem__, optax.identity(), jax.random.key(0))
    trees = [{"unet": standins.random_params(setup.student.unet, seed)} for seed in (3, 4)]
    export = lcm.EDIT.export(dataclasses.replace(state, params=trees[0], ema=trees[1]), setup, {}.__getitem__)
    for (unet, baked), tree in zip((export.networks["unet"], export.beside["unet_target"]), trees, strict=True):
        wanted_unet, wanted = bake_guidance(setup.student.unet, tree["unet"], *scales)
        assert unet == wanted_unet
        assert unet.config == networks.unet.config
        jax.tree.map(np.testing.assert_array_equal, baked, wanted)


@pytest.mark.parametrize(
    ("flags", "possible"),
    [
        ({"bake_guidance_scale": 4.0}, True),
        ({"bake_guidance_scale": 4.0, "bake_image_guidance_scale": 1.5}, False),
        ({"bake_guidance_scale": 4.0, "w_image_min": 0.0, "w_image_max": 1.0}, False),
        ({"bake_guidance_scale": 4.0, "bake_image_guidance_scale": 1.5, "w_image_min": 0.0, "w_image_max": 1.0}, True),
    ],
)
def test_an_image_scale_is_baked_in_if_the_student_takes_one(flags: dict[str, Any], possible: bool) -> None:
    if possible:
        LcmEditFlags(**flags).check()
        return
    with pytest.raises(ValueError, match="given if, and only if, --w_image_min and --bake_guidance_scale are"):
        LcmEditFlags(**flags).check()
