"""What a method gets from a batch, against the models themselves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE, TEXT
from pairs import Pairs

from codi_jax.diffusion.guidance import Guidance
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Inputs, encode_null_text, posterior, prepare
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict

START, END = TEXT["bos_token_id"], TEXT["eos_token_id"]
EMPTY = np.array([[START] + [END] * (TEXT["max_position_embeddings"] - 1)], np.int32)


def raw_batch(is_sdxl: bool, size: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, START, (size, EMPTY.shape[1])).astype("i4")
    ids[:, -1] = END
    batch: dict[str, Any] = {
        "pixels": rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8),
        "conditioning": rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8),
        "input_ids": {"text_encoder": ids, **({"text_encoder_2": ids[::-1].copy()} if is_sdxl else {})},
    }
    if is_sdxl:
        batch["time_ids"] = rng.uniform(0, 99, (size, 6)).astype("f4")
    return jax.tree.map(jnp.asarray, batch)


def model(pairs: Pairs, is_sdxl: bool) -> tuple[Networks, dict[str, Params]]:
    ours: Model = pairs("sdxl-controlnet" if is_sdxl else "controlnet").ours
    return ours.networks, dict(ours.params)


@functools.partial(jax.jit, static_argnums=0)
def encode_ids(networks: Networks, params: dict[str, Any], ids: dict[str, Any]) -> tuple[Any, Any]:
    first = networks.text_encoder.apply({"params": params["text_encoder"]}, ids["text_encoder"])
    if networks.text_encoder_2 is None:
        return first.last_hidden_state, None
    second = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, ids["text_encoder_2"])
    return jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1), second.pooled


@pytest.mark.parametrize("is_sdxl", [False, True])
def test_a_raw_batch(pairs: Pairs, is_sdxl: bool) -> None:
    networks, params = model(pairs, is_sdxl)
    batch = raw_batch(is_sdxl)
    ids = {name: jnp.asarray(EMPTY) for name in batch["input_ids"]}
    key = jax.random.key(5)

    @jax.jit
    def prepared(params: Any, batch: Any, ids: Any) -> Inputs:
        return prepare(networks, params, batch, key, encode_null_text(networks, params, ids))

    inputs = prepared(params, batch, ids)
    conditions = inputs.conditions

    pixels = (np.asarray(batch["pixels"], np.float32) - 127.5) / 127.5
    posterior = jax.jit(lambda x: networks.vae.apply({"params": params["vae"]}, x, method="encode"))(pixels)
    std = np.exp(0.5 * np.asarray(posterior.logvar))
    z0 = 0.18215 * (np.asarray(posterior.mean) + std * np.asarray(jax.random.normal(key, std.shape)))
    np.testing.assert_allclose(inputs.z0, z0, rtol=1e-4, atol=1e-5)
    assert inputs.z0.dtype == jnp.float32
    np.testing.assert_allclose(conditions.full.control, np.asarray(batch["conditioning"]) / 255, rtol=1e-6)
    np.testing.assert_array_equal(conditions.null.control, conditions.full.control)

    for condition, tokens in ((conditions.full, batch["input_ids"]), (conditions.null, jax.tree.map(_twice, ids))):
        context, pooled = encode_ids(networks, params, tokens)
        np.testing.assert_allclose(condition.context, context, rtol=1e-4, atol=1e-5)
        if is_sdxl:
            np.testing.assert_allclose(condition.added_cond["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(condition.added_cond["time_ids"], batch["time_ids"])
        else:
            assert condition.added_cond is None
    guidance = Guidance.classifier_free(2.0)
    jax.eval_shape(lambda c: predict(networks, params, inputs.z0, jnp.array([3, 9]), c, guidance), conditions)


def _twice(x: jax.Array) -> jax.Array:
    return jnp.repeat(x, 2, axis=0)


def test_a_cached_batch_is_the_raw_one_to_float16(pairs: Pairs) -> None:
    networks, params = model(pairs, True)
    batch = raw_batch(True)
    raw = jax.jit(lambda b: prepare(networks, params, b, jax.random.key(5)))(batch)
    posterior = jax.jit(lambda x: networks.vae.apply({"params": params["vae"]}, x, method="encode"))(
        batch["pixels"] / 127.5 - 1.0
    )
    cached = {
        "moments": jnp.concatenate([posterior.mean, posterior.logvar], -1).astype(jnp.float16),
        "context": raw.conditions.full.context.astype(jnp.float16),
        "pooled": raw.conditions.full.added_cond["text_embeds"].astype(jnp.float16),
        "time_ids": batch["time_ids"],
    }
    # Neither the encoders nor their parameters are needed for it.
    inputs = prepare(Networks(networks.unet, networks.vae), {}, cached, jax.random.key(5))
    np.testing.assert_allclose(inputs.z0, raw.z0, rtol=5e-3, atol=2e-3)
    assert inputs.z0.dtype == jnp.float32
    np.testing.assert_array_equal(inputs.conditions.full.context, cached["context"])
    np.testing.assert_array_equal(inputs.conditions.full.added_cond["text_embeds"], cached["pooled"])
    assert inputs.conditions.full.control is inputs.conditions.null is None


def test_the_null_text_of_zeros(pairs: Pairs) -> None:
    networks, params = model(pairs, True)
    ids = {"text_encoder": jnp.asarray(EMPTY), "text_encoder_2": jnp.asarray(EMPTY)}
    null = encode_null_text(networks, params, ids, zeros=True)
    assert (null.context.shape, null.pooled.shape) == ((1, 16, 44), (1, 20))
    assert not any(np.any(x) for x in jax.tree.leaves(null))


def test_gradients_reach_a_text_encoder_that_is_trained(pairs: Pairs) -> None:
    networks, params = model(pairs, False)
    batch = raw_batch(False)

    def loss(text_encoder: Any) -> jax.Array:
        inputs = prepare(networks, {**params, "text_encoder": text_encoder}, batch, jax.random.key(0))
        return (inputs.conditions.full.context**2).sum()

    gradient = jax.jit(jax.grad(loss))(params["text_encoder"])
    assert np.any(gradient["text_model"]["embeddings"]["token_embedding"]["embedding"])


def test_images_encoded_in_parts_are_the_same(pairs: Pairs) -> None:
    networks, params = model(pairs, False)
    batch = {"pixels": raw_batch(False, 6)["pixels"]}
    whole, parts = (
        jax.jit(lambda batch, parts=parts: jax.tree.leaves(posterior(networks.vae, params, batch, parts)))(batch)
        for parts in (1, 3)
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
