"""Image quality metrics: distances of distributions, edges, pixels, edits. NumPy in float64, on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

NEIGHBORS = 3
"""Which nearest neighbor of an image bounds what counts as like it, for precision and recall."""


def fid(first: Float[np.ndarray, "m d"], second: Float[np.ndarray, "n d"]) -> float:
    """The Fréchet distance of two sets of features, modeled as Gaussians (Heusel et al., 2017, equation 6).

    ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)``. With Σ = AᵀA, where A are the centered features over √(n − 1), the
    eigenvalues of Σ₁Σ₂ are the squared singular values of A₁A₂ᵀ: this avoids the root of a rank-deficient matrix.

    Args:
      first: features, one row per image; at least two.
      second: features of the other set, one row per image; the metric is symmetric.

    Raises:
      ValueError: if there are fewer than two rows.
    """
    means, roots = zip(_gaussian(first), _gaussian(second), strict=True)
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * overlap)


def _gaussian(features: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "r d"]]:
    """The mean, and A with AᵀA the covariance."""
    features = _checked(features)
    mean = features.mean(axis=0)
    root = (features - mean) / np.sqrt(len(features) - 1)
    if len(root) > root.shape[1]:
        root = np.asarray(np.linalg.qr(root, mode="r"))  # the same AᵀA with fewer rows
    return mean, root


def kid(first: Float[np.ndarray, "m d"], second: Float[np.ndarray, "n d"]) -> float:
    """The squared maximum mean discrepancy for the kernel (xᵀy/d + 1)³ (Bińkowski et al., 2018, equation 4).

    The unbiased estimate, which can be slightly negative; over all images at once instead of random subsets.

    Args:
      first: features, one row per image; at least two.
      second: features of the other set, one row per image; the metric is symmetric.

    Raises:
      ValueError: if there are fewer than two rows.
    """
    first, second = _checked(first), _checked(second)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def _checked(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    if len(features) < 2:
        raise ValueError(f"a distribution of {len(features)} pictures has no spread: give at least two.")
    return features.astype(np.float64)


def precision_recall(
    generated: Float[np.ndarray, "m d"], real: Float[np.ndarray, "n d"], neighbors: int = NEIGHBORS
) -> tuple[float, float]:
    """How many generated images look real, and how much of the real images' variety is generated.

    Kynkäänniemi et al., 2019, equations 1 and 2: an image is within a set if it is no further from one of its members
    than that member's k-th nearest neighbor in the set.

    Args:
      generated: features, one row per image; more than ``neighbors``.
      real: features of the real images.
      neighbors: k.

    Raises:
      ValueError: if there are too few rows.
    """
    if min(len(generated), len(real)) <= neighbors:
        raise ValueError(f"precision and recall with {neighbors} neighbors need at least {neighbors + 1} pictures.")
    sets = _checked(generated), _checked(real)
    between = _squared_distances(*sets)
    # A row's own distance, zero, is the first.
    radii = [np.sort(_squared_distances(x, x), axis=1)[:, neighbors] for x in sets]
    precision = (between <= radii[1][None, :]).any(axis=1).mean()
    recall = (between <= radii[0][:, None]).any(axis=0).mean()
    return float(precision), float(recall)


def _squared_distances(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m n"]:
    norms = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :]
    distances = np.maximum(norms - 2 * x @ y.T, 0)
    if x is y:
        np.fill_diagonal(distances, 0)
    return distances


def edge_f1(
    edges: Bool[np.ndarray, "n h w"], wanted: Bool[np.ndarray, "n h w"], tolerance: int = 1
) -> Float[np.ndarray, " n"]:
    """How well edges are placed: the harmonic mean of precision and recall, per image.

    Args:
      edges: the images' edges, see `codi_jax.io.images.canny`.
      wanted: the conditions' edges.
      tolerance: by how many pixels, including diagonals, an edge may be off and still count.

    Returns:
      In [0, 1]; 1 if there are no edges and none were wanted.
    """
    axes = (1, 2)
    found, hit = edges.sum(axes), (edges & _dilate(wanted, tolerance)).sum(axes)
    due, covered = wanted.sum(axes), (wanted & _dilate(edges, tolerance)).sum(axes)
    precision, recall = hit / np.maximum(found, 1), covered / np.maximum(due, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return np.where((found == 0) & (due == 0), 1.0, f1)


def _dilate(mask: Bool[np.ndarray, "n h w"], radius: int) -> Bool[np.ndarray, "n h w"]:
    _, h, w = mask.shape
    padded = np.pad(mask, ((0, 0), (radius, radius), (radius, radius)))
    steps = range(2 * radius + 1)
    return np.any([padded[:, i : i + h, j : j + w] for i in steps for j in steps], axis=0)


def psnr(pictures: UInt8[np.ndarray, "n h w c"], wanted: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, " n"]:
    """The peak signal-to-noise ratio of each image in dB: 10 log₁₀(255² / mean squared error); infinite if equal."""
    error = ((pictures.astype(np.float64) - wanted.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def preservation(
    outputs: UInt8[np.ndarray, "n h w c"],
    inputs: UInt8[np.ndarray, "n h w c"],
    wanted: UInt8[np.ndarray, "n h w c"],
    tolerance: int = 8,
) -> Float[np.ndarray, " n"]:
    """How well each edit keeps what it should not change: the PSNR in dB against its input, outside the wanted edit.

    Args:
      outputs: the edited images.
      inputs: the images before the edit.
      wanted: the images that the edit should give.
      tolerance: by how much per channel a pixel of the wanted image may differ from the input and still count as
        outside.

    Returns:
      Infinite if nothing outside has changed; NaN if the edit covers the entire image.
    """
    difference = np.abs(wanted.astype(np.int16) - inputs.astype(np.int16))
    outside = (difference <= tolerance).all(axis=-1)
    error = ((outputs.astype(np.float64) - inputs.astype(np.float64)) ** 2).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (error * outside).sum(axis=(1, 2)) / outside.sum(axis=(1, 2))
        return 10 * np.log10(255**2 / mean)


def edit_success(
    outputs: Num[np.ndarray, "n *shape"],
    variants: Sequence[Num[np.ndarray, "_v *shape"]],
    wanted: Int[np.ndarray, " n"],
) -> Bool[np.ndarray, " n"]:
    """Whether each output is closer to the wanted variant than to any other.

    Args:
      outputs: the images, or their features.
      variants: for each output, all images that could have been made from its input, including the unedited and the
        wanted one.
      wanted: the index of the wanted one.

    Returns:
      False also if another variant is equally close.
    """
    success = np.zeros(len(outputs), bool)
    for i, (output, candidates, index) in enumerate(zip(outputs, variants, wanted, strict=True)):
        difference = candidates.astype(np.float64) - output.astype(np.float64)
        distances = (difference.reshape(len(candidates), -1) ** 2).sum(axis=1)
        success[i] = distances[index] < np.delete(distances, index).min(initial=np.inf)
    return success
