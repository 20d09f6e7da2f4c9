"""Networks that are a few lines of algebra, called as the real ones are, and the same algebra in NumPy.

All of z, t, text, sizes, condition image and residuals enter, and products of them, so that whatever a method confuses
changes the result.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from published import TINY_SD15

from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.pipeline.conditions import NullText
from codi_jax.pipeline.networks import Networks

CHANNELS = 3

# Real networks too, where only they will do; as small as they come, since it is compilation that takes the time.
SMALL_SD = {**TINY_SD15, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}
SMALL_XL = {
    **SMALL_SD,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "cross_attention_dim": 24 + 20,
}


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def small_unet(config: dict[str, Any]) -> tuple[UNet2DCondition, dict[str, Any]]:
    """A UNet and random parameters."""
    unet = UNet2DCondition(UNetConfig.from_dict(config))
    return unet, random_params(unet)


def random_params(module: Any, seed: int = 0) -> dict[str, Any]:
    """None of which is zero, as a new ControlNet's outputs are."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), module.abstract_params()
    )


@dataclasses.dataclass(frozen=True)
class StandInConfig:
    """The UNet's configuration, in as far as methods read it. With ``in_channels`` 6 it takes an image's latents."""

    in_channels: int = CHANNELS
    time_cond_proj_dim: int | None = None
    embeds_image_guidance: bool = False
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    num_blocks: int = 1


class StandInUNet(nn.Module):
    """The UNet: an encoder, whose lowest features are an intermediate, and a decoder, which takes the residuals."""

    dtype: Any = jnp.float32
    config: StandInConfig = StandInConfig()
    remat: bool = False

    def setup(self) -> None:
        normal = nn.initializers.normal(0.5)
        self.a, self.b, self.c, self.d = (self.param(x, normal, (1, 1, 1, CHANNELS)) for x in "abcd")
        if self.config.in_channels > CHANNELS:
            self.h = self.param("h", normal, (1, 1, 1, CHANNELS))
        if self.config.time_cond_proj_dim is not None:
            self.time_embedding = StandInTimeEmbedding(self.config.time_cond_proj_dim)

    def abstract_params(self):
        shape = jax.ShapeDtypeStruct((self.config.time_cond_proj_dim, 1), jnp.float32)
        return {"time_embedding": {"cond_proj": {"kernel": shape}}}

    def embed_time(self, t, timestep_cond, added_cond):
        temb = t.astype(jnp.float32)[:, None] / 1000
        if timestep_cond is not None:
            temb = temb + self.time_embedding(timestep_cond)
        if added_cond is not None:
            pooled = added_cond["text_embeds"].astype(jnp.float32)
            temb = temb + pooled.mean(1, keepdims=True) * added_cond["time_ids"][:, :1]
        return temb

    def conv_in(self, z):
        if self.config.in_channels > CHANNELS:
            return z[..., :CHANNELS] * self.a + z[..., CHANNELS:] * self.h
        return z * self.a

    def __call__(self, z, t, context, timestep_cond=None, added_cond=None, down_residuals=None, mid_residual=None):
        temb, x = self.embed_time(t, timestep_cond, added_cond), self.conv_in(z)
        context = context.astype(self.dtype)
        low = x * temb[:, :, None, None] + context.mean((1, 2))[:, None, None, None] * self.b
        lowest_block = "down_blocks_0" if self.config.mid_block_type is None else "mid_block"
        intermediates, skips = {lowest_block: low}, (x, low**2)
        if down_residuals is not None:
            skips = tuple(s + r for s, r in zip(skips, down_residuals, strict=True))
            low = low + mid_residual
        return low * self.c + skips[0] * skips[1] * self.d + 0.1 * temb[:, :, None, None], intermediates


class StandInTimeEmbedding(nn.Module):
    """The projection of the guidance embedding."""

    width: int

    def setup(self) -> None:
        self.cond_proj = nn.Dense(1, use_bias=False)

    def __call__(self, cond):
        return self.cond_proj(cond)


class StandInControlNet(nn.Module):
    """Residuals for it."""

    remat: bool = False

    def setup(self) -> None:
        self.e, self.f, self.g = (self.param(x, nn.initializers.normal(0.5), (1, 1, 1, CHANNELS)) for x in "efg")

    def __call__(self, z, t, context, control, added_cond=None):
        seen = control.mean((1, 2))[:, None, None, :]
        text = context.astype(jnp.float32).mean((1, 2))[:, None, None, None]
        time = t.astype(jnp.float32)[:, None, None, None] / 1000
        return (z * seen * self.e, time * self.f * jnp.ones_like(z)), text * seen * self.g * jnp.ones_like(z)


class StandInVAE(NamedTuple):
    """Only a configuration: latents are cached."""

    class Config(NamedTuple):
        scaling_factor: float = 0.3
        latent_channels: int = CHANNELS
        downscale: int = 1

    config: Config


TEXT_TO_IMAGE = Networks(unet=StandInUNet(), vae=StandInVAE(StandInVAE.Config()))
CONTROLNET = dataclasses.replace(TEXT_TO_IMAGE, controlnet=StandInControlNet())
EDITING = dataclasses.replace(TEXT_TO_IMAGE, unet=StandInUNet(config=StandInConfig(2 * CHANNELS)))
INPAINTING = dataclasses.replace(TEXT_TO_IMAGE, unet=StandInUNet(config=StandInConfig(2 * CHANNELS + 1)))
DISTILLED = dataclasses.replace(TEXT_TO_IMAGE, unet=StandInUNet(config=StandInConfig(time_cond_proj_dim=12)))
"""A model that has been distilled already, so that it takes its guidance as an input."""


def unet_params(seed: int, *, edits: bool = False) -> dict[str, Any]:
    return _normal(seed, "abcdh" if edits else "abcd")


def controlnet_params(seed: int) -> dict[str, Any]:
    return _normal(seed, "efg")


def _normal(seed: int, names: str) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.5 * rng.standard_normal((1, 1, 1, CHANNELS)), jnp.float32) for name in names}


def make_batch(size: int, seed: int = 0) -> dict[str, jax.Array]:
    """Everything is cached; as many samples as rows, columns and channels, where a wrong broadcast goes unnoticed."""
    rng = np.random.default_rng(seed)
    batch = {
        "moments": (0.7 * rng.standard_normal((size, CHANNELS, CHANNELS, 2 * CHANNELS))).astype("f2"),
        "context": rng.standard_normal((size, 4, 5)).astype("f2"),
        "pooled": rng.standard_normal((size, 6)).astype("f2"),
        "time_ids": rng.uniform(0, 1, (size, 6)).astype("f4"),
        "conditioning": rng.integers(0, 256, (size, 4, 4, 3), dtype=np.uint8),
        "conditioning_moments": rng.standard_normal((size, CHANNELS, CHANNELS, 2 * CHANNELS)).astype("f2"),
    }
    return jax.tree.map(jnp.asarray, batch)


def null_text() -> NullText:
    rng = np.random.default_rng(99)
    context, pooled = (jnp.asarray(rng.standard_normal(shape), jnp.float16) for shape in ((1, 4, 5), (1, 6)))
    return NullText(context, pooled)


def numpy_predict(networks, z, t, context, pooled, time_ids, control, image=None, guidance=None) -> np.ndarray:
    """The networks in float64, from their formulas; ``control`` in [0, 1], or ``None`` for no ControlNet."""
    p, column = networks["unet"], (slice(None), None, None, None)
    temb = (t / 1000 + pooled.mean(1) * time_ids[:, 0])[column]
    if guidance is not None:
        temb = temb + (guidance @ p["time_embedding"]["cond_proj"]["kernel"])[:, 0][column]
    x = z * p["a"] if image is None else z * p["a"] + image * p["h"]
    low = x * temb + context.mean((1, 2))[column] * p["b"]
    skip = low**2
    if control is not None:
        q = networks["controlnet"]
        seen = control.mean((1, 2))[:, None, None, :]
        x, skip = x + z * seen * q["e"], skip + (t / 1000)[column] * q["f"]
        low = low + context.mean((1, 2))[column] * seen * q["g"]
    return low * p["c"] + x * skip * p["d"] + 0.1 * temb


def float64(tree: Any) -> Any:
    """A tree of NumPy arrays in float64; integers stay."""
    return jax.tree.map(lambda x: np.asarray(x, None if np.asarray(x).dtype.kind in "iu" else np.float64), tree)
