"""EfficientNet-Lite0, a small ImageNet classifier, as a source of image features for metrics.

Tan & Le, 2019 (arXiv 1905.11946), in the Lite form of TensorFlow's repository: no squeeze-and-excitation, and ReLU6
instead of swish. Inference only, so batch normalizations are folded into the convolutions before them.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from codi_jax.models.convolutions import Layer, Layers, convolve, fold_batch_norm

RESOLUTION = 224
"""Side in pixels of the images that the published weights were trained on."""

# (blocks, kernel size, stride of the first, expansion, channels) of the seven stages.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_EPSILON = 1e-3  # of batch normalization


class _Block(NamedTuple):
    """An inverted bottleneck."""

    name: str
    kernel_size: int
    stride: int
    expands: bool
    adds_input: bool


def _blocks() -> Iterator[_Block]:
    index, channels = 0, 32
    for count, kernel_size, stride, expansion, features in _STAGES:
        for i in range(count):
            first = stride if i == 0 else 1
            yield _Block(f"_blocks.{index}", kernel_size, first, expansion != 1, first == 1 and channels == features)
            index, channels = index + 1, features


def _layers() -> Iterator[tuple[str, str]]:
    """(convolution, batch normalization behind it)."""
    yield "_conv_stem", "_bn0"
    for block in _blocks():
        if block.expands:
            yield f"{block.name}._expand_conv", f"{block.name}._bn0"
        yield f"{block.name}._depthwise_conv", f"{block.name}._bn1"
        yield f"{block.name}._project_conv", f"{block.name}._bn2"
    yield "_conv_head", "_bn1"


def fold_batch_norms(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Folds the batch normalization behind each convolution into it.

    Args:
      state_dict: arrays, or what NumPy reads as such, by their PyTorch names: ``_conv_stem.weight`` (OIHW),
        ``_bn0.running_mean``, ``_blocks.0._depthwise_conv.weight`` and so on. The classifier ``_fc`` is not used.

    Raises:
      KeyError: if a tensor is missing.
    """
    return {conv: fold_batch_norm(state_dict, conv, norm, _EPSILON) for conv, norm in _layers()}


def efficientnet_lite0(layers: Layers, images: Float[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
    """The classifier's input features: the last feature map, averaged over space.

    Args:
      layers: from `fold_batch_norms`.
      images: images in [0, 1], of `RESOLUTION` pixels for the published weights.
    """
    x = _relu6(_conv(layers["_conv_stem"], (images * 255 - 127) / 128, stride=2))
    for block in _blocks():
        x = _apply_block(layers, block, x)
    return _relu6(_conv(layers["_conv_head"], x)).mean(axis=(1, 2))


def _apply_block(layers: Layers, block: _Block, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    y = _relu6(_conv(layers[f"{block.name}._expand_conv"], x)) if block.expands else x
    y = _relu6(_depthwise(layers[f"{block.name}._depthwise_conv"], y, block.stride))
    y = _conv(layers[f"{block.name}._project_conv"], y)
    return x + y if block.adds_input else y


def _relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(x, 0, 6)


def _conv(layer: Layer, x: Float[Array, "b h w c"], stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    return convolve(layer, x, stride, "SAME")  # TensorFlow's padding, which is asymmetric if the stride is 2


def _depthwise(layer: Layer, x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b h2 w2 c"]:
    # One multiplication per tap: XLA's depthwise convolution takes seven times as long on a CPU.
    size, sides = layer["kernel"].shape[0], [-(-side // stride) for side in x.shape[1:3]]
    spans = [(side - 1) * stride + 1 for side in sides]
    padding = [max(span + size - 1 - side, 0) for span, side in zip(spans, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in padding), (0, 0)))
    y = layer["bias"][None, None, None]
    for i, j in itertools.product(range(size), repeat=2):
        y += x[:, i : i + spans[0] : stride, j : j + spans[1] : stride] * layer["kernel"][i, j, 0][None, None, None]
    return y
