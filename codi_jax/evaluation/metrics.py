"""Image quality metrics: distances of distributions, edges, pixels, edits. NumPy in float64, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

NEIGHBORS = 3
"""Which nearest neighbor of an image bounds what counts as like it, for precision and recall."""
_BLOCK = 1000  # rows that are compared with all others at a time


@dataclass(frozen=True)
class Moments:
    """The mean and covariance of a set of features: all that FID needs of it."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and unbiased covariance; raises `ValueError` for fewer than two rows."""
    features = _checked(features)
    return Moments(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def fid(first: Float[np.ndarray, "m d"], second: Float[np.ndarray, "n d"] | Moments) -> float:
    """The Fréchet distance of two sets of features, modeled as Gaussians (Heusel et al., 2017, equation 6).

    ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)``. With Σ = AᵀA, where A are the centered features over √(n − 1), the
    eigenvalues of Σ₁Σ₂ are those of A₁Σ₂A₁ᵀ, and the squared singular values of A₁A₂ᵀ: this avoids the root of a
    rank-deficient matrix.

    Args:
      first: features, one row per image; at least two.
      second: features of the other set, one row per image, or their moments; the metric is symmetric.

    Raises:
      ValueError: if there are fewer than two rows, or the moments are of features of another size.
    """
    mean, root = _gaussian(first)
    if isinstance(second, Moments):
        if second.mean.shape != mean.shape:
            raise ValueError(f"moments of {len(second.mean)} features, but there are {len(mean)}.")
        other_mean, spread = second.mean, np.trace(second.covariance)
        overlaps = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root.T).clip(0))
    else:
        other_mean, other_root = _gaussian(second)
        spread = (other_root**2).sum()
        overlaps = np.linalg.svd(root @ other_root.T, compute_uv=False)
    return float(((mean - other_mean) ** 2).sum() + (root**2).sum() + spread - 2 * overlaps.sum())


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

    def total(x: np.ndarray, y: np.ndarray) -> float:
        """The sum of the kernel over all pairs, some rows at a time."""
        return float(sum(((rows @ y.T / x.shape[1] + 1) ** 3).sum() for rows in _blocks(x)))

    def within(x: np.ndarray) -> float:
        own = ((np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3).sum()  # pairs of a row with itself
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return within(first) + within(second) - 2 * total(first, second) / (len(first) * len(second))


def _blocks(x: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "_m d"]]:
    """The rows, a thousand at a time: products of 30,000 rows with each other would not fit into memory."""
    return [x[start : start + _BLOCK] for start in range(0, len(x), _BLOCK)]


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
    radii = [np.concatenate([_radii(rows, x, neighbors) for rows in _blocks(x)]) for x in sets]
    found, covered = [], np.zeros(len(sets[1]), bool)
    for start, rows in zip(range(0, len(generated), _BLOCK), _blocks(sets[0]), strict=True):
        between = _squared_distances(rows, sets[1])
        found.append((between <= radii[1][None, :]).any(axis=1))
        covered |= (between <= radii[0][start : start + len(rows), None]).any(axis=0)
    return float(np.concatenate(found).mean()), float(covered.mean())


def _radii(rows: Float[np.ndarray, "m d"], x: Float[np.ndarray, "n d"], neighbors: int) -> Float[np.ndarray, " m"]:
    """For some rows of x, the squared distance to their nearest neighbor of this number."""
    # A row's own distance, zero but for rounding, is the first.
    return np.partition(_squared_distances(rows, x), neighbors, axis=1)[:, neighbors]


def _squared_distances(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m n"]:
    norms = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :]
    return np.maximum(norms - 2 * x @ y.T, 0)


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


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The vectors at length one; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def directional_similarity(
    images: tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]],
    texts: tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "m d"]],
) -> Float[np.ndarray, " n"]:
    """Whether images change as their captions do: cos(E(b) − E(a), E(caption of b) − E(caption of a)).

    Gal et al., 2021, in CLIP's space, as Brooks et al. (2023, section 3.1.2) use it for edits.

    Args:
      images: unit vectors of the images before and after.
      texts: unit vectors of the captions before and after, one for each image, or one for all.
    """
    changes = unit(images[1] - images[0]), unit(texts[1] - texts[0])
    return (changes[0] * changes[1]).sum(axis=1)
