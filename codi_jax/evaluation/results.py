"""What an evaluation measured: results and their metrics, as JSON and as a table in Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from codi_jax.cli.messages import counted

_SIGNIFICANCE = 0.05
_JUDGED = ("edit_accuracy", "attribute_accuracy", "fid", "edit_success", "fid_lite", "edge_f1", "clip_score")
_CLOSE = 0.95  # of the reference's quality, as of which the faster model is preferred


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    better: str
    digits: int
    meaning: str
    ranks: bool = True  # whether the best value is the best model


METRICS = {
    "attribute_accuracy": Metric("Attributes", "higher", 3, "share of the wanted attributes that the image shows"),
    "edit_accuracy": Metric("Edits", "higher", 3, "share of images that show the edit, with all else as it was"),
    "fid": Metric("FID", "lower", 2, "Fréchet distance to the real images, on Inception features"),
    "kid": Metric("KID ×10³", "lower", 3, "kernel distance on the same features, unbiased"),
    "precision": Metric("Precision", "higher", 3, "share of images among the real ones, on the same features"),
    "recall": Metric("Recall", "higher", 3, "share of real images among the generated ones, on the same features"),
    "clip_score": Metric(
        "CLIP score", "higher", 2, "100 times the cosine of the image and its caption in CLIP's space"
    ),
    "clip_direction": Metric("CLIP direction", "higher", 3, "cosine of the image's change and its captions' change"),
    "clip_image": Metric(
        "CLIP image", "higher", 3, "cosine with the image before the edit, which no edit at all maximizes", ranks=False
    ),
    "dino": Metric("DINO", "higher", 3, "cosine with the real image in DINO's space"),
    "lpips": Metric("LPIPS", "lower", 3, "perceptual distance to the real image"),
    "fid_lite": Metric("FID-lite", "lower", 2, "Fréchet distance to the real images, on EfficientNet-Lite0 features"),
    "kid_lite": Metric("KID-lite ×10³", "lower", 3, "kernel distance on the same features, unbiased"),
    "edge_f1": Metric("Edge F1", "higher", 3, "canny edges of the image against the condition, to within a pixel"),
    "edit_success": Metric("Edit success", "higher", 3, "share of images closest to the wanted variant"),
    "preservation": Metric(
        "Kept dB",
        "higher",
        2,
        "PSNR against the image before the edit, outside the edit; no edit at all maximizes it",
        ranks=False,
    ),
    "psnr": Metric(
        "PSNR dB",
        "higher",
        2,
        "against the real image with the same text; it favors blur over misplaced detail",
        ranks=False,
    ),
    "seconds": Metric("s / image", "lower", 4, "without compilation", ranks=False),
}
"""The metrics, by their keys in ``metrics.json``, in the order of the table."""


@dataclass(frozen=True)
class Result:
    """The measurements of a model at a number of steps.

    Attributes:
      model: the model's name.
      steps: the sampler's steps.
      sampler: the sampler's name.
      guidance_scale: the text's scale.
      values: one number per seed for each metric.
      pictures: the images that the report shows.
      training_steps: the training steps after which the model was exported; ``None`` for the finished model.
    """

    model: str
    steps: int
    sampler: str
    guidance_scale: float
    values: Mapping[str, Sequence[float]]
    pictures: UInt8[np.ndarray, "r h w 3"]
    training_steps: int | None = None

    @property
    def name(self) -> str:
        """The model, and for an export during training the number of training steps."""
        return self.model if self.training_steps is None else f"{self.model} after {self.training_steps}"

    @property
    def when(self) -> str:
        """The number of steps, in words."""
        return counted(self.steps, "step")

    @property
    def time(self) -> str:
        """The time that an image takes, in words."""
        seconds = self.mean("seconds")
        return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"

    def mean(self, key: str) -> float:
        """The mean of a metric over the seeds; NaN if it was not measured."""
        return float(np.mean(self.values[key])) if key in self.values else float("nan")

    def sd(self, key: str) -> float | None:
        """The sample standard deviation of a metric over the seeds; ``None`` for fewer than two."""
        values = self.values.get(key, ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Example:
    """A sample whose images are shown: the models' inputs, and the real image."""

    prompt: str
    truth: UInt8[np.ndarray, "h w 3"] | None
    condition: UInt8[np.ndarray, "h w 3"] | None


@dataclass(frozen=True)
class Report:
    """The contents of the page."""

    title: str
    results: Sequence[Result]
    examples: Sequence[Example]
    facts: Mapping[str, str]
    command: str

    def metrics(self) -> list[str]:
        """The keys of the metrics that were measured."""
        return [key for key in METRICS if any(key in result.values for result in self.results)]

    def best(self, key: str) -> list[int]:
        """The indices of the results that are best in a metric, with those that `differ` from the best only by noise.

        None, if the metric's best value does not make the best model.
        """
        means = np.asarray([result.mean(key) for result in self.results])
        if not METRICS[key].ranks or np.isnan(means).all():
            return []
        best = self.results[int(np.nanargmin(means) if METRICS[key].better == "lower" else np.nanargmax(means))]
        return [i for i, each in enumerate(self.results) if key in each.values and not differ(each, best, key)]


def differ(first: Result, second: Result, key: str) -> bool:
    """Whether a metric tells two results apart: at the digits shown, and for several seeds by Welch's t-test at 5 %."""
    digits = METRICS[key].digits
    if first is second or round(first.mean(key), digits) == round(second.mean(key), digits):
        return False
    seeds = [(each.mean(key), each.sd(key), len(each.values[key])) for each in (first, second)]
    if any(sd is None for _, sd, _ in seeds) or not any(sd for _, sd, _ in seeds):
        return True
    from scipy.stats import ttest_ind_from_stats  # slow to import

    return not ttest_ind_from_stats(*seeds[0], *seeds[1], equal_var=False).pvalue >= _SIGNIFICANCE


def verdict(report: Report) -> str | None:
    """The outcome in one sentence; ``None`` if there is nothing to compare.

    The first model with its most steps is the reference. Of the other models, or with one model of its other steps, the
    sentence names the fastest that keeps 95 % of the reference's quality, else the best. Quality is the first of edits,
    attributes, FID, edit success, FID-lite, edge F1 and CLIP score that was measured.
    """
    key = next((key for key in _JUDGED if key in report.metrics()), None)
    if key is None:
        return None
    results = [each for each in report.results if each.training_steps is None and math.isfinite(each.mean(key))]
    own = [each for each in results if each.model == report.results[0].model]
    if not own:
        return None
    reference = max(own, key=lambda each: each.steps)
    others = [each for each in results if each.model != reference.model] or [
        each for each in own if each is not reference
    ]
    if not others:
        return None

    def quality(each: Result) -> float:
        ratio = each.mean(key) / reference.mean(key) if reference.mean(key) else math.nan
        return 1 / ratio if METRICS[key].better == "lower" and ratio else ratio

    close = [each for each in others if quality(each) >= _CLOSE or not differ(each, reference, key)]
    chosen = min(close, key=lambda each: each.mean("seconds")) if close else max(others, key=quality)
    label = METRICS[key].label
    label = label if label[1].isupper() else label[0].lower() + label[1:]
    noise = "" if differ(chosen, reference, key) else ", a difference within the noise"
    plain = next((each for each in own if each.steps == chosen.steps != reference.steps and each is not chosen), None)
    return (
        f"{chosen.model} in {chosen.when} is {_speed(chosen, reference)} {reference.model} in {reference.when}, "
        f"and scores {number(chosen, key)} against {number(reference, key)} in {label} "
        f"({METRICS[key].better} is better){noise}"
        + (f"; {plain.model} in {plain.when} scores {number(plain, key)}." if plain else ".")
    )


def _speed(result: Result, reference: Result) -> str:
    """How many times as fast a result is, as the beginning of a comparison."""
    ratio = reference.mean("seconds") / result.mean("seconds")
    if not math.isfinite(ratio) or 0.95 < ratio < 1.05:
        return "as fast as"
    if ratio < 1:
        return f"{1 / ratio:.2g} times slower than"
    return f"{ratio:.0f} times as fast as" if ratio >= 10 else f"{ratio:.1f} times as fast as"


def as_json(report: Report) -> dict[str, Any]:
    """The numbers: mean, standard deviation and per-seed values of every metric."""
    results = [
        {
            "model": result.model,
            **({} if result.training_steps is None else {"training_steps": result.training_steps}),
            "steps": result.steps,
            "sampler": result.sampler,
            "guidance_scale": result.guidance_scale,
            **{
                key: {
                    "mean": _finite(result.mean(key)),
                    "sd": _finite(result.sd(key)),
                    "values": [_finite(float(value)) for value in result.values[key]],
                }
                for key in METRICS
                if key in result.values
            },
        }
        for result in report.results
    ]
    sentence = verdict(report)
    return {
        "command": report.command,
        **dict(report.facts),
        **({} if sentence is None else {"verdict": sentence}),
        "results": results,
    }


def _finite(value: float | None) -> float | None:
    """The number, or ``None`` if it is infinite or NaN, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


def markdown(report: Report) -> str:
    """The table in Markdown, the best of each column in bold."""
    keys = report.metrics()
    lines = [["model", "steps", *(f"{METRICS[key].label} {arrow(key)}" for key in keys)]]
    lines.append(["---", *["---:"] * (len(keys) + 1)])
    for i, result in enumerate(report.results):
        cells = [number(result, key) for key in keys]
        cells = [f"**{cell}**" if i in report.best(key) else cell for key, cell in zip(keys, cells, strict=True)]
        lines.append([result.name.replace("|", "\\|"), str(result.steps), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(result: Result, key: str) -> str:
    """The mean of a metric, with its standard deviation for several seeds."""
    if key not in result.values:
        return "–"
    sd, digits = result.sd(key), METRICS[key].digits
    return f"{result.mean(key):.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def arrow(key: str) -> str:
    """Which direction is better."""
    return "↓" if METRICS[key].better == "lower" else "↑"
