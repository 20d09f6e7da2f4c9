"""Real images to compare with: a folder of them, or the mean and covariance of their features, as pytorch-fid keeps."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from codi_jax.data.files import Folder
from codi_jax.data.picture_folders import images_in
from codi_jax.evaluation.metrics import Moments
from codi_jax.io.atomic import staged_file
from codi_jax.io.images import open_image


def read_moments(path: Path) -> Moments:
    """The moments in a file of pytorch-fid: ``mu`` and ``sigma``.

    Raises:
      ValueError: if the file does not exist, or holds something else.
    """
    path = path.expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: check --reference.") from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"--reference {path} has no mu and sigma, as pytorch-fid saves them: {error}.") from None
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"--reference {path}: mu and sigma do not fit each other.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"--reference {path} holds NaN or infinity: make it again.")
    return Moments(mean, covariance)


def write_moments(path: Path, moments: Moments) -> None:
    """Writes them as pytorch-fid does."""
    with staged_file(path.expanduser()) as stage, stage.open("wb") as file:
        np.savez_compressed(file, mu=moments.mean, sigma=moments.covariance)


def reference_images(folder: Path, most: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """All images in a folder and below it, in batches of one size.

    Args:
      folder: the folder.
      most: images in a batch.

    Raises:
      ValueError: if there are fewer than two, or a file is not an image.
    """
    folder = folder.expanduser()
    paths = sorted(images_in(Folder(str(folder))))
    if len(paths) < 2:
        raise ValueError(f"--reference {folder} has {len(paths)} images: give a folder with at least two, or an .npz.")
    batch: list[np.ndarray] = []
    for path in paths:
        image = np.asarray(open_image(folder / path))
        if batch and (len(batch) == most or image.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    yield np.stack(batch)
