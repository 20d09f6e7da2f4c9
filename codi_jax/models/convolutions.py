"""Layers of published classifiers, for inference: convolutions with folded batch normalizations, and pooling."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Layer = Mapping[str, Array]
"""``kernel`` (HWIO) and ``bias``."""
Layers = Mapping[str, Layer]
"""Layers by name."""


def fold_batch_norm(state_dict: Mapping[str, Any], conv: str, norm: str, epsilon: float) -> dict[str, Array]:
    """The convolution that equals one without a bias and the batch normalization behind it.

    Args:
      state_dict: arrays, or what NumPy reads as such, by their PyTorch names.
      conv: the convolution's name; its ``weight`` is OIHW.
      norm: the normalization's name.
      epsilon: the constant that is added to the variance.

    Raises:
      KeyError: if a tensor is missing.
    """
    names = (*(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")), f"{conv}.weight")
    weight, bias, mean, variance, kernel = (np.asarray(state_dict[name], np.float32) for name in names)
    scale = weight / np.sqrt(variance + epsilon)
    kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias - mean * scale)}


def convolve(
    layer: Layer, x: Float[Array, "b h w c"], stride: int = 1, padding: str | Sequence[tuple[int, int]] = "SAME"
) -> Float[Array, "b h2 w2 d"]:
    """The convolution, with padding by TensorFlow's names, or in pixels before and behind each axis."""
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + layer["bias"][None, None, None]


def max_pool(x: Float[Array, "b h w c"], size: int, stride: int, padding: int = 0) -> Float[Array, "b h2 w2 c"]:
    """The largest value of each window."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)


def mean_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """The mean of the pixels around each one that are inside the image."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, size, size, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(side), np.ones(size), "same") for side in x.shape[1:3])
    return sums / jnp.asarray(np.outer(rows, columns)[None, :, :, None], x.dtype)
