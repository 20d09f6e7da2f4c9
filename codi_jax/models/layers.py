"""The layers that the UNet, the ControlNet and the VAE are made of.

Attribute names follow the diffusers state dict, and a list in ``setup`` becomes ``name_0, name_1, …``: this alone makes
the parameter tree the diffusers tree (see `codi_jax.io.weights`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codi_jax.models.kernels.attention import Implementation, dot_product_attention
from codi_jax.models.kernels.convolution import convolve
from codi_jax.models.kernels.devices import gathered
from codi_jax.models.kernels.geglu import geglu
from codi_jax.models.kernels.group_norm import GroupNorm


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    kernel_init: Any = nn.Conv.kernel_init,
    dtype: Any,
) -> nn.Conv:
    """A square convolution with the symmetric padding of PyTorch (``"SAME"`` pads strided ones differently)."""
    pad = kernel_size // 2 if padding is None else padding
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated=convolve,
    )


def zero_conv(features: int, kernel_size: int = 1, *, dtype: Any) -> nn.Conv:
    """A convolution initialized with zeros: ControlNet's output layers (Zhang et al., 2023, section 3.1)."""
    return conv(features, kernel_size, kernel_init=nn.initializers.zeros, dtype=dtype)


def dense(features: int, *, use_bias: bool = True, kernel_init: Any = nn.Dense.kernel_init, dtype: Any) -> nn.Dense:
    """A dense layer."""
    return nn.Dense(features, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, dot_general=product)


def product(x: Float[Array, "..."], kernel: Float[Array, "c d"], *dimensions: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` with a weight that may be split among devices."""
    return jax.lax.dot_general(x, gathered(kernel), *dimensions, **options)


def timestep_embedding(
    timesteps: Int[Array, "b"] | Float[Array, "b"], dim: int, *, flip_sin_to_cos: bool = False, freq_shift: int = 0
) -> Float[Array, "b {dim}"]:
    """Sinusoidal embedding of the diffusion time (Ho et al., 2020; Vaswani et al., 2017, section 3.5).

    Args:
      timesteps: times, in units of training steps (0 to 999), not necessarily whole.
      dim: the width of the embedding, even.
      flip_sin_to_cos: cosines first, as in Stable Diffusion.
      freq_shift: subtracted from the number of frequencies in the exponent's denominator.

    Returns:
      float32 embeddings.
    """
    half = dim // 2
    exponent = -jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers over a sinusoidal embedding; optionally the guidance embedding enters before the first.

    The guidance projection is initialized with zeros, so that a student that gains one starts as its teacher.
    """

    features: int
    cond_proj_dim: int | None
    dtype: Any

    def setup(self) -> None:
        self.linear_1 = dense(self.features, dtype=self.dtype)
        self.linear_2 = dense(self.features, dtype=self.dtype)
        if self.cond_proj_dim is not None:
            self.cond_proj: nn.Dense | None = dense(  # as wide as the embedding it is added to
                self.features // 4, use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype
            )
        else:
            self.cond_proj = None

    def __call__(self, embedding: Float[Array, "b d"], cond: Float[Array, "b c"] | None = None) -> Float[Array, "b e"]:
        if cond is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond was given, but the model has no time_cond_proj_dim to take it.")
            embedding = embedding + self.cond_proj(cond)
        return self.linear_2(nn.silu(self.linear_1(embedding)))


class ResnetBlock2D(nn.Module):
    """Residual block: (norm, SiLU, conv) twice, with the time embedding added in between."""

    features: int
    num_groups: int
    epsilon: float
    use_shortcut: bool
    use_time_embedding: bool
    dtype: Any

    def setup(self) -> None:
        self.norm1 = GroupNorm(self.num_groups, self.epsilon, self.dtype)
        self.conv1 = conv(self.features, dtype=self.dtype)
        if self.use_time_embedding:
            self.time_emb_proj = dense(self.features, dtype=self.dtype)
        self.norm2 = GroupNorm(self.num_groups, self.epsilon, self.dtype)
        self.conv2 = conv(self.features, dtype=self.dtype)
        if self.use_shortcut:
            self.conv_shortcut = conv(self.features, 1, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"] | None = None) -> Float[Array, "b h w d"]:
        residual = self.conv_shortcut(x) if self.use_shortcut else x
        x = self.conv1(nn.silu(self.norm1(x)))
        if self.use_time_embedding:
            assert temb is not None
            x = x + self.time_emb_proj(nn.silu(temb))[:, None, None, :]
        x = self.conv2(nn.silu(self.norm2(x)))
        return x + residual


class Attention(nn.Module):
    """Multi-head attention of ``x`` over ``context`` (over itself if that is ``None``)."""

    features: int
    num_heads: int
    use_bias: bool
    implementation: Implementation
    dtype: Any

    def setup(self) -> None:
        self.to_q = dense(self.features, use_bias=self.use_bias, dtype=self.dtype)
        self.to_k = dense(self.features, use_bias=self.use_bias, dtype=self.dtype)
        self.to_v = dense(self.features, use_bias=self.use_bias, dtype=self.dtype)
        self.to_out = [dense(self.features, dtype=self.dtype)]

    def __call__(self, x: Float[Array, "b t c"], context: Float[Array, "b s d"] | None = None) -> Float[Array, "b t c"]:
        context = x if context is None else context
        query, key, value = (
            _split_heads(y, self.num_heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = dot_product_attention(query, key, value, implementation=self.implementation)
        return self.to_out[0](out.reshape(x.shape))


def _split_heads(x: Float[Array, "b t c"], num_heads: int) -> Float[Array, "b t n h"]:
    return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer, 2020); value first, gate second."""

    features: int
    dtype: Any

    def setup(self) -> None:
        self.proj = dense(2 * self.features, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t d"]:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    features: int
    dtype: Any

    def setup(self) -> None:
        # diffusers' net.1 is a dropout without parameters; the position is kept for the names.
        self.net = [GEGLU(4 * self.features, self.dtype), None, dense(self.features, dtype=self.dtype)]

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        widen, _, narrow = self.net
        return narrow(widen(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each pre-normalized and residual."""

    features: int
    num_heads: int
    attention: Implementation
    dtype: Any

    def setup(self) -> None:
        def attention() -> Attention:
            return Attention(self.features, self.num_heads, False, self.attention, self.dtype)

        self.norm1 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
        self.attn1 = attention()
        self.norm2 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
        self.attn2 = attention()
        self.norm3 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
        self.ff = FeedForward(self.features, self.dtype)

    def __call__(self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A stack of transformer blocks over the pixels of a feature map.

    With ``scan_layers`` the stack is compiled as a loop, see `_scan`. Neither the result nor the names of parameters
    depend on it.
    """

    features: int
    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
    attention: Implementation
    remat: bool
    scan_layers: bool
    dtype: Any

    def setup(self) -> None:
        def projection() -> nn.Module:
            if self.use_linear_projection:
                return dense(self.features, dtype=self.dtype)
            return conv(self.features, 1, dtype=self.dtype)

        self.norm = GroupNorm(self.num_groups, 1e-6, self.dtype)
        self.proj_in = projection()
        self.transformer_blocks = [self._block() for _ in range(self.num_layers)]
        self.proj_out = projection()

    def _block(self, **options: Any) -> nn.Module:
        block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        return block(self.features, self.num_heads, self.attention, self.dtype, **options)

    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b s d"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        residual = x
        # A 1 x 1 convolution and a dense layer are equivalent per pixel: reshape and projection commute.
        x = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        if self.scan_layers and self.num_layers > 1 and not self.is_initializing():
            x = self._scan(x, context)
        else:
            for block in self.transformer_blocks:
                x = block(x, context)
        return self.proj_out(x.reshape(b, h, w, c)) + residual

    def _scan(self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]) -> Float[Array, "b t c"]:
        """Runs the blocks in a loop over their stacked parameters.

        The compiler sees one block instead of ten, and if parameters are split among devices, one block's are gathered
        at a time. The stack is a copy, with the matrices in the precision of their products.
        """
        block: Any = self._block(parent=None)

        def stack(*leaves: Array) -> Array:
            return jnp.stack([leaf.astype(self.dtype) if leaf.ndim > 1 else leaf for leaf in leaves])

        params = self.variables["params"]
        stacked = jax.tree.map(stack, *(params[f"transformer_blocks_{i}"] for i in range(self.num_layers)))
        return jax.lax.scan(lambda x, layer: (block.apply({"params": layer}, x, context), None), x, stacked)[0]


class Downsample2D(nn.Module):
    """Halves the resolution with a strided convolution; ``padding=0`` pads right and bottom only, as the VAE does."""

    features: int
    padding: int
    dtype: Any

    def setup(self) -> None:
        self.conv = conv(self.features, stride=2, padding=self.padding, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        if self.padding == 0:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest-neighbor enlargement and a convolution."""

    features: int
    dtype: Any

    def setup(self) -> None:
        self.conv = conv(self.features, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        _, h, w, _ = x.shape
        height, width = size or (2 * h, 2 * w)
        if (height, width) == (2 * h, 2 * w):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        else:
            # An odd size was halved on the way down: enlarge to what the skip connection has.
            x = x[:, jnp.arange(height) * h // height][:, :, jnp.arange(width) * w // width]
        return self.conv(x)
