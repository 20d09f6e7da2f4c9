"""The autoencoder of latent diffusion (Rombach et al., 2022, section 3.1): diffusers' ``AutoencoderKL``, in NHWC."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from codi_jax.models.config import Channels, ConfigError, Layers, ModelConfig, Params, Range, Side
from codi_jax.models.kernels.attention import Implementation, dot_product_attention
from codi_jax.models.kernels.group_norm import GroupNorm
from codi_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D, conv, dense
from codi_jax.models.network import Network

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(ModelConfig):
    """The ``config.json`` of an ``AutoencoderKL``."""

    class_names: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "FlaxAutoencoderKL")
    ignored_keys: ClassVar[frozenset[str]] = frozenset({"dtype"})

    in_channels: Channels = 3
    out_channels: Channels = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[Channels, ...] = (64,)
    layers_per_block: Layers = 1
    act_fn: Literal["silu"] = "silu"
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: Side | tuple[Side, Side] = 32
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise ConfigError("down_block_types, up_block_types and block_out_channels must have the same length.")
        if wrong := [channels for channels in self.block_out_channels if channels % self.norm_num_groups]:
            raise ConfigError(
                f"block_out_channels = {wrong[0]} is not divisible by norm_num_groups = {self.norm_num_groups}."
            )

    @property
    def downscale(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
    """The encoder's output: a normal distribution per latent.

    Attributes:
      mean: ``[b, h, w, c]``, float32.
      logvar: the logarithm of the variance, clipped to [-30, 20].
    """

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    def mode(self) -> Float[Array, "b h w c"]:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b h w c"]:
        """Random latents: mean + σ ε."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, "b"]:
        """The Kullback-Leibler divergence from the standard normal distribution, summed over a sample, in nats."""
        return 0.5 * jnp.sum(self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, normalized and residual."""

    features: int
    num_groups: int
    implementation: Implementation
    dtype: Any

    def setup(self) -> None:
        self.group_norm = GroupNorm(self.num_groups, _EPSILON, self.dtype)
        self.to_q, self.to_k, self.to_v = (dense(self.features, dtype=self.dtype) for _ in range(3))
        self.to_out = [dense(self.features, dtype=self.dtype)]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        query, key, value = (project(y)[:, :, None, :] for project in (self.to_q, self.to_k, self.to_v))
        y = dot_product_attention(query, key, value, implementation=self.implementation)
        return x + self.to_out[0](y.reshape(b, h, w, c))


class MidBlock(nn.Module):
    """Residual block, attention (if the configuration has it), residual block."""

    config: VAEConfig
    attention: Implementation
    dtype: Any

    def setup(self) -> None:
        config, features = self.config, self.config.block_out_channels[-1]
        self.resnets = [_resnet(self, features, False) for _ in range(2)]
        if config.mid_block_add_attention:
            self.attentions = [AttentionBlock(features, config.norm_num_groups, self.attention, self.dtype)]
        else:
            self.attentions = []

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class ResolutionBlock(nn.Module):
    """The residual blocks of one resolution, and the step to the next."""

    features: int
    in_features: int
    num_layers: int
    step: Literal["down", "up"] | None
    config: VAEConfig
    remat: bool
    dtype: Any

    def setup(self) -> None:
        channels = (self.in_features,) + (self.features,) * (self.num_layers - 1)
        self.resnets = [_resnet(self, self.features, c != self.features, self.remat) for c in channels]
        self.downsamplers = [Downsample2D(self.features, 0, self.dtype)] if self.step == "down" else []
        self.upsamplers = [Upsample2D(self.features, self.dtype)] if self.step == "up" else []

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


def _resnet(block: MidBlock | ResolutionBlock, features: int, use_shortcut: bool, remat: bool = False) -> nn.Module:
    module = nn.remat(ResnetBlock2D) if remat else ResnetBlock2D
    return module(features, block.config.norm_num_groups, _EPSILON, use_shortcut, False, block.dtype)


class Encoder(nn.Module):
    """Pixels to the moments of the latents."""

    config: VAEConfig
    attention: Implementation
    remat: bool
    dtype: Any

    def setup(self) -> None:
        config = self.config
        channels = config.block_out_channels
        self.conv_in = conv(channels[0], dtype=self.dtype)
        self.down_blocks = [
            ResolutionBlock(
                features=features,
                in_features=channels[max(i - 1, 0)],
                num_layers=config.layers_per_block,
                step="down" if i < len(channels) - 1 else None,
                config=config,
                remat=self.remat,
                dtype=self.dtype,
            )
            for i, features in enumerate(channels)
        ]
        self.mid_block = MidBlock(config, self.attention, self.dtype)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, _EPSILON, self.dtype)
        self.conv_out = conv(2 * config.latent_channels, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pixels."""

    config: VAEConfig
    attention: Implementation
    remat: bool
    dtype: Any

    def setup(self) -> None:
        config = self.config
        channels = config.block_out_channels[::-1]
        self.conv_in = conv(channels[0], dtype=self.dtype)
        self.mid_block = MidBlock(config, self.attention, self.dtype)
        self.up_blocks = [
            ResolutionBlock(
                features=features,
                in_features=channels[max(i - 1, 0)],
                num_layers=config.layers_per_block + 1,
                step="up" if i < len(channels) - 1 else None,
                config=config,
                remat=self.remat,
                dtype=self.dtype,
            )
            for i, features in enumerate(channels)
        ]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, _EPSILON, self.dtype)
        self.conv_out = conv(config.out_channels, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(Network):
    """The variational autoencoder; ``encode`` and ``decode`` are called with ``method=``.

    Latents are the network's own, unscaled: multiply by ``config.scaling_factor`` before diffusion, divide after it.

    Attributes:
      config: a `VAEConfig`.
      dtype: the computation's dtype.
      attention: the attention kernel.
      remat: recompute residual blocks in the backward pass.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config, self.attention, self.remat, self.dtype)
        self.decoder = Decoder(config, self.attention, self.remat, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = conv(2 * config.latent_channels, 1, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(config.latent_channels, 1, dtype=self.dtype)

    def encode(self, pixels: Float[Array, "b hp wp c_pixels"]) -> DiagonalGaussian:
        """Encodes images.

        Args:
          pixels: images in [-1, 1]; height and width divisible by ``config.downscale``.

        Returns:
          The distribution of the latents, float32, ``[b, h, w, c]``.

        Raises:
          ValueError: for a size that the encoder cannot halve.
        """
        scale = self.config.downscale
        if pixels.shape[1] % scale or pixels.shape[2] % scale:
            raise ValueError(
                f"images of {pixels.shape[2]}x{pixels.shape[1]} pixels: both sides must be divisible by {scale}."
            )
        moments = self.encoder(pixels.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b hp wp c_pixels"]:
        """Decodes latents to pixels, roughly in [-1, 1] and not clipped, in the module's dtype."""
        x = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            x = self.post_quant_conv(x)
        return self.decoder(x)

    def __call__(self, pixels: Float[Array, "b hp wp c_pixels"]) -> Float[Array, "b hp wp c_pixels"]:
        """Encodes to the mode and decodes; touches every parameter."""
        return self.decode(self.encode(pixels).mode())

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters for training from scratch, float32."""
        size = self.config.downscale
        return dict(self.init(key, jnp.zeros((1, size, size, self.config.in_channels)))["params"])
