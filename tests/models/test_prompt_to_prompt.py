"""Pairs of pictures with shared attention, against diffusers' networks with attention maps copied as matrices."""

from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import SIZE, saved_pipeline

from codi_jax.models.prompt_to_prompt import shared_attention
from codi_jax.pipeline.model import Model

PROMPTS = ["a red fox", "a house", "a blue fox", "a boat"]  # two sources, and the variants of both
STEPS, SCALE = 4, 5.0


class CopiedMaps:
    """The attention of the reference code of Brooks et al. (2023): softmax of the source's scores for both.

    The batch is [uncond of the source, uncond of the variant, cond of the source, cond of the variant].
    """

    active, layers = True, "self"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        layers = "self" if encoder_hidden_states is None else "cross"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scores = q @ k.transpose(-1, -2) * attn.scale
        if self.active and layers == self.layers:
            parts = scores.chunk(4)
            scores = torch.cat([parts[0], parts[0], parts[2], parts[2]])
        return attn.to_out[0](attn.batch_to_head_dim(scores.softmax(-1) @ v))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))


@torch.no_grad()
def by_diffusers(folder: Path, prompts: list[str], latents: np.ndarray, shared: float) -> np.ndarray:
    """Pictures of one source and its variant."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    maps = CopiedMaps()
    pipe.unet.set_attn_processor(maps)
    cond, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    text = torch.cat([uncond, cond])
    pipe.scheduler.set_timesteps(STEPS)
    z = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).repeat(2, 1, 1, 1)
    for step, t in enumerate(pipe.scheduler.timesteps):
        maps.active = step < round(shared * STEPS)
        u, c = pipe.unet(torch.cat([z, z]), t, text).sample.chunk(2)
        z = pipe.scheduler.step(u + SCALE * (c - u), t, z).prev_sample
    pixels = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_pairs_are_those_of_copied_attention_maps(folder: Path):
    """Each pair shares attention in its own part of the steps: from equal noise both pictures are the reference's."""
    pipe = Model.from_pretrained(folder)
    latents = np.random.default_rng(0).standard_normal((2, SIZE // 4, SIZE // 4, 4)).astype(np.float32)
    shared = [0.5, 1.0]
    options = {"steps": STEPS, "guidance_scale": SCALE, "sampler": "ddim"}
    both = np.concatenate([latents, latents])
    images = pipe(PROMPTS, latents=both, shared_attention=shared, **options)
    apart = pipe(PROMPTS, latents=both, **options)
    for pair, share in enumerate(shared):
        expected = by_diffusers(folder, [PROMPTS[pair], PROMPTS[2 + pair]], latents[pair : pair + 1], share)
        np.testing.assert_allclose(images[pair].astype(int), expected[0], atol=2)
        np.testing.assert_allclose(images[2 + pair].astype(int), expected[1], atol=2)
        assert np.abs(apart[2 + pair].astype(int) - expected[1]).max() > 4, "sharing changes nothing here"
        np.testing.assert_allclose(images[pair].astype(int), apart[pair], atol=1)


def test_a_variant_of_the_same_words_is_its_source(folder: Path):
    pipe = Model.from_pretrained(folder)
    images = pipe(["a fox", "a fox"], steps=2, sampler="ddim", seed=3, shared_attention=[0.5])
    np.testing.assert_allclose(images[0].astype(int), images[1], atol=1)


@pytest.mark.slow
def test_without_shared_steps_a_variant_is_drawn_alone(folder: Path):
    """From its source's noise; that of a stochastic sampler included."""
    pipe = Model.from_pretrained(folder)
    for sampler in ("ddim", "euler-ancestral"):
        alone = pipe(["a fox"], steps=2, sampler=sampler, seed=3)
        images = pipe(["a dog", "a fox"], steps=2, sampler=sampler, seed=3, shared_attention=[0.0])
        np.testing.assert_allclose(images[1].astype(int), alone[0], atol=1)
        images = pipe(["a fox", "a fox"], steps=2, sampler=sampler, seed=3, shared_attention=[0.7])
        np.testing.assert_allclose(images[0].astype(int), images[1], atol=1)


def test_cross_attention_is_shared_where_asked(folder: Path):
    """Of the whole network, one pass: queries and keys of the source, over all heads, and values of the variant."""
    pipe = Model.from_pretrained(folder)
    torch_unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    maps = CopiedMaps()
    torch_unet.set_attn_processor(maps)
    rng = np.random.default_rng(1)
    z = rng.standard_normal((4, SIZE // 4, SIZE // 4, 4)).astype(np.float32)
    text = rng.standard_normal((4, 7, pipe.networks.unet.config.cross_attention_dim)).astype(np.float32)
    t = jnp.full((4,), 500)
    for layers in ("self", "cross"):
        maps.layers = layers
        with torch.no_grad():
            expected = torch_unet(torch.from_numpy(z.transpose(0, 3, 1, 2).copy()), 500, torch.from_numpy(text)).sample
        with shared_attention(jnp.array([True]), 2, layers):
            variables = {"params": pipe.params["unet"]}
            found, _ = pipe.networks.unet.apply(variables, jnp.asarray(z), t, jnp.asarray(text))
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=2e-5)


def test_wrong_numbers_of_pairs(folder: Path):
    pipe = Model.from_pretrained(folder)
    for prompts, shared in ((["a"], [0.5]), (["a", "b"], [0.5, 0.5]), (["a", "b"], [1.5])):
        with pytest.raises(ValueError, match="give a number from 0 to 1 for each pair"):
            pipe(prompts, steps=1, shared_attention=shared)
