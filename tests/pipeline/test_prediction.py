"""What losses and samplers predict, against the guided predictions inside of diffusers' pipelines."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE
from oracle import assert_close, nhwc
from pairs import PROMPTS, Pair, Pairs, images_for, latents, run_theirs

from codi_jax.diffusion.guidance import Guidance
from codi_jax.models.config import Params
from codi_jax.pipeline import prediction
from codi_jax.pipeline.conditions import Condition, Conditions, encode_null_text, prepare
from codi_jax.pipeline.networks import Networks

predict = jax.jit(prediction.predict, static_argnums=0)


# ---- Against diffusers' pipelines


class Prediction(NamedTuple):
    """What a pipeline hands to its scheduler, which is guided, and the latents and the time that it is for."""

    output: np.ndarray
    z: np.ndarray
    t: int


def their_predictions(pair: Pair, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Prediction]:
    """Those of a run of two steps."""
    pipeline, seen = pair.theirs, []
    step = pipeline.scheduler.step

    def record(output: Any, t: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(Prediction(nhwc(output), nhwc(z), int(t)))
        return step(output, t, z, *args, **kwargs)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    run_theirs(pair.family, pipeline, latents(), num_inference_steps=2, **options)
    return seen


def our_conditions(pair: Pair) -> Conditions:
    """As training has them: from token ids, pictures as bytes and the null text."""
    model = pair.ours
    batch: dict[str, Any] = {"input_ids": model.tokenize(PROMPTS)}
    for pictures in images_for(pair.family).values():
        batch["conditioning"] = np.stack([np.asarray(picture) for picture in pictures])
    if model.networks.is_sdxl:
        batch["time_ids"] = np.asarray([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2, np.float32)
    zeros = model.zeros_for_empty_prompt

    @jax.jit
    def conditions(params: Any, batch: Any, null_ids: Any) -> Conditions:
        null_text = encode_null_text(model.networks, params, null_ids, zeros=zeros)
        return prepare(model.networks, params, batch, jax.random.key(0), null_text).conditions

    return conditions(dict(model.params), jax.tree.map(jnp.asarray, batch), model.tokenize([""]))


SCALE, IMAGE_SCALE, CONTROL_SCALE = 3.0, 1.5, 0.7
ALL = {"guidance_scale": SCALE}
FOR_EDITS = {**ALL, "image_guidance_scale": IMAGE_SCALE}
CLASSIFIER_FREE, EDIT = Guidance.classifier_free(SCALE), Guidance.edit(SCALE, IMAGE_SCALE)
CASES: dict[str, tuple[str, Guidance, dict[str, float]]] = {
    "text": ("text-to-image", CLASSIFIER_FREE, ALL),
    "text, no guidance": ("text-to-image", Guidance.none(), {"guidance_scale": 1.0}),
    "embedded": ("lcm", Guidance.embedded(SCALE - 1), ALL),
    "controlnet": ("controlnet", CLASSIFIER_FREE, {**ALL, "controlnet_conditioning_scale": CONTROL_SCALE}),
    "instruct-pix2pix": ("instruct-pix2pix", EDIT, FOR_EDITS),
    "instruct-pix2pix, image scale 1": ("instruct-pix2pix", Guidance.edit(SCALE), {**ALL, "image_guidance_scale": 1.0}),
    "sdxl": ("sdxl", CLASSIFIER_FREE, ALL),
    "sdxl-controlnet": ("sdxl-controlnet", CLASSIFIER_FREE, {**ALL, "controlnet_conditioning_scale": CONTROL_SCALE}),
    "sdxl-instruct-pix2pix": ("sdxl-instruct-pix2pix", EDIT, FOR_EDITS),
}


# Every program has to be compiled; pictures of these families are compared with diffusers' as well.
SLOW = ("sdxl-controlnet", "sdxl-instruct-pix2pix")


@pytest.mark.parametrize(
    ("family", "guidance", "options"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)
def test_predictions_are_those_of_diffusers(
    pairs: Pairs, family: str, guidance: Guidance, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs(family)
    conditions = our_conditions(pair)
    if "controlnet_conditioning_scale" in options:
        conditions = dataclasses.replace(conditions, control_scale=jnp.float32(CONTROL_SCALE))
    theirs = their_predictions(pair, monkeypatch, **options)
    assert len(theirs) == 2
    for output, z, t in theirs:
        ours = predict(
            pair.ours.networks, dict(pair.ours.params), jnp.asarray(z), jnp.full((2,), t), conditions, guidance
        )
        assert ours.dtype == jnp.float32
        assert_close(ours, output)


# ---- Against the networks


class Given(NamedTuple):
    """All that a prediction is made of, for two samples at times of their own."""

    networks: Networks
    params: dict[str, Params]
    z: jax.Array
    t: jax.Array
    conditions: Conditions


@pytest.fixture(scope="module")
def given(pairs: Pairs) -> Given:
    ours = pairs("sdxl-controlnet").ours
    rng = np.random.default_rng(1)

    def condition() -> Condition:
        ids, text = rng.uniform(0, 99, (2, 6)), rng.standard_normal((2, 20))
        added_cond = {"text_embeds": jnp.asarray(text, jnp.float32), "time_ids": jnp.asarray(ids, jnp.float32)}
        return Condition(jnp.asarray(rng.standard_normal((2, 5, 44)), jnp.float32), added_cond)

    control = jnp.asarray(rng.uniform(size=(2, SIZE, SIZE, 3)), jnp.float32)
    full, null = (dataclasses.replace(condition(), control=control) for _ in range(2))
    z = jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32)
    return Given(ours.networks, dict(ours.params), z, jnp.array([19, 999]), Conditions(full, null))


@pytest.mark.slow
def test_a_prediction_is_the_call_of_the_networks(given: Given) -> None:
    networks, params, z, t, conditions = given
    c = conditions.full
    apply_unet, apply_controlnet = jax.jit(networks.unet.apply), jax.jit(networks.controlnet.apply)
    alone, _ = apply_unet({"params": params["unet"]}, z, t, c.context, None, c.added_cond)
    ours = predict(networks, {"unet": params["unet"]}, z, t, conditions)
    np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)
    down, mid = apply_controlnet({"params": params["controlnet"]}, z, t, c.context, c.control, added_cond=c.added_cond)
    both, _ = apply_unet({"params": params["unet"]}, z, t, c.context, None, c.added_cond, down, mid)
    ours = predict(networks, params, z, t, conditions)
    # Two programs in one and in two parts: a few roundings of features whose size is one.
    np.testing.assert_allclose(ours, both, rtol=1e-5, atol=3e-6)
    assert np.abs(np.asarray(ours - alone)).max() > 1e-3


def test_guidance_is_each_branch_on_its_own(given: Given) -> None:
    """At a time and a scale of each sample."""
    networks, params, z, t, conditions = given
    uncond, cond = (
        np.asarray(predict(networks, params, z, t, Conditions(c))) for c in (conditions.null, conditions.full)
    )
    w = np.array([2.0, 7.0], "f4")
    wanted = uncond + w[:, None, None, None] * (cond - uncond)
    ours = predict(networks, params, z, t, conditions, Guidance.classifier_free(jnp.asarray(w)))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_array_equal(predict(networks, params, z, t, conditions), cond)
    np.testing.assert_array_equal(predict(networks, params, z, t, conditions, Guidance.none()), cond)


def test_the_intermediates_come_with_the_same_prediction(given: Given) -> None:
    networks, params, z, t, conditions = given
    output, intermediates = jax.jit(prediction.predict_with_intermediates, static_argnums=0)(
        networks, params, z, t, conditions.full
    )
    np.testing.assert_allclose(output, predict(networks, params, z, t, conditions), rtol=1e-5, atol=1e-6)
    assert intermediates
    assert all(len(value) == 2 for value in intermediates.values())


def test_missing_conditions_are_named(given: Given) -> None:
    networks, params, z, t, conditions = given
    without = Conditions(dataclasses.replace(conditions.full, control=None))
    with pytest.raises(ValueError, match=r"needs condition images.*--conditioning_image_column"):
        jax.eval_shape(lambda p: prediction.predict(networks, p, z, t, without), params)
    with pytest.raises(ValueError, match="Guidance needs the null text: give null_text with the frozen networks"):
        prediction.predict(networks, params, z, t, without, Guidance.classifier_free(jnp.ones(2)))
