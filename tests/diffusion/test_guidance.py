"""Guidance against diffusers' formulas, and against NumPy in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from codi_jax.diffusion import guidance
from codi_jax.diffusion.guidance import Guidance, choose_guidance, stack_branches

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


SHAPE = (2, 3, 4, 2)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(np.float32)


def guided(network: Callable[[Any, Any], Any], z: jax.Array, uncond: jax.Array, cond: jax.Array, scale: Any) -> Any:
    """One pass for both branches, as callers have it."""
    prediction = network(guidance.stack_branches(z, z), guidance.stack_branches(uncond, cond))
    return guidance.classifier_free_guidance(*guidance.split_branches(prediction, 2), scale)


def test_branches_come_apart_in_the_order_in_which_they_were_stacked():
    z, uncond, cond = (jnp.asarray(normal(seed)) for seed in (0, 5, 6))

    def network(z: jax.Array, condition: jax.Array) -> jax.Array:
        return jnp.tanh(z + 2 * condition)

    u, c = np.asarray(network(z, uncond), np.float64), np.asarray(network(z, cond), np.float64)
    np.testing.assert_allclose(guided(network, z, uncond, cond, 7.5), u + 7.5 * (c - u), atol=1e-5)
    np.testing.assert_allclose(guided(network, z, uncond, cond, 1.0), c, atol=1e-6)  # the condition counts ...
    np.testing.assert_allclose(guided(network, z, uncond, cond, 0.0), u, atol=1e-6)  # ... not its absence


def test_branches_may_be_trees():
    uncond = {"text_embeds": jnp.zeros((2, 3)), "time_ids": jnp.zeros((2, 6))}
    cond = jax.tree.map(lambda x: x + 1, uncond)
    stacked = guidance.stack_branches(uncond, cond)
    np.testing.assert_array_equal(stacked["text_embeds"][:, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(stacked["time_ids"][:, 0], [0, 0, 1, 1])


def test_guidance_scale_for_each_sample():
    uncond, cond = jnp.asarray(normal(0)), jnp.asarray(normal(1))
    both = guidance.classifier_free_guidance(uncond, cond, jnp.array([2.0, 9.0]))
    for i, scale in enumerate((2.0, 9)):
        np.testing.assert_allclose(both[i], guidance.classifier_free_guidance(uncond, cond, scale)[i], rtol=1e-6)


def test_instruct_pix2pix_guidance():
    u, i, t = (normal(seed) for seed in (0, 1, 2))
    branches = guidance.split_branches(guidance.stack_branches(*map(jnp.asarray, (u, i, t))), 3)
    expected = u + 1.5 * (i - u) + 7.5 * (t - i)
    np.testing.assert_allclose(guidance.instruct_pix2pix_guidance(*branches, 7.5, 1.5), expected, atol=1e-5)
    text, image, uncond = map(torch.tensor, (t, i, u))  # the formula in diffusers' pipeline, in its order
    theirs = uncond + 7.5 * (text - image) + 1.5 * (image - uncond)
    np.testing.assert_allclose(guidance.instruct_pix2pix_guidance(*branches, 7.5, 1.5), theirs, atol=1e-5)


def test_two_passes_suffice_for_instruct_pix2pix_at_image_guidance_scale_one():
    uncond, image_only, full = (jnp.asarray(normal(seed)) for seed in (0, 1, 2))
    three = guidance.instruct_pix2pix_guidance(uncond, image_only, full, 3.0, 1.0)
    np.testing.assert_allclose(guidance.classifier_free_guidance(image_only, full, 3.0), three, atol=1e-6)


def test_guidance_embedding_is_that_of_diffusers():
    w = np.array([0.0, 2.0, 6.5, 14.0], np.float32)
    ours = guidance.guidance_embedding(jnp.asarray(w))
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(w), embedding_dim=256)
    assert ours.shape == (4, 256)
    # Angles go up to 14,000: a float32 frequency that is one ulp off is 1e-3 off in the angle, there and here.
    np.testing.assert_allclose(ours, theirs, atol=4e-3)
    np.testing.assert_allclose(ours[:2], theirs[:2], atol=1e-3)


def test_guidance_embedding_from_the_formula():
    w = np.array([1.0, 7.0])
    angles = 1000 * w[:, None] * np.exp(-np.arange(128) * np.log(10_000) / 127)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(guidance.guidance_embedding(jnp.asarray(w, jnp.float32)), expected, atol=1e-3)


def test_guidance_embedding_of_text_and_image():
    """Each in half of the width."""
    w, w_image = jnp.array([1.0, 7.0]), jnp.array([0.5, 2.0])
    both = guidance.guidance_embedding(w, 64, w_image)
    halves = [guidance.guidance_embedding(each, 32) for each in (w, w_image)]
    np.testing.assert_array_equal(both, np.concatenate(halves, axis=1))


# ---- The guidance as a value

EACH = jnp.array([2.0, 7.0])  # one scale for each of the two samples
KINDS: dict[str, tuple[Callable[..., Guidance], tuple[str, ...]]] = {
    "none": (lambda *_: Guidance.none(), ("full",)),
    "embedded": (lambda s, _: Guidance.embedded(s), ("full",)),
    "classifier-free": (lambda s, _: Guidance.classifier_free(s), ("null", "full")),
    "edit, two passes": (lambda s, _: Guidance.edit(s), ("image_only", "full")),
    "edit": (Guidance.edit, ("null", "image_only", "full")),
}
SCALES = {"numbers": (7.5, 1.5), "scalars": (jnp.float32(7.5), jnp.float32(1.5)), "each": (EACH, EACH[::-1] / 4)}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_guidance_combines_its_own_branches(kind: str, scales: tuple[Any, Any]):
    """In the order in which it says that they are stacked, by the formulas in float64."""
    make, branches = KINDS[kind]
    value = make(*scales)
    assert value.branches == branches
    outputs = {"null": normal(0), "image_only": normal(1), "full": normal(2)}
    stacked = stack_branches(*(jnp.asarray(outputs[branch]) for branch in value.branches))
    u, i, t = (outputs[branch].astype(np.float64) for branch in ("null", "image_only", "full"))
    s_T, s_I = (np.broadcast_to(np.asarray(s, np.float64), (2,)).reshape(2, 1, 1, 1) for s in scales)
    expected = {
        "none": t,
        "embedded": t,  # the network has done it
        "classifier-free": u + s_T * (t - u),
        "edit, two passes": u + 1 * (i - u) + s_T * (t - i),
        "edit": u + s_I * (i - u) + s_T * (t - i),
    }[kind]
    np.testing.assert_allclose(value.combine(stacked), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(Guidance.combine)(value, stacked), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedded"])
def test_only_an_embedded_guidance_is_embedded(kind: str):
    assert KINDS[kind][0](7.5, 1.5).embedding(2, 64, embeds_image=False) is None


@pytest.mark.parametrize("w", [6.5, jnp.float32(6.5), np.float32(6.5), jnp.array([6.5, 6.5])])
def test_an_embedded_guidance_is_that_of_diffusers_for_every_sample(w: Any):
    embedding = partial(LatentConsistencyModelPipeline.get_guidance_scale_embedding, None)
    theirs = embedding(torch.full((2,), 6.5), embedding_dim=64)
    np.testing.assert_allclose(Guidance.embedded(w).embedding(2, 64, embeds_image=False), theirs, atol=1e-3)
    both = Guidance.embedded(w, 0.5)
    np.testing.assert_allclose(both.embedding(2, 64, embeds_image=False), theirs, atol=1e-3)  # takes no image's
    halves = [embedding(torch.full((2,), each), embedding_dim=32) for each in (6.5, 0.5)]
    np.testing.assert_allclose(both.embedding(2, 64, embeds_image=True), torch.cat(halves, dim=1), atol=1e-3)


@pytest.mark.parametrize(
    ("scales", "model", "expected"),
    [
        ((7.5, 1.5), {}, Guidance.classifier_free(np.float32(7.5))),
        ((1, 1.5), {}, Guidance.none()),
        ((7.5, 1.5), {"is_edit": True}, Guidance.edit(np.float32(7.5), np.float32(1.5))),
        ((0, 1.5), {}, Guidance.none()),
        ((7.5, 0), {}, Guidance.classifier_free(np.float32(7.5))),
        ((1, 1.5), {"is_edit": True}, Guidance.none()),
        ((7.5, 1), {"is_edit": True}, Guidance.edit(np.float32(7.5))),
        ((7.5, 0.9), {"is_edit": True}, Guidance.none()),
        ((1, 1), {"is_edit": True}, Guidance.none()),
        ((7.5, 1.5), {"embeds_guidance": True}, Guidance.embedded(np.float32(6.5), np.float32(0.5))),
        ((1, 1), {"embeds_guidance": True}, Guidance.embedded(np.float32(0), np.float32(0))),
        ((0, 0), {"embeds_guidance": True}, Guidance.embedded(np.float32(-1), np.float32(-1))),
    ],
)
def test_guidance_takes_the_fewest_passes(scales: tuple[float, float], model: dict[str, bool], expected: Guidance):
    assert choose_guidance(*scales, **{"is_edit": False, "embeds_guidance": False, **model}) == expected


def test_one_program_serves_all_scales_of_a_kind():
    """Branches are static, scales are not."""
    traced = []

    @jax.jit
    def combine(value: Guidance, predictions: jax.Array) -> jax.Array:
        traced.append(value.branches)
        return value.combine(predictions)

    two, three = jnp.asarray(normal(0, 4, 3, 4, 2)), jnp.asarray(normal(0, 6, 3, 4, 2))
    for scale in (2.0, 3.0, 7.5):
        combine(Guidance.classifier_free(scale), two)
        combine(Guidance.edit(scale), two)
        combine(Guidance.edit(scale, scale / 2), three)
    assert traced == [("null", "full"), ("image_only", "full"), ("null", "image_only", "full")]


def test_rescaled_guidance_equals_diffusers():
    """For each sample on its own; 0 changes nothing, 1 gives the conditional prediction's deviation."""
    rng = np.random.default_rng(0)
    uncond, cond = (jnp.asarray(rng.standard_normal((2, 5, 4, 3), np.float32)) * scale for scale in (1, 2))
    of_scale = guidance.classifier_free_guidance(uncond, cond, 7.5)
    for rescale in (0.0, 0.3, 0.7, 1.0):
        wanted = rescale_noise_cfg(*(torch.tensor(np.asarray(each)) for each in (of_scale, cond)), rescale).numpy()
        np.testing.assert_allclose(guidance.rescaled_guidance(of_scale, cond, rescale), wanted, rtol=1e-5, atol=1e-6)
    stacked = jnp.concatenate([uncond, cond])
    of_guidance = Guidance.classifier_free(7.5, rescale=0.7).combine(stacked)
    np.testing.assert_allclose(of_guidance, guidance.rescaled_guidance(of_scale, cond, 0.7), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Guidance.classifier_free(7.5).combine(stacked), of_scale)
    one = np.asarray(guidance.rescaled_guidance(of_scale, cond, 1.0))
    np.testing.assert_allclose(one.std(axis=(1, 2, 3)), cond.std(axis=(1, 2, 3)), rtol=1e-5)
