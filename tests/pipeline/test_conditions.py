"""What a method gets from a batch, against the models themselves, and the networks' calls."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import TINY_TEXT, TINY_VAE
from stand_in import Loader
from standins import SMALL_SD, SMALL_XL, random_params, small_unet

from codi_jax.methods import codi
from codi_jax.models import sharding
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline import prediction
from codi_jax.pipeline.conditions import (
    Condition,
    Inputs,
    Modules,
    add_controlnet,
    init_controlnet,
    null_text,
    posterior,
    prepare,
    refuse_guidance_input,
)
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.pipeline.prediction import encode
from codi_jax.training.denoising_training import denoise
from codi_jax.training.validation import Samples

SECOND = {**TINY_TEXT, "hidden_size": 20, "hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"]}
EMPTY = np.array([[97] + [98] * 15], np.int32)

predict = jax.jit(prediction.predict, static_argnums=0)
guided = jax.jit(prediction.guided, static_argnums=0)


def model(is_xl: bool) -> tuple[Modules, dict[str, Any]]:
    unet, _ = small_unet(SMALL_XL if is_xl else SMALL_SD)
    encoders = {"text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(TINY_TEXT))}
    if is_xl:
        encoders["text_encoder_2"] = CLIPTextModel(CLIPTextConfig.from_dict(SECOND))
    modules = add_controlnet(Modules(unet, AutoencoderKL(VAEConfig.from_dict(TINY_VAE)), **encoders))
    fields = ("unet", "vae", "controlnet", *encoders)
    return modules, {name: random_params(getattr(modules, name), seed) for seed, name in enumerate(fields)}


def raw_batch(is_xl: bool, size: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (size, 16)).astype("i4")
    ids[:, -1] = 98
    batch: dict[str, Any] = {
        "pixels": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        "conditioning": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        "input_ids": {"text_encoder": ids, **({"text_encoder_2": ids[::-1].copy()} if is_xl else {})},
    }
    if is_xl:
        batch["time_ids"] = rng.uniform(0, 99, (size, 6)).astype("f4")
    return jax.tree.map(jnp.asarray, batch)


def encode_ids(modules: Modules, params: dict[str, Any], ids: dict[str, Any]) -> tuple[Any, Any]:
    first = modules.text_encoder.apply({"params": params["text_encoder"]}, ids["text_encoder"])
    if modules.text_encoder_2 is None:
        return first.last_hidden_state, None
    second = modules.text_encoder_2.apply({"params": params["text_encoder_2"]}, ids["text_encoder_2"])
    return np.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1), second.pooled


@pytest.mark.parametrize("is_xl", [False, True])
def test_a_raw_batch(is_xl: bool) -> None:
    modules, params = model(is_xl)
    batch = raw_batch(is_xl)
    ids = {name: jnp.asarray(EMPTY) for name in batch["input_ids"]}
    frozen = {**params, **null_text(modules, params, ids)}
    key = jax.random.key(5)
    inputs = jax.jit(lambda f, b: prepare(modules, f, b, key))(frozen, batch)

    pixels = (np.asarray(batch["pixels"], np.float32) - 127.5) / 127.5
    posterior = jax.jit(lambda x: modules.vae.apply({"params": params["vae"]}, x, method="encode"))(pixels)
    std = np.exp(0.5 * np.asarray(posterior.logvar))
    z0 = 0.18215 * (np.asarray(posterior.mean) + std * np.asarray(jax.random.normal(key, std.shape)))
    np.testing.assert_allclose(inputs.z0, z0, rtol=1e-4, atol=1e-5)
    assert inputs.z0.dtype == jnp.float32
    np.testing.assert_allclose(inputs.cond.control, np.asarray(batch["conditioning"]) / 255, rtol=1e-6)
    np.testing.assert_array_equal(inputs.null.control, inputs.cond.control)

    for condition, tokens in ((inputs.cond, batch["input_ids"]), (inputs.null, jax.tree.map(_twice, ids))):
        context, pooled = encode_ids(modules, params, tokens)
        np.testing.assert_allclose(condition.context, context, rtol=1e-4, atol=1e-5)
        if is_xl:
            np.testing.assert_allclose(condition.added_cond["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(condition.added_cond["time_ids"], batch["time_ids"])
        else:
            assert condition.added_cond is None
    jax.eval_shape(lambda c: prediction.predict(modules, params, inputs.z0, jnp.array([3, 9]), c), inputs.null)


def _twice(x: jax.Array) -> jax.Array:
    return jnp.repeat(x, 2, axis=0)


def test_a_cached_batch_is_the_raw_one_to_float16() -> None:
    modules, params = model(True)
    batch = raw_batch(True)
    raw = jax.jit(lambda b: prepare(modules, params, b, jax.random.key(5)))(batch)
    posterior = jax.jit(lambda x: modules.vae.apply({"params": params["vae"]}, x, method="encode"))(
        batch["pixels"] / 127.5 - 1.0
    )
    cached = {
        "moments": jnp.concatenate([posterior.mean, posterior.logvar], -1).astype(jnp.float16),
        "context": raw.cond.context.astype(jnp.float16),
        "pooled": raw.cond.added_cond["text_embeds"].astype(jnp.float16),
        "time_ids": batch["time_ids"],
    }
    # Neither the encoders nor their parameters are needed for it.
    inputs = prepare(Modules(modules.unet, modules.vae), {}, cached, jax.random.key(5))
    np.testing.assert_allclose(inputs.z0, raw.z0, rtol=5e-3, atol=2e-3)
    assert inputs.z0.dtype == jnp.float32
    np.testing.assert_array_equal(inputs.cond.context, cached["context"])
    np.testing.assert_array_equal(inputs.cond.added_cond["text_embeds"], cached["pooled"])
    assert inputs.cond.control is inputs.null is None


def test_the_null_text_of_zeros() -> None:
    modules, params = model(True)
    ids = {"text_encoder": jnp.asarray(EMPTY), "text_encoder_2": jnp.asarray(EMPTY)}
    null = null_text(modules, params, ids, zeros=True)
    assert jax.tree.map(jnp.shape, null) == {"null_context": (1, 16, 44), "null_pooled": (1, 20)}
    assert not any(np.any(x) for x in jax.tree.leaves(null))


def test_gradients_reach_a_text_encoder_that_is_trained() -> None:
    modules, params = model(False)
    batch = raw_batch(False)

    def loss(text_encoder: Any) -> jax.Array:
        inputs = prepare(modules, {**params, "text_encoder": text_encoder}, batch, jax.random.key(0))
        return (inputs.cond.context**2).sum()

    gradient = jax.jit(jax.grad(loss))(params["text_encoder"])
    assert np.any(gradient["text_model"]["embeddings"]["token_embedding"]["embedding"])


@pytest.fixture(scope="module")
def networks() -> tuple[Modules, dict[str, Any], Inputs, jax.Array]:
    modules, params = model(True)
    rng = np.random.default_rng(1)

    def condition() -> Condition:
        ids, text = rng.uniform(0, 99, (2, 6)), rng.standard_normal((2, 20))
        added_cond = {"text_embeds": jnp.asarray(text, jnp.float32), "time_ids": jnp.asarray(ids, jnp.float32)}
        return Condition(jnp.asarray(rng.standard_normal((2, 5, 44)), jnp.float32), added_cond)

    control = jnp.asarray(rng.uniform(size=(2, 32, 32, 3)), jnp.float32)
    cond, null = (dataclasses.replace(condition(), control=control) for _ in range(2))
    inputs = Inputs(jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32), cond, null)
    return modules, params, inputs, jnp.array([19, 999])


def test_a_prediction_is_the_call_of_the_networks(networks: Any) -> None:
    modules, params, inputs, t = networks
    z, c = inputs.z0, inputs.cond
    apply_unet, apply_controlnet = jax.jit(modules.unet.apply), jax.jit(modules.controlnet.apply)
    alone, _ = apply_unet({"params": params["unet"]}, z, t, c.context, None, c.added_cond)
    np.testing.assert_allclose(predict(modules, {"unet": params["unet"]}, z, t, c), alone, rtol=1e-5, atol=1e-6)
    down, mid = apply_controlnet({"params": params["controlnet"]}, z, t, c.context, c.control, added_cond=c.added_cond)
    both, _ = apply_unet({"params": params["unet"]}, z, t, c.context, None, c.added_cond, down, mid)
    ours = predict(modules, params, z, t, c)
    np.testing.assert_allclose(ours, both, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(ours - alone)).max() > 1e-3


def test_guidance_is_each_branch_on_its_own(networks: Any) -> None:
    """Also with the encoder's features of both branches given; without guidance those of the second are taken."""
    modules, params, inputs, t = networks
    uncond, cond = (np.asarray(predict(modules, params, inputs.z0, t, c)) for c in (inputs.null, inputs.cond))
    w = np.array([2.0, 7.0], "f4")
    wanted = uncond + w[:, None, None, None] * (cond - uncond)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * np.abs(wanted).max()}
    np.testing.assert_allclose(guided(modules, params, inputs.z0, t, inputs, jnp.asarray(w)), wanted, **tolerance)
    stacked = jax.tree.map(lambda *x: jnp.concatenate(x), (inputs.z0, t, inputs.null), (inputs.z0, t, inputs.cond))
    features = jax.jit(encode, static_argnums=0)(modules, params, *stacked)
    shared = guided(modules, params, inputs.z0, t, inputs, jnp.asarray(w), features)
    np.testing.assert_allclose(shared, wanted, **tolerance)
    np.testing.assert_allclose(guided(modules, params, inputs.z0, t, inputs, None, features), cond, **tolerance)


def test_missing_conditions_are_named(networks: Any) -> None:
    modules, params, inputs, t = networks
    without = Inputs(inputs.z0, dataclasses.replace(inputs.cond, control=None))
    with pytest.raises(ValueError, match=r"needs condition images.*--conditioning_image_column"):
        jax.eval_shape(lambda p: prediction.guided(modules, p, inputs.z0, t, without), params)
    with pytest.raises(ValueError, match="null_context"):
        prediction.guided(modules, params, inputs.z0, t, without, jnp.ones(2))


def test_a_new_controlnet_fits_the_vae_and_the_unet() -> None:
    modules, params = model(False)
    modules = add_controlnet(dataclasses.replace(modules, controlnet=None))
    assert modules.controlnet.config.conditioning_downscale == modules.vae.config.downscale
    controlnet = jax.eval_shape(lambda p: init_controlnet(modules, p, jax.random.key(0)), params["unet"])
    shapes = (jax.tree.map(lambda x: x.shape, x) for x in (controlnet, modules.controlnet.abstract_params()))
    assert next(shapes) == next(shapes)
    assert isinstance(modules.text_encoder, CLIPTextModel)  # nothing else has changed
    hash(modules)


def test_images_encoded_in_parts_are_the_same() -> None:
    modules, params = model(False)
    batch = {"pixels": raw_batch(False, 6)["pixels"]}
    whole, parts = (
        jax.jit(lambda batch, parts=parts: jax.tree.leaves(posterior(modules.vae, params, batch, parts)))(batch)
        for parts in (1, 3)
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_training_that_gives_a_network_no_guidance_refuses_one_that_takes_it():
    """The student of LCM as the start of CoDi or of plain training, which would never tell it the guidance."""
    takes, takes_none = (
        UNet2DCondition(UNetConfig.from_dict({**SMALL_SD, "time_cond_proj_dim": width})) for width in (16, None)
    )
    refuse_guidance_input(takes_none, "so it is refused")
    message = r"the teacher takes its guidance as an input \(time_cond_proj_dim\), "
    with pytest.raises(ValueError, match=f"{message}so it is refused"):
        refuse_guidance_input(takes, "so it is refused")
    with pytest.raises(ValueError, match=f"{message}which CoDi does not give it"):
        codi.configure(Modules(takes, AutoencoderKL(VAEConfig.from_dict(TINY_VAE))), codi.CodiFlags())
    pipeline = Mock(spec=DiffusionPipeline, modules={"unet": takes})
    with pytest.raises(ValueError, match=f"{message}which plain training does not give it"):
        denoise(None, pipeline, ["controlnet"], Loader(8), Mock(spec=Samples), sharding.make_mesh())
