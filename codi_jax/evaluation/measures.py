"""The metrics of ``--metrics``: what is observed of each image, and what all observations amount to.

An observation is an array with one row per image: features, or numbers. It is made where the images are made, some at
a time, and kept instead of them; a metric is a function of the observations of all images.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8

from codi_jax.cli.progress import Progress
from codi_jax.evaluation.arguments import Args
from codi_jax.evaluation.attributes import READER, Reader, shown_shares
from codi_jax.evaluation.encoders import Clip, dino, lpips_distances
from codi_jax.evaluation.features import Features, inception_features, load_features
from codi_jax.evaluation.metrics import (
    NEIGHBORS,
    Moments,
    directional_similarity,
    edge_f1,
    edit_success,
    fid,
    kid,
    moments,
    precision_recall,
    preservation,
    psnr,
)
from codi_jax.evaluation.reference import read_moments, reference_images, write_moments
from codi_jax.evaluation.samples import Data, Samples
from codi_jax.io.images import canny

Pictures = UInt8[np.ndarray, "n h w 3"]
Observe = Callable[[Pictures, Samples], Num[np.ndarray, "n *_"] | None]
"""One row per image; ``None`` if the samples lack what it needs, as those of a model without a ControlNet do."""
Observed = Mapping[str, np.ndarray]

_MOST_PSNR = 100.0  # dB, for equal images
_BATCH = 100  # real images at a time


@dataclass(frozen=True)
class Truth:
    """What the real images' features are: the features, or only their moments."""

    features: Float[np.ndarray, "n d"] | None
    moments: Moments | None = None


@dataclass(frozen=True)
class Measures:
    """Metrics with everything that they need.

    Attributes:
      observers: what is observed, by name.
      summaries: for each metric of ``--metrics`` the observation, and what it amounts to, by the keys of
        `codi_jax.evaluation.results.METRICS`.
    """

    observers: Mapping[str, Observe]
    summaries: Mapping[str, tuple[str, Callable[[np.ndarray], Mapping[str, float]]]]

    def observe(self, pictures: Pictures, samples: Samples) -> dict[str, np.ndarray]:
        """All observations of some images that the samples allow."""
        found = {name: observe(pictures, samples) for name, observe in self.observers.items()}
        return {name: each for name, each in found.items() if each is not None}

    def summarize(self, observed: Observed) -> dict[str, float]:
        """The metrics of all images."""
        values: dict[str, float] = {}
        for name, summary in self.summaries.values():
            if name in observed:
                values |= summary(observed[name])
        return values


def build_measures(args: Args, data: Data) -> Measures:
    """The metrics that the flags ask for; without ``--metrics`` all that the data and the other flags allow.

    Raises:
      ValueError: naming what a metric of ``--metrics`` lacks.
    """
    probe = data.read([0])
    lacking = {name: metric.lacks(args, probe) for name, metric in _METRICS.items()}
    for name in args.metrics:
        if lacking[name] is not None:
            raise ValueError(f"--metrics {name} needs {lacking[name]}.")
    chosen = args.metrics or tuple(name for name in _METRICS if lacking[name] is None)
    count = data.count
    if "precision_recall" in chosen and count <= NEIGHBORS:
        if "precision_recall" in args.metrics:
            raise ValueError(f"--metrics precision_recall needs at least {NEIGHBORS + 1} pictures.")
        chosen = tuple(name for name in chosen if name != "precision_recall")
    observed = {_METRICS[name].observed for name in chosen}
    if args.save_reference is not None and ("inception" not in observed or _has_only_moments(args)):
        raise ValueError("--save_reference needs fid, kid or precision_recall, and the real images themselves.")
    observers = {name: _OBSERVERS[name](args) for name in dict.fromkeys(_METRICS[each].observed for each in chosen)}
    truths = {name: _truth(name, observers[name], args, data) for name in observers if name in _FEATURES}
    summaries = {}
    for name in chosen:
        metric = _METRICS[name]
        summary = (
            functools.partial(metric.summary, truths[metric.observed]) if metric.observed in truths else metric.summary
        )
        summaries[name] = (metric.observed, summary)
    return Measures(observers, summaries)


# ---- What is observed


def _of_features(features: Features) -> Observe:
    return lambda pictures, samples: features(pictures)


def _lite(args: Args) -> Observe:
    return _of_features(load_features())


def _inception(args: Args) -> Observe:
    assert args.inception_weights is not None
    return _of_features(inception_features(args.inception_weights, args.fid_resizing))


def _clip(args: Args) -> Observe:
    """The cosines of each image with its caption, with the image before the edit, and of both changes."""
    clip = Clip(args.clip or "")

    def observe(pictures: Pictures, samples: Samples) -> Float[np.ndarray, "n 3"]:
        cosines = np.full((len(pictures), 3), np.nan)
        images = clip.images(pictures)
        if samples.inputs is None:
            cosines[:, 0] = (images * clip.texts(samples.prompts)).sum(axis=1)
            return cosines
        before = clip.images(samples.inputs)
        cosines[:, 1] = (images * before).sum(axis=1)
        if samples.captions:
            texts = [clip.texts([pair[i] for pair in samples.captions]) for i in (0, 1)]
            cosines[:, 0] = (images * texts[1]).sum(axis=1)
            cosines[:, 2] = directional_similarity((before, images), (texts[0], texts[1]))
        return cosines

    return observe


def _dino(args: Args) -> Observe:
    features = dino(args.dino or "")

    def observe(pictures: Pictures, samples: Samples) -> Float[np.ndarray, " n"] | None:
        return None if samples.truth is None else (features(pictures) * features(samples.truth)).sum(axis=1)

    return observe


def _lpips(args: Args) -> Observe:
    assert args.lpips_weights is not None
    distances = lpips_distances(args.lpips_weights, args.lpips_heads)
    return lambda pictures, samples: None if samples.truth is None else distances(pictures, samples.truth)


def _attributes(args: Args) -> Observe:
    """The share of attributes; whether it is of edits, in a second column."""
    reader = Reader()

    def observe(pictures: Pictures, samples: Samples) -> Float[np.ndarray, "n 2"]:
        shares = shown_shares(reader.read(pictures), samples.looks)
        return np.stack([shares, np.full(len(shares), samples.inputs is not None)], axis=1)

    return observe


def _are_edges(samples: Samples) -> bool:
    """Whether the conditions are edges, and not images such as those for super-resolution: black and white alone."""
    return samples.conditions is not None and bool(np.isin(samples.conditions, (0, 255)).all())


def _edges(args: Args) -> Observe:
    def observe(pictures: Pictures, samples: Samples) -> Float[np.ndarray, " n"] | None:
        if not _are_edges(samples):
            return None
        assert samples.conditions is not None
        return edge_f1(np.stack([canny(each) for each in pictures]) > 0, samples.conditions[..., 0] > 127)

    return observe


def _edits(args: Args) -> Observe:
    def observe(pictures: Pictures, samples: Samples) -> Num[np.ndarray, " n"] | None:
        if not samples.variants:
            return None
        return edit_success(pictures, samples.variants, np.asarray(samples.wanted)).astype(np.float64)

    return observe


def _kept(args: Args) -> Observe:
    def observe(pictures: Pictures, samples: Samples) -> Float[np.ndarray, " n"] | None:
        if samples.inputs is None or samples.truth is None:
            return None
        return np.minimum(preservation(pictures, samples.inputs, samples.truth), _MOST_PSNR)

    return observe


def _pixels(args: Args) -> Observe:
    return lambda pictures, samples: (
        None if samples.truth is None else np.minimum(psnr(pictures, samples.truth), _MOST_PSNR)
    )


_OBSERVERS: dict[str, Callable[[Args], Observe]] = {
    "attributes": _attributes, "inception": _inception, "lite": _lite, "clip": _clip, "dino": _dino, "lpips": _lpips,
    "edges": _edges, "edits": _edits, "kept": _kept, "pixels": _pixels,
}  # fmt: skip
_FEATURES = ("inception", "lite")


# ---- The real images' features


def _truth(name: str, observe: Observe, args: Args, data: Data) -> Truth:
    """The features of the reference, or of the data's own images."""
    if args.reference is not None and _has_only_moments(args):
        return Truth(None, read_moments(args.reference))
    batches, total = _real_images(args, data), data.count if args.reference is None else None
    found = []
    with Progress("measuring the real images", total) as progress:
        for batch in batches:
            found.append(np.asarray(observe(batch, Samples([]))))
            progress.advance(len(batch))
    features = np.concatenate(found)
    if name == "inception" and args.save_reference is not None:
        write_moments(args.save_reference, moments(features))
    return Truth(features)


def _has_only_moments(args: Args) -> bool:
    return args.reference is not None and args.reference.suffix == ".npz"


def _real_images(args: Args, data: Data) -> Iterator[Pictures]:
    if args.reference is not None:
        yield from reference_images(args.reference, _BATCH)
        return
    for start in range(0, data.count, _BATCH):
        truth = data.read(range(start, min(start + _BATCH, data.count))).truth
        assert truth is not None
        yield truth


# ---- What the observations amount to


def _fid(key: str) -> Callable[[Truth, np.ndarray], dict[str, float]]:
    def summary(truth: Truth, found: np.ndarray) -> dict[str, float]:
        real = truth.features if truth.features is not None else truth.moments
        assert real is not None
        return {key: fid(found, real)}

    return summary


def _kid(key: str) -> Callable[[Truth, np.ndarray], dict[str, float]]:
    def summary(truth: Truth, found: np.ndarray) -> dict[str, float]:
        assert truth.features is not None
        return {key: 1000 * kid(found, truth.features)}

    return summary


def _precision_recall(truth: Truth, found: np.ndarray) -> dict[str, float]:
    assert truth.features is not None
    precision, recall = precision_recall(found, truth.features)
    return {"precision": precision, "recall": recall}


def _accuracy(found: Float[np.ndarray, "n 2"]) -> dict[str, float]:
    values = {"attribute_accuracy": float(found[:, 0].mean())}
    return values | ({"edit_accuracy": float((found[:, 0] == 1).mean())} if found[:, 1].any() else {})


def _mean(key: str, column: int | None = None, scale: float = 1.0) -> Callable[[np.ndarray], dict[str, float]]:
    """The mean over all images to which it applies."""

    def summary(found: np.ndarray) -> dict[str, float]:
        values = found if column is None else found[:, column]
        return {} if np.isnan(values).all() else {key: scale * float(np.nanmean(values))}

    return summary


def _clip_score(found: np.ndarray) -> dict[str, float]:
    """100 max(cos, 0), as torchmetrics has it, without the factor 2.5 of Hessel et al. (2021)."""
    values = found[:, 0]
    return {} if np.isnan(values).all() else {"clip_score": 100 * float(np.nanmean(values.clip(0)))}


# ---- The metrics

Lacks = Callable[[Args, Samples], str | None]


def _lacks(
    flag: str | None = None, sample: Callable[[Samples], Any] | None = None, what: str = "", *, real: str | None = None
) -> Lacks:
    """Says what is missing, or ``None``.

    Args:
      flag: the flag that names the network's file.
      sample: the part of the samples that it needs.
      what: how that part is called.
      real: what of the real images is needed: ``"features"`` or ``"moments"``.
    """

    def lacks(args: Args, samples: Samples) -> str | None:
        if flag is not None and getattr(args, flag) is None:
            return f"--{flag}"
        if sample is not None and not _has(sample(samples)):
            return what
        if real is None:
            return None
        if args.reference is None:
            return None if samples.truth is not None else "real images: --data with images, or --reference"
        if _has_only_moments(args) and (real == "features" or flag is None):
            return "a folder of images as --reference: mean and covariance of Inception features do not suffice"
        return None

    return lacks


def _has(part: Any) -> bool:
    return part is not None and len(part) > 0


def _lacks_reader(args: Args, samples: Samples) -> str | None:
    if not samples.looks:
        return "data with attributes, as dataset_tools/avatars.py writes it"
    return None if READER.is_dir() else f"the reader of attributes in {READER}"


@dataclass(frozen=True)
class _Metric:
    """One name of ``--metrics``.

    Attributes:
      observed: the observation it is made of.
      summary: what the observations amount to; the first argument of metrics on features is the `Truth`.
      lacks: what is missing to measure it.
    """

    observed: str
    summary: Callable[..., Mapping[str, float]]
    lacks: Lacks


_ON_INCEPTION = functools.partial(_lacks, "inception_weights")
_IN_DATA: Sequence[Any] = (lambda s: s.truth, "data with the real images")
_EDGES: Sequence[Any] = (lambda s: s.conditions if _are_edges(s) else None, "data with edges as conditions")
_INPUTS: Sequence[Any] = (lambda s: s.inputs, "data of edits")
_PAIRS: Sequence[Any] = (lambda s: s.captions, "edits with the columns original_prompt and edited_prompt")

_METRICS: dict[str, _Metric] = {
    "attributes": _Metric("attributes", _accuracy, _lacks_reader),
    "fid": _Metric("inception", _fid("fid"), _ON_INCEPTION(real="moments")),
    "kid": _Metric("inception", _kid("kid"), _ON_INCEPTION(real="features")),
    "precision_recall": _Metric("inception", _precision_recall, _ON_INCEPTION(real="features")),
    "fid_lite": _Metric("lite", _fid("fid_lite"), _lacks(real="moments")),
    "kid_lite": _Metric("lite", _kid("kid_lite"), _lacks(real="features")),
    "clip_score": _Metric("clip", _clip_score, _lacks("clip")),
    "clip_image": _Metric("clip", _mean("clip_image", 1), _lacks("clip", *_INPUTS)),
    "clip_direction": _Metric("clip", _mean("clip_direction", 2), _lacks("clip", *_PAIRS)),
    "dino": _Metric("dino", _mean("dino"), _lacks("dino", *_IN_DATA)),
    "lpips": _Metric("lpips", _mean("lpips"), _lacks("lpips_weights", *_IN_DATA)),
    "edge_f1": _Metric("edges", _mean("edge_f1"), _lacks(None, *_EDGES)),
    "edit_success": _Metric("edits", _mean("edit_success"), _lacks(None, lambda s: s.variants, "edits with variants")),
    "preservation": _Metric("kept", _mean("preservation"), _lacks(None, *_INPUTS)),
    "psnr": _Metric("pixels", _mean("psnr"), _lacks(None, *_IN_DATA)),
}
