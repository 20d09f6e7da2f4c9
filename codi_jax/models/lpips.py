"""LPIPS: how differently two images look to a classifier (Zhang et al., 2018, arXiv 1801.03924, equation 1).

    d(x, y) = Σ_l mean_hw w_l · (x̂_l − ŷ_l)²

with the feature maps of five layers l of AlexNet or VGG-16, each position's vector scaled to unit length, and weights
w_l that were fitted to people's judgments (version 0.1 of the package ``lpips``).
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codi_jax.models.convolutions import Layers, convolve, max_pool

Backbone = Literal["alex", "vgg"]

# By backbone: the convolutions by their number in torchvision's ``features``, with stride and padding. "M" is a maximum
# over windows, and "*" marks the layers that are compared.
_CONVOLUTIONS: dict[str, tuple[str, ...]] = {
    "alex": ("0 4 2 *", "M", "3 1 2 *", "M", "6 1 1 *", "8 1 1 *", "10 1 1 *"),
    "vgg": (
        *("0 1 1", "2 1 1 *", "M", "5 1 1", "7 1 1 *", "M", "10 1 1", "12 1 1", "14 1 1 *", "M"),
        *("17 1 1", "19 1 1", "21 1 1 *", "M", "24 1 1", "26 1 1", "28 1 1 *"),
    ),
}
_WINDOW = {"alex": 3, "vgg": 2}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
SMALLEST = {"alex": 63, "vgg": 16}
"""Side in pixels of the smallest images that reach the last layer."""


def read_lpips(backbone: Backbone, state_dict: Mapping[str, Any], heads: Mapping[str, Any]) -> dict[str, Any]:
    """The layers from published tensors.

    Args:
      backbone: which classifier.
      state_dict: torchvision's tensors of the classifier, ``features.0.weight`` and so on.
      heads: the tensors of the package ``lpips``, ``lin0.model.1.weight`` and so on.

    Raises:
      KeyError: if a tensor is missing.
      ValueError: if a tensor has another shape than its layer.
    """
    layers: dict[str, Any] = {}
    channels, compared = 3, []
    for step in _CONVOLUTIONS[backbone]:
        if step == "M":
            continue
        number = step.split()[0]
        kernel = np.asarray(state_dict[f"features.{number}.weight"], np.float32)
        bias = np.asarray(state_dict[f"features.{number}.bias"], np.float32)
        if kernel.ndim != 4 or kernel.shape[1] != channels or bias.shape != kernel.shape[:1]:
            raise ValueError(f"features.{number} has the shape {list(kernel.shape)}")
        layers[number] = {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}
        channels = len(kernel)
        compared += [channels] * step.endswith("*")
    for i, width in enumerate(compared):
        head = np.asarray(heads[f"lin{i}.model.1.weight"], np.float32)
        if head.shape != (1, width, 1, 1):
            raise ValueError(f"lin{i} has the shape {list(head.shape)}")
        layers[f"head_{i}"] = jnp.asarray(head[0, :, 0, 0])
    return layers


def lpips(
    layers: Mapping[str, Any], backbone: Backbone, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]
) -> Float[Array, " b"]:
    """The distance of each pair of images.

    Args:
      layers: from `read_lpips`.
      backbone: the same as there.
      x: images in [-1, 1], of at least `SMALLEST` pixels.
      y: images to compare them with, of the same size.
    """
    maps = _feature_maps(layers, backbone, jnp.concatenate([x, y]))
    total = jnp.zeros(len(x))
    for i, features in enumerate(maps):
        unit = features / (jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True)) + _EPSILON)
        first, second = jnp.split(unit, 2)
        total += ((first - second) ** 2 @ layers[f"head_{i}"]).mean(axis=(1, 2))
    return total


def _feature_maps(layers: Layers, backbone: Backbone, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
    x = (images - jnp.asarray(_SHIFT)[None, None, None]) / jnp.asarray(_SCALE)[None, None, None]
    maps = []
    for step in _CONVOLUTIONS[backbone]:
        if step == "M":
            x = max_pool(x, _WINDOW[backbone], 2)
            continue
        number, stride, padding = step.split()[:3]
        x = jax.nn.relu(convolve(layers[number], x, int(stride), [(int(padding), int(padding))] * 2))
        maps += [x] * step.endswith("*")
    return maps
