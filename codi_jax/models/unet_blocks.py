"""The blocks of the UNet: one resolution going down, the lowest one, one resolution going up."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.layers import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D
from codi_jax.models.unet_config import EncoderConfig, UNetConfig


class DownBlock2D(nn.Module):
    """Residual blocks, an attention after each if ``transformer_layers`` is not empty, and a downsampler.

    Called on the features, the time embedding and the text; returns the output, the skip connections and the output
    before the downsampler.
    """

    features: int
    in_features: int
    num_layers: int
    transformer_layers: tuple[int, ...]
    num_heads: int
    add_downsample: bool
    config: EncoderConfig
    attention: Implementation
    remat: bool
    scan_layers: bool
    dtype: Any

    def setup(self) -> None:
        channels = (self.in_features,) + (self.features,) * (self.num_layers - 1)
        self.resnets = [_resnet(self, self.features, c != self.features) for c in channels]
        self.attentions = [_transformer(self, depth) for depth in self.transformer_layers]
        self.downsamplers = [Downsample2D(self.features, 1, self.dtype)] if self.add_downsample else []

    def __call__(self, x: Array, temb: Array, context: Array) -> tuple[Array, tuple[Array, ...], Array]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        before_downsampler = x
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, tuple(skips), before_downsampler


class UpBlock2D(nn.Module):
    """The mirror of `DownBlock2D`: each residual block also reads one skip connection, the last one first."""

    features: int
    num_layers: int
    transformer_layers: tuple[int, ...]
    num_heads: int
    add_upsample: bool
    config: UNetConfig
    attention: Implementation
    remat: bool
    scan_layers: bool
    dtype: Any

    def setup(self) -> None:
        # Concatenation widens every input, so each residual block needs its shortcut.
        self.resnets = [_resnet(self, self.features, True) for _ in range(self.num_layers)]
        self.attentions = [_transformer(self, depth) for depth in self.transformer_layers]
        self.upsamplers = [Upsample2D(self.features, self.dtype)] if self.add_upsample else []

    def __call__(
        self, x: Array, skips: tuple[Array, ...], temb: Array, context: Array, size: tuple[int, int] | None
    ) -> Array:
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(jnp.concatenate([x, skip], axis=-1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class MidBlock2D(nn.Module):
    """Residual block, attention and residual block at the lowest resolution; without attention, one residual block."""

    features: int
    transformer_layers: tuple[int, ...]
    num_heads: int
    config: EncoderConfig
    attention: Implementation
    remat: bool
    scan_layers: bool
    dtype: Any

    def setup(self) -> None:
        self.resnets = [_resnet(self, self.features, False) for _ in range(len(self.transformer_layers) + 1)]
        self.attentions = [_transformer(self, depth) for depth in self.transformer_layers]

    def __call__(self, x: Array, temb: Array, context: Array) -> Array:
        first, *rest = self.resnets
        x = first(x, temb)
        for transformer, resnet in zip(self.attentions, rest, strict=True):
            x = resnet(transformer(x, context), temb)
        return x


def _resnet(block: DownBlock2D | UpBlock2D | MidBlock2D, features: int, use_shortcut: bool) -> nn.Module:
    module = nn.remat(ResnetBlock2D) if block.remat else ResnetBlock2D
    config = block.config
    return module(features, config.norm_num_groups, config.norm_eps, use_shortcut, True, block.dtype)


def _transformer(block: DownBlock2D | UpBlock2D | MidBlock2D, num_layers: int) -> nn.Module:
    config = block.config
    return Transformer2DModel(
        block.features,
        block.num_heads,
        num_layers,
        config.norm_num_groups,
        config.use_linear_projection,
        block.attention,
        block.remat,
        block.scan_layers,
        block.dtype,
    )
