"""Convolutions, in the form that is fastest on each backend.

On accelerators this is XLA's own, with JAX's gradients. On a CPU, a convolution of few pixels becomes one matrix
product, and the gradients of larger ones are handwritten.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from codi_jax.models.kernels.devices import backend, gathered
from codi_jax.models.kernels.linear_map import linear_map

# On a CPU `convolve` gathers patches for up to this many output pixels of a batch, and from this many channels on. With
# fewer channels a call saves tenths of a millisecond, but its longer program takes 0.3 s more to compile.
_FEW_PIXELS = 256
_MANY_CHANNELS = 64
_NHWC = ("NHWC", "HWIO", "NHWC")
_Pair = tuple[int, int]
_Pads = tuple[_Pair, _Pair]


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_of_group d"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "b h2 w2 d"]:
    """`jax.lax.conv_general_dilated`, or on a CPU an equivalent that is known to be faster.

    XLA's convolution for CPUs splits the work by output pixels; the lowest levels of a UNet have few of them and many
    channels, and there one matrix product over gathered patches is 1.5 to 3 times faster. With few channels, the gain
    is not worth the longer compilation.

    Args:
      x: features.
      kernel: weights, which may be split among devices.
      strides: the windows' strides in pixels.
      padding: pixels of zeros before and after, for height and width.
      lhs_dilation: as in `jax.lax.conv_general_dilated`.
      rhs_dilation: as in `jax.lax.conv_general_dilated`.
      feature_group_count: as in `jax.lax.conv_general_dilated`.
      **options: its other arguments.

    Returns:
      The convolved features.
    """
    kernel = gathered(kernel)
    is_plain = {*lhs_dilation, *rhs_dilation, feature_group_count} == {1}
    if backend() != "cpu" or not is_plain:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, lhs_dilation, rhs_dilation, feature_group_count=feature_group_count, **options
        )
    (b, h, w, _), (kh, kw) = x.shape, kernel.shape[:2]
    keeps_size = tuple(strides) == (1, 1) and [sum(pads) for pads in padding] == [kh - 1, kw - 1]
    is_deep = b * h * w <= _FEW_PIXELS and max(kernel.shape[2:]) >= _MANY_CHANNELS
    if not is_deep or not keeps_size or kh == kw == 1:
        return _convolve_on_cpu(x, kernel, tuple(strides), tuple(padding))
    return _convolve_patches(x, kernel, padding)


def _convolve_patches(x: Array, kernel: Array, padding: Sequence[_Pair]) -> Array:
    """One matrix product over the window of every pixel; the output has as many pixels as ``x``."""
    _, h, w, _ = x.shape
    kh, kw, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(kh) for j in range(kw)], axis=-1)
    return patches @ kernel.reshape(kh * kw * channels, features)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_on_cpu(x: Array, kernel: Array, strides: _Pair, padding: _Pads) -> Array:
    """A convolution whose gradients also use the only axis order that XLA has a CPU kernel for.

    JAX's gradients use others. XLA reorders them, but not inside loops and branches: there, a weight's gradient would
    take 60 times as long.
    """
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


@functools.partial(_convolve_on_cpu.defjvp, symbolic_zeros=True)
def _derivative(strides: _Pair, padding: _Pads, primals: tuple[Array, Array], tangents: Any) -> tuple[Array, Array]:
    """A convolution is linear in the features and in the kernel."""
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve_on_cpu(x, kernel, strides, padding)
    dy = []
    if not isinstance(dx, SymbolicZero):
        dy += linear_map(_of_features, _to_features, (kernel,), (dx,), x.shape[1:3], strides, padding)
    if not isinstance(dkernel, SymbolicZero):
        dy += linear_map(_of_kernel, _to_kernel, (x,), (dkernel,), kernel.shape[:2], strides, padding)
    return y, sum(dy[1:], dy[0]) if dy else jnp.zeros_like(y)


def _of_features(kernel: tuple[Array], x: tuple[Array], _: _Pair, strides: _Pair, padding: _Pads) -> tuple[Array]:
    return (_convolve_on_cpu(*x, *kernel, strides, padding),)


def _of_kernel(x: tuple[Array], kernel: tuple[Array], _: _Pair, strides: _Pair, padding: _Pads) -> tuple[Array]:
    return (_convolve_on_cpu(*x, *kernel, strides, padding),)


def _to_features(kernel: tuple[Array], dy: tuple[Array], sizes: _Pair, strides: _Pair, padding: _Pads) -> tuple[Array]:
    """The gradient by features with these ``sizes``: the kernel flipped, over ``dy`` dilated by the strides."""
    (weight,), (g,) = kernel, dy
    pads = [
        (k - 1 - low, n - ((m - 1) * stride + 1) + low)
        for (low, _), k, m, n, stride in zip(padding, weight.shape[:2], g.shape[1:3], sizes, strides, strict=True)
    ]
    turned = weight[::-1, ::-1].swapaxes(2, 3)
    return (jax.lax.conv_general_dilated(g, turned, (1, 1), pads, lhs_dilation=strides, dimension_numbers=_NHWC),)


def _to_kernel(x: tuple[Array], dy: tuple[Array], taps: _Pair, strides: _Pair, padding: _Pads) -> tuple[Array]:
    """The gradient by a kernel with these ``taps``: windows of ``dy`` over ``x``, with channels and batch swapped."""
    (features,), (g,) = x, dy
    pads = [
        (low, k - 1 + (m - 1) * stride + 1 - n - low)
        for (low, _), k, m, n, stride in zip(padding, taps, g.shape[1:3], features.shape[1:3], strides, strict=True)
    ]
    by_channel, as_kernel = features.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    out = jax.lax.conv_general_dilated(
        by_channel, as_kernel, (1, 1), pads, rhs_dilation=strides, dimension_numbers=_NHWC
    )
    return (out.transpose(1, 2, 0, 3),)
