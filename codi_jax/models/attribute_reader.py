"""A small classifier that reads the attributes of an avatar off its picture, for the metric attribute accuracy."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from codi_jax.models.config import Channels, Layers, ModelConfig, Params, Side
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.layers import Downsample2D, ResnetBlock2D, conv, dense
from codi_jax.models.network import Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeReaderConfig(ModelConfig):
    """The ``config.json`` of an `AttributeReader`.

    Attributes:
      block_out_channels: channels at each resolution, the first at the picture's.
      layers_per_block: residual blocks at each resolution below the picture's.
      norm_num_groups: groups of the normalizations.
      sample_size: side of the pictures, in pixels.
      labels: what each output stands for, separated by commas.
    """

    class_names: ClassVar[tuple[str, ...]] = ("AttributeReader",)

    block_out_channels: tuple[Channels, ...] = (16, 32, 64, 128)
    layers_per_block: Layers = 1
    norm_num_groups: Channels = 8
    sample_size: Side = 64
    labels: str = ""


class AttributeReader(Network):
    """Residual blocks at falling resolutions, then the mean over the picture.

    Attributes:
      config: the ``config.json``.
      dtype: the computation's dtype.
      attention: not used.
      remat: not used.
    """

    config: AttributeReaderConfig
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: bool = False

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        first, *others = config.block_out_channels
        self.conv_in = conv(first, dtype=dtype)
        self.downsamplers = [Downsample2D(features, 1, dtype) for features in others]
        self.resnets = [
            ResnetBlock2D(features, config.norm_num_groups, 1e-5, False, False, dtype)
            for features in others
            for _ in range(config.layers_per_block)
        ]
        self.classifier = dense(len(config.labels.split(",")), dtype=jnp.float32)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n"]:
        """One logit per label, float32.

        Args:
          pixels: pictures in [-1, 1].
        """
        x, layers = self.conv_in(pixels), self.config.layers_per_block
        for i, downsample in enumerate(self.downsamplers):
            x = downsample(x)
            for resnet in self.resnets[i * layers : (i + 1) * layers]:
                x = resnet(x)
        return self.classifier(nn.silu(x).astype(jnp.float32).mean(axis=(1, 2)))

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters to train from nothing, float32."""
        size = self.config.sample_size
        return dict(self.init(key, jnp.zeros((1, size, size, 3)))["params"])
