"""Adam with its moments in 8 bits (Dettmers et al., 2022: 8-bit optimizers via block-wise quantization).

Each moment is split into blocks of 256 numbers. A block is divided by its largest magnitude, and each of its numbers is
replaced by the nearest of 256 values of the *dynamic* data type, whose steps are fine near zero: see `dynamic_map`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

BLOCK_SIZE = 256
MIN_SIZE = 4096
"""Smaller tensors, such as biases and norms, keep float32 moments (as in the authors' bitsandbytes)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A tensor as 8-bit codes; the last block is padded with zeros.

    Attributes:
      codes: indices into the `dynamic_map`.
      scales: the largest magnitude of each block, float32.
    """

    codes: UInt8[Array, "blocks 256"] | Any
    scales: Float[Array, " blocks"] | Any


class Adam8BitState(NamedTuple):
    """The state of `scale_by_adam_8bit`: the number of updates, and the moments, quantized or float32."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


def dynamic_map(signed: bool) -> Float[np.ndarray, "256"]:
    """The values of the dynamic data type, ascending in [-1, 1] or [0, 1] (Dettmers et al., 2022, section 1.3 and 2.2).

    A code is a sign, then zeros that count decades down from 1, then an indicator bit, then a fraction: the fewer
    decades, the more fraction bits. A fraction of k bits is the middle of one of 2^k equal parts of its decade, from
    0.1 to 1. Unsigned codes have one more fraction bit. 0 and 1 are two additional codes.
    """
    bits = 7
    values = [np.array([0.0, 1.0])]
    for decade in range(bits):
        fraction_bits = bits - 1 - decade + (not signed)
        edges = np.linspace(0.1, 1, 2**fraction_bits + 1)
        middles = 10.0**-decade * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values)).astype(np.float32)


_SIGNED, _UNSIGNED = dynamic_map(True), dynamic_map(False)


def quantize(x: Float[Array, "*shape"], signed: bool) -> Quantized:
    """Quantizes a tensor to the nearest codes.

    An unsigned code of a positive number is never 0: Adam divides by the root of its second moment, and if that were
    rounded to 0, a nonzero first moment would give a step of m/ε.

    Args:
      x: the tensor, float32.
      signed: whether it has negative numbers.
    """
    values = _SIGNED if signed else _UNSIGNED
    blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    normalized = blocks / jnp.where(scales > 0, scales, 1.0)[:, None]
    middles = jnp.asarray((values[:-1] + values[1:]) / 2)
    codes = jnp.searchsorted(middles, normalized, method="scan_unrolled")
    if not signed:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), codes)
    return Quantized(codes.astype(jnp.uint8), scales)


def dequantize(quantized: Quantized, shape: tuple[int, ...], signed: bool) -> Float[Array, "*shape"]:
    """The tensor with this shape, float32; the inverse of `quantize`."""
    values = jnp.asarray(_SIGNED if signed else _UNSIGNED)
    blocks = values[quantized.codes] * quantized.scales[:, None]
    return blocks.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with the moments of tensors of 4,096 numbers or more in 8 bits between steps.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
    """

    def init(params: Any) -> Adam8BitState:
        mu, nu = (jax.tree.map(partial(_zeros, signed=signed), params) for signed in (True, False))
        return Adam8BitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(partial(_load, signed=True), updates, state.mu)
        nu = jax.tree.map(partial(_load, signed=False), updates, state.nu)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g**2, updates, nu)
        c1, c2 = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        mu = jax.tree.map(partial(_store, signed=True), mu)
        nu = jax.tree.map(partial(_store, signed=False), nu)
        return updates, Adam8BitState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _store(moment: Float[Array, "*shape"], signed: bool) -> Quantized | Float[Array, "*shape"]:
    return moment if moment.size < MIN_SIZE else quantize(moment, signed)


def _load(like: Array, stored: Quantized | Array, signed: bool) -> Float[Array, "*shape"]:
    return dequantize(stored, like.shape, signed) if isinstance(stored, Quantized) else stored


def _zeros(like: Array, signed: bool) -> Quantized | Float[Array, "*shape"]:
    return _store(jnp.zeros(like.shape, jnp.float32), signed)
