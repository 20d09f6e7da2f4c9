"""The head that tells real latents from generated ones by a UNet's lowest features (DMD2: Yin et al., 2024, 4.3)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from codi_jax.models.config import Params
from codi_jax.models.kernels.group_norm import GroupNorm
from codi_jax.models.layers import conv, dense


class DiscriminatorHead(nn.Module):
    """Two halvings, and the mean over all positions of what is left, so that it takes features of any size.

    The reference halves until one position is left, by as many layers as that takes at its one resolution.

    Attributes:
      features: channels of the UNet's lowest features.
      dtype: of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.convs = [conv(self.features, 4, stride=2, padding=1, dtype=self.dtype) for _ in range(2)]
        # 32 groups, but of 8 channels at least: of one channel at one position nothing is left after normalization.
        groups = math.gcd(32, self.features // 8) if self.features % 8 == 0 else 1
        self.norms = [GroupNorm(groups, 1e-5, self.dtype) for _ in range(2)]
        self.logit = dense(1, dtype=jnp.float32)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """One logit for each sample, float32: positive for real."""
        for halve, norm in zip(self.convs, self.norms, strict=True):
            x = nn.silu(norm(halve(x)))
        return self.logit(x.astype(jnp.float32).mean(axis=(1, 2)))[:, 0]

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters to train from nothing, float32."""
        return dict(self.init(key, jnp.zeros((1, 4, 4, self.features)))["params"])

    def abstract_params(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self.random_params, jax.random.key(0))
