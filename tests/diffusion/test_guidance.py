"""Guidance against diffusers' formulas, and against NumPy in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from codi_jax.diffusion import guidance

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
