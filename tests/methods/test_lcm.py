"""LCM against its equations in NumPy, in float64, and the traps of its reference code."""

import dataclasses
import itertools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
import torch
from diffusers import UNet2DConditionModel
from flax import traverse_util
from numerics import COLUMN, Problem, alpha_sigma, assert_equals, boundary_scalings, draw_latents, x_and_eps
from standins import (
    EDITING,
    MODULES,
    SCHEDULER,
    SMALL_SD,
    SMALL_XL,
    float64,
    make_batch,
    null_text,
    numpy_predict,
    small_unet,
)

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import lcm
from codi_jax.methods.baking import bake_guidance
from codi_jax.methods.lcm import LcmFlags
from codi_jax.models.lora import lora_layers
from codi_jax.models.unet import UNet2DCondition
from codi_jax.pipeline.conditions import Condition, Modules, drop_conditions, prepare
from codi_jax.pipeline.prediction import guided, predict
from codi_jax.training import optim

B, N, DIM = standins.CHANNELS, 8, 12
CHOICES: dict[str, list[Any]] = {
    "task": ["edit", "edit, two guidances", "text", "controlnet"],
    "prediction_type": ["epsilon", "v_prediction"],
    "loss_type": ["l2", "huber"],
    "dropout": [0.0, 0.3],
}


def all_combinations() -> list[dict[str, Any]]:
    combinations = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    return [c for c in combinations if not c["dropout"] or c["task"].startswith("edit")]


def guided_params(seed: int, width: int, *, edits: bool) -> dict[str, Any]:
    kernel = 0.3 * np.random.default_rng(100 + seed).standard_normal((width, 1))
    return {
        **standins.unet_params(seed, edits=edits),
        "time_embedding": {"cond_proj": {"kernel": jnp.asarray(kernel, jnp.float32)}},
    }


def make_problem(task: str, prediction_type: str, loss_type: str, dropout: float) -> Problem:
    edits, weighs_image = task.startswith("edit"), task.endswith("two guidances")
    # A timestep scaling so small that c_skip and c_out are far from 0 and 1, and a huber_c amid the differences.
    flags = LcmFlags(
        loss_type=loss_type, huber_c=0.5, num_ddim_timesteps=N, timestep_scaling_factor=0.01, w_min=1.0, w_max=4.0,
        unet_time_cond_proj_dim=DIM, **({"w_image_min": 0.2, "w_image_max": 2.0} if weighs_image else {}),
    )  # fmt: skip
    modules = EDITING if edits else dataclasses.replace(MODULES, controlnet=None)
    modules = MODULES if task == "controlnet" else modules
    config = lcm.configure(modules, flags, dropout=dropout)
    teacher = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type})
    frozen = {"unet": standins.unet_params(1, edits=edits), "schedule": lcm.student_schedule(teacher, flags)}
    if task == "controlnet":
        frozen["controlnet"] = standins.controlnet_params(6)
    width = config.student.config.time_cond_proj_dim
    params, ema = ({"unet": guided_params(seed, width, edits=edits)} for seed in (2, 4))
    state = dataclasses.replace(
        optim.init_state(params, optax.identity(), jax.random.key(0), ema=True),
        ema=ema,
    )
    return Problem(lcm, config, state, {**frozen, **null_text()}, make_batch(B), jax.random.key(8))


def numpy_embedding(w: np.ndarray, dim: int) -> np.ndarray:
    frequencies = np.exp(-np.log(10_000) * np.arange(dim // 2) / (dim // 2 - 1))
    # In float32 as in diffusers' get_guidance_scale_embedding: an angle of thousands has no more digits.
    angles = ((1000 * w.astype("f4"))[:, None] * frequencies.astype("f4")).astype("f8")
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def numpy_loss(problem: Problem) -> Any:
    """The method's equations as a function of θ."""
    config, schedule = problem.config, problem.frozen["schedule"]
    batch, frozen = problem.float64()
    alpha, sigma = alpha_sigma(schedule)
    edits = config.modules.edits
    control = batch["conditioning"] / 255 if config.modules.controlnet is not None else None

    # What is drawn.
    keys = jax.random.split(problem.key, 6)
    z0 = draw_latents(batch, keys[0])
    n = np.asarray(jax.random.randint(keys[2], (B,), 0, N))
    noise = float64(jax.random.normal(keys[3], z0.shape))
    w = float64(jax.random.uniform(keys[4], (B,), minval=1.0, maxval=4.0))
    w_image = float64(jax.random.uniform(keys[5], (B,), minval=0.2, maxval=2.0))
    k = 1000 // N
    t = (n + 1) * k - 1
    s = np.maximum(t - k, 0)
    z_t = alpha[t][COLUMN] * z0 + sigma[t][COLUMN] * noise

    # What there is to condition on: c_T, text with its pooled output; c_I, image latents (the mode, not scaled). And
    # what stands in their place.
    c_I = np.split(batch["conditioning_moments"], 2, axis=-1)[0] if edits else None
    no_I = np.zeros_like(c_I) if edits else None
    c_T = batch["context"], batch["pooled"]
    no_T = tuple(np.repeat(frozen[name], B, 0) for name in ("null_context", "null_pooled"))
    if config.dropout:
        # From here on a sample's c_T and c_I are what is left to it: teacher, student and target see nothing else.
        r = float64(jax.random.uniform(keys[1], (B,)))
        c_T = tuple(np.where((r < 0.6).reshape(-1, *(1,) * (c.ndim - 1)), no, c) for c, no in zip(c_T, no_T))
        c_I = np.where(((r >= 0.3) & (r < 0.9))[COLUMN], no_I, c_I)

    def e(networks, z, t, c_I, c_T, guidance=None):
        out = numpy_predict(networks, z, t, *c_T, batch["time_ids"], control, c_I, guidance)
        return x_and_eps(schedule.prediction_type, out, z, alpha[t][COLUMN], sigma[t][COLUMN])

    # The teacher's guided step, on x̂ and ε̂ apart.
    of_both, of_none = e(frozen, z_t, t, c_I, c_T), e(frozen, z_t, t, no_I, no_T)
    if config.flags.weighs_image:  # Brooks et al., 2023, equation 3
        s_I, s_T = (w_image + 1)[COLUMN], (w + 1)[COLUMN]
        of_image = e(frozen, z_t, t, c_I, no_T)
        guided = of_none + s_I * (of_image - of_none) + s_T * (of_both - of_image)
        embedding = np.concatenate([numpy_embedding(w, DIM), numpy_embedding(w_image, DIM)], 1)
    else:
        guided = of_both + w[COLUMN] * (of_both - of_none)
        embedding = numpy_embedding(w, DIM)
    z_s = alpha[s][COLUMN] * guided[0] + sigma[s][COLUMN] * guided[1]

    def f(theta, z, t):
        c_skip, c_out = boundary_scalings(t, 0.01)
        return c_skip * z + c_out * e({**frozen, **theta}, z, t, c_I, c_T, embedding)[0]

    target = f(float64(problem.state.ema), z_s, s)

    def loss(theta):
        difference = f(theta, z_t, t) - target
        if config.flags.loss_type == "huber":
            return np.mean(np.sqrt(difference**2 + 0.5**2) - 0.5)
        return np.mean(difference**2)

    return loss


@pytest.mark.parametrize("combination", all_combinations(), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_loss_and_gradient_equal_the_equations(combination: dict[str, Any]) -> None:
    problem = make_problem(**combination)
    assert_equals(problem, numpy_loss(problem))


# ---- With the real networks, small


def real_modules(*, is_xl: bool = False, edits: bool = True) -> tuple[Modules, dict[str, Any]]:
    config = {**(SMALL_XL if is_xl else SMALL_SD), "in_channels": 8 if edits else 4}
    unet, params = small_unet(config)
    vae = standins.StandInVAE(standins.StandInVAE.Config(0.18, 4))
    return Modules(unet, vae), params


def conditions(is_xl: bool, size: int = 2) -> Condition:
    rng = np.random.default_rng(5)
    width = 44 if is_xl else 24
    added = {"text_embeds": rng.standard_normal((size, 20)), "time_ids": rng.uniform(0, 64, (size, 6))}
    tree = (rng.standard_normal((size, 5, width)), added if is_xl else None, rng.standard_normal((size, 8, 8, 4)))
    context, added, image = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return Condition(context, added, image=image)


@pytest.mark.parametrize("is_xl", [False, True], ids=["sd", "sdxl"])
def test_the_student_starts_as_the_teacher(is_xl: bool) -> None:
    """The reference leaves the projection of the guidance weights random."""
    modules, params = real_modules(is_xl=is_xl)
    config = lcm.configure(modules, LcmFlags())
    state = lcm.init_state(config, params, optax.identity(), jax.random.key(0))
    z, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999])
    condition = conditions(is_xl)
    teacher = predict(modules, {"unet": params}, z, t, condition)
    embedded = dataclasses.replace(condition, guidance=jnp.ones((2, 256)))
    student = predict(dataclasses.replace(modules, unet=config.student), state.params, z, t, embedded)
    assert np.abs(np.asarray(teacher)).max() > 0.01
    np.testing.assert_array_equal(student, teacher)


@pytest.mark.parametrize("two", [False, True], ids=["one guidance", "two guidances"])
@pytest.mark.parametrize("is_xl", [False, True], ids=["sd", "sdxl"])
def test_a_baked_student_is_the_student(is_xl: bool, two: bool) -> None:
    modules, params = real_modules(is_xl=is_xl)
    weights = {"w_image_min": 0.0, "w_image_max": 2.0} if two else {}
    student = lcm.configure(modules, LcmFlags(unet_time_cond_proj_dim=16, **weights)).student
    params = standins.random_params(student, 3)
    scales = (4.5, 1.7) if two else (4.5, None)
    baked, baked_params = bake_guidance(student, params, *scales)
    assert baked.config == modules.unet.config
    z, t, condition = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999]), conditions(is_xl)
    embedding = np.concatenate([numpy_embedding(np.full(2, s - 1), 16) for s in scales if s is not None], 1)
    guided = dataclasses.replace(condition, guidance=jnp.asarray(embedding, jnp.float32))
    wanted = predict(dataclasses.replace(modules, unet=student), {"unet": params}, z, t, guided)
    unguided = dataclasses.replace(guided, guidance=jnp.zeros_like(embedding))
    without = predict(dataclasses.replace(modules, unet=student), {"unet": params}, z, t, unguided)
    ours = predict(dataclasses.replace(modules, unet=baked), {"unet": baked_params}, z, t, condition)
    largest = np.abs(np.asarray(wanted)).max()
    assert np.abs(np.asarray(wanted - without)).max() > 0.01 * largest, "the guidance changes nothing"
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * largest)


def test_the_guided_step_is_that_of_diffusers() -> None:
    """Their DDIM scheduler steps from the guided prediction to the time before, on the same grid of 50."""
    problem = make_problem("text", "epsilon", "l2", 0.0)
    schedule = lcm.student_schedule(NoiseSchedule.from_config(SCHEDULER), LcmFlags())
    options = {key: value for key, value in SCHEDULER.items() if key[0] != "_"}
    scheduler = diffusers.DDIMScheduler(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    inputs = prepare(problem.config.modules, problem.frozen, problem.batch, jax.random.key(0))
    z, w = inputs.z0, jnp.array([3.0, 7.5, 11.0])
    for t in (999, 519, 39):
        times = jnp.full((B,), t)
        prediction = guided(problem.config.modules, problem.frozen, z, times, inputs, w + 1)
        ours = schedule.ddim_step(*schedule.to_x0_eps(prediction, z, times), times - 20)
        halves = [predict(problem.config.modules, problem.frozen, z, times, c) for c in (inputs.null, inputs.cond)]
        uncond, cond = (torch.from_numpy(np.asarray(half).copy()) for half in halves)
        # Theirs, with w = scale - 1: noise_pred = cond + w (cond - uncond).
        noise_pred = cond + torch.from_numpy(np.array(w))[:, None, None, None] * (cond - uncond)
        theirs = scheduler.step(noise_pred, t, torch.from_numpy(np.asarray(z).copy())).prev_sample
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_a_lora_student_is_the_teacher_at_first_and_the_teacher_stays() -> None:
    modules, params = real_modules(edits=False)
    config = lcm.configure(modules, LcmFlags(num_ddim_timesteps=10), lora=True)
    optimizer = optax.sgd(1.0)
    state = lcm.init_state(config, params, optimizer, jax.random.key(0), rank=2)
    assert state.ema is None
    rng = np.random.default_rng(0)
    batch = {
        "moments": jnp.asarray(rng.standard_normal((2, 8, 8, 8)), jnp.float32),
        "context": conditions(False).context,
    }
    null = {"null_context": jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32)}
    schedule = lcm.student_schedule(NoiseSchedule.from_config(SCHEDULER), config.flags)
    frozen = {"unet": params, "schedule": schedule, **null}
    step = jax.jit(lcm.train_step, static_argnames=("config", "optimizer"))
    after, _ = step(state, frozen, batch, config=config, optimizer=optimizer)
    z, t, cond = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999]), conditions(False)
    cond = dataclasses.replace(cond, image=None)
    teacher = predict(modules, frozen, z, t, cond)
    np.testing.assert_array_equal(predict(modules, {**frozen, **state.params}, z, t, cond), teacher)
    assert np.abs(np.asarray(predict(modules, {**frozen, **after.params}, z, t, cond) - teacher)).max() > 1e-4


def test_the_gradient_of_a_lora_is_alpha_by_rank_and_none_goes_through_its_target() -> None:
    """θ⁻ is θ, but a constant: the target is computed apart here, and given as numbers."""
    modules, params = real_modules(edits=False)
    flags = LcmFlags(num_ddim_timesteps=10, timestep_scaling_factor=0.01)
    config = lcm.configure(modules, flags, lora=True)
    state = lcm.init_state(config, params, optax.identity(), jax.random.key(0), rank=2, alpha=6.0)
    rng, key = np.random.default_rng(0), jax.random.key(3)
    theta = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)) if x.ndim else x, state.params)
    batch = {"moments": rng.standard_normal((2, 8, 8, 8)), "context": rng.standard_normal((2, 5, 24))}
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    schedule = lcm.student_schedule(NoiseSchedule.from_config(SCHEDULER), flags)
    null = {"null_context": jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32)}
    frozen = {"unet": params, "schedule": schedule, **null}

    keys = jax.random.split(key, 6)
    inputs = prepare(modules, frozen, batch, keys[0])
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
        return c_skip * z + c_out * schedule.to_x0_eps(predict(modules, merged(theta), z, t, inputs.cond), z, t)[0]

    teacher = schedule.to_x0_eps(guided(modules, frozen, z_t, t, inputs, w + 1), z_t, t)
    z_s = schedule.ddim_step(*teacher, s)
    target = np.asarray(jax.jit(lambda theta: f(theta, z_s, s))(theta))

    def wanted(theta: Any, target: Any) -> Any:
        return jnp.mean((f(theta, z_t, t) - target) ** 2)

    def ours(theta: Any) -> Any:
        return lcm.loss(theta, state, frozen, batch, key, config)[0]

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
    inputs = prepare(problem.config.modules, problem.frozen, batch, jax.random.key(0))
    assert inputs.null is not None
    dropped = drop_conditions(inputs, jax.random.key(3), 0.1)

    def same(a, b):
        return np.all(np.asarray(a == b).reshape(len(a), -1), axis=1)

    text = same(dropped.cond.context, inputs.null.context)
    pooled = same(dropped.cond.added_cond["text_embeds"], inputs.null.added_cond["text_embeds"])
    image = same(dropped.cond.image, inputs.null.image)
    np.testing.assert_array_equal(text, pooled)
    np.testing.assert_array_equal(dropped.cond.added_cond["time_ids"], batch["time_ids"])
    for share in (text & ~image, text & image, ~text & image):
        assert abs(share.mean() - 0.1) < 0.02
    kept = ~text & ~image
    np.testing.assert_array_equal(dropped.cond.context[kept], inputs.cond.context[kept])
    np.testing.assert_array_equal(dropped.cond.image[~image], inputs.cond.image[~image])
    assert dropped.image_only is not None
    np.testing.assert_array_equal(dropped.image_only.image, dropped.cond.image)
    np.testing.assert_array_equal(dropped.image_only.context, inputs.null.context)


def test_the_source_image_is_its_mode_and_not_scaled() -> None:
    problem = make_problem("edit", "epsilon", "l2", 0.0)
    first, second = (
        prepare(problem.config.modules, problem.frozen, problem.batch, jax.random.key(i)).cond.image for i in (0, 1)
    )
    np.testing.assert_array_equal(first, second)
    mean, _ = np.split(np.asarray(problem.batch["conditioning_moments"], "f4"), 2, axis=-1)
    np.testing.assert_array_equal(first, mean)


def test_diffusers_loads_a_student_of_two_guidances(tmp_path) -> None:
    modules, _ = real_modules()
    student = lcm.configure(modules, LcmFlags(w_image_min=0.0, w_image_max=1.0)).student
    assert isinstance(student, UNet2DCondition)
    values = student.config.to_dict()
    assert values["embeds_image_guidance"] is True
    assert "embeds_image_guidance" not in modules.unet.config.to_dict()
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
    modules, _ = real_modules()
    student = dataclasses.replace(modules, unet=lcm.configure(modules, LcmFlags()).student)
    with pytest.raises(ValueError, match="has been distilled already"):
        lcm.configure(student, LcmFlags())
    text, _ = real_modules(edits=False)
    with pytest.raises(ValueError, match="takes no image"):
        lcm.configure(text, LcmFlags(w_image_min=0.0, w_image_max=1.0))
    with pytest.raises(ValueError, match="there is no guidance to bake in"):
        bake_guidance(modules.unet, {}, 4.0)
    with pytest.raises(ValueError, match="takes no image guidance"):
        bake_guidance(student.unet, {}, 4.0, 1.5)
