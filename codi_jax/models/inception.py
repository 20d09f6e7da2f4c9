"""Inception v3 as the Fréchet inception distance uses it: the network of 2015 that TensorFlow published.

Szegedy et al., 2016 (arXiv 1512.00567). The weights are those of the package ``pytorch-fid``
(``pt_inception-2015-12-05-6726825d.pth``), whose network differs from torchvision's in its pooling: averages leave out
what is padded, and the last block takes the maximum. Inference only, so batch normalizations are folded into the
convolutions before them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codi_jax.models.convolutions import Layers, convolve, fold_batch_norm, max_pool, mean_pool

RESOLUTION = 299
"""Side in pixels of the images that the weights were trained on."""
_EPSILON = 1e-3  # of batch normalization

# Of each kind of block, the branches as names of convolutions; those behind a "|" are applied to the same input and
# concatenated, and "s2" is a stride of two without padding.
_A = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
_B = (("branch3x3 s2",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3 s2"))
_C = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
_D = (
    ("branch3x3_1", "branch3x3_2 s2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4 s2"),
)
_E = (
    ("branch1x1",),
    ("branch3x3_1", "branch3x3_2a|branch3x3_2b"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a|branch3x3dbl_3b"),
)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A, "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C, "Mixed_6d": _C,
    "Mixed_6e": _C, "Mixed_7a": _D, "Mixed_7b": _E, "Mixed_7c": _E,
}  # fmt: skip
_HALVING = ("Mixed_6a", "Mixed_7a")  # their last branch is a maximum over windows, without a convolution
_MAXIMUM = "Mixed_7c"


def _names(branches: Sequence[Sequence[str]]) -> list[str]:
    return [name.removesuffix(" s2") for branch in branches for step in branch for name in step.split("|")]


def read_inception(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """The layers from the tensors of ``pytorch-fid``; its classifier is not used.

    Raises:
      KeyError: if a tensor is missing.
    """
    names = [*_STEM]
    for block, branches in _BLOCKS.items():
        names += [f"{block}.{name}" for name in _names(branches)]
        names += [] if block in _HALVING else [f"{block}.branch_pool"]
    return {name: fold_batch_norm(state_dict, f"{name}.conv", f"{name}.bn", _EPSILON) for name in names}


def inception_v3(layers: Layers, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """The features of the Fréchet inception distance: the last feature map, averaged over space.

    Args:
      layers: from `read_inception`.
      images: images in [-1, 1], of `RESOLUTION` pixels.
    """
    x = _conv(layers, "Conv2d_1a_3x3", images, stride=2)
    x = _conv(layers, "Conv2d_2a_3x3", x, padding="VALID")
    x = max_pool(_conv(layers, "Conv2d_2b_3x3", x), 3, 2)
    x = _conv(layers, "Conv2d_3b_1x1", x)
    x = max_pool(_conv(layers, "Conv2d_4a_3x3", x, padding="VALID"), 3, 2)
    for block, branches in _BLOCKS.items():
        x = _block(layers, block, branches, x)
    return x.mean(axis=(1, 2))


def _block(
    layers: Layers, block: str, branches: Sequence[Sequence[str]], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 d"]:
    outputs = [_branch(layers, block, branch, x) for branch in branches]
    if block in _HALVING:
        outputs.append(max_pool(x, 3, 2))
    else:
        pooled = max_pool(x, 3, 1, padding=1) if block == _MAXIMUM else mean_pool(x, 3)
        outputs.append(_conv(layers, f"{block}.branch_pool", pooled))
    return jnp.concatenate(outputs, axis=-1)


def _branch(layers: Layers, block: str, branch: Sequence[str], x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    for step in branch:
        stride = 2 if step.endswith(" s2") else 1
        names = step.removesuffix(" s2").split("|")
        x = jnp.concatenate([_conv(layers, f"{block}.{name}", x, stride) for name in names], axis=-1)
    return x


def _conv(
    layers: Layers, name: str, x: Float[Array, "b h w c"], stride: int = 1, padding: str = "SAME"
) -> Float[Array, "b h2 w2 d"]:
    return jax.nn.relu(convolve(layers[name], x, stride, "VALID" if stride == 2 else padding))
