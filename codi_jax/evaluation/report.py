"""The page that `codi_jax.evaluate` writes: table, plots and images in one self-contained HTML file."""

import base64
import html
import importlib.util
import io
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codi_jax.io.atomic import staged_file, write_text
from codi_jax.io.images import labeled_rows

_TEMPLATE = Path(__file__).with_name("report.html")
# Okabe & Ito's color-blind-safe palette; the first is brighter, for dark backgrounds.
_COLORS = ("#2f86c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_NOT_PLOTTED = ("seconds", "kid", "kid_lite")
_ACROSS = {"steps": "steps", "seconds": "milliseconds per image", "training_steps": "steps of training"}
_INK = "#123456"  # the color of the plots' axes and text, replaced by the page's own


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    better: str
    digits: int
    meaning: str


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
    "clip_image": Metric("CLIP image", "higher", 3, "cosine with the image before the edit"),
    "dino": Metric("DINO", "higher", 3, "cosine with the real image in DINO's space"),
    "lpips": Metric("LPIPS", "lower", 3, "perceptual distance to the real image"),
    "fid_lite": Metric("FID-lite", "lower", 2, "Fréchet distance to the real images, on EfficientNet-Lite0 features"),
    "kid_lite": Metric("KID-lite ×10³", "lower", 3, "kernel distance on the same features, unbiased"),
    "edge_f1": Metric("Edge F1", "higher", 3, "canny edges of the image against the condition, to within a pixel"),
    "edit_success": Metric("Edit success", "higher", 3, "share of images closest to the wanted variant"),
    "preservation": Metric("Kept dB", "higher", 2, "PSNR against the image before the edit, outside the edit"),
    "psnr": Metric("PSNR dB", "higher", 2, "against the real image with the same text"),
    "seconds": Metric("s / image", "lower", 4, "without compilation"),
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
        """The indices of the results that are best in a metric, compared at the digits that are shown."""
        means = [result.mean(key) for result in self.results]
        sign = 1 if METRICS[key].better == "lower" else -1
        shown = [round(sign * mean, METRICS[key].digits) for mean in means]
        return [i for i, value in enumerate(shown) if value == np.nanmin(shown)]


def write_report(folder: Path, report: Report) -> None:
    """Writes ``metrics.json``, ``report.html``, ``pictures.png`` and one SVG file per plot.

    The numbers are written first, because they are the most expensive: everything else can be remade from them and the
    models.

    Raises:
      OSError: if the folder cannot be written.
    """
    numbers = json.dumps(as_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A command line may hold bytes that are not valid UTF-8.
    write_text(folder / "metrics.json", numbers, errors="backslashreplace")
    plots = draw_plots(report)
    for name, svg in plots.items():
        write_text(folder / f"{name}.svg", svg.replace(_INK, "#555555"), errors="backslashreplace")
    write_text(folder / "report.html", page(report, plots), errors="backslashreplace")
    with staged_file(folder / "pictures.png") as stage:
        Image.fromarray(_pictures_alone(report)).save(stage, optimize=True)


def _pictures_alone(report: Report) -> UInt8[np.ndarray, "height width 3"]:
    """Only the images: one row per result, between the conditions and the real images."""
    rows: dict[str, Any] = {}
    if all(example.condition is not None for example in report.examples):
        rows["given"] = [example.condition for example in report.examples]
    for result in report.results:
        rows[f"{result.name}, {result.steps}"] = result.pictures
    if all(example.truth is not None for example in report.examples):
        rows["real"] = [example.truth for example in report.examples]
    return labeled_rows(rows)


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
    return {"command": report.command, **dict(report.facts), "results": results}


def _finite(value: float | None) -> float | None:
    """The number, or ``None`` if it is infinite or NaN, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


def markdown(report: Report) -> str:
    """The table in Markdown, the best of each column in bold."""
    keys = report.metrics()
    lines = [["model", "steps", *(f"{METRICS[key].label} {_arrow(key)}" for key in keys)]]
    lines.append(["---", *["---:"] * (len(keys) + 1)])
    for i, result in enumerate(report.results):
        cells = [_number(result, key) for key in keys]
        cells = [f"**{cell}**" if i in report.best(key) else cell for key, cell in zip(keys, cells, strict=True)]
        lines.append([result.name.replace("|", "\\|"), str(result.steps), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(result: Result, key: str) -> str:
    if key not in result.values:
        return "–"
    sd, digits = result.sd(key), METRICS[key].digits
    return f"{result.mean(key):.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def _arrow(key: str) -> str:
    return "↓" if METRICS[key].better == "lower" else "↑"


# ---- Plots


def check_plots() -> None:
    """Checks that plots can be drawn, before long work.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the plots need matplotlib: pip install "codi_jax[evaluation]".')


def draw_plots(report: Report) -> dict[str, str]:
    """Quality against steps, one plot per metric, and the first metric against time: name -> SVG.

    If exports during training were evaluated, also the first metric against training steps.
    """
    trained = [result for result in report.results if result.training_steps is None]
    plotted = [key for key in report.metrics() if key not in _NOT_PLOTTED]
    plots = {f"{key}-steps": _plot(trained, "steps", key) for key in plotted}
    if plotted:
        plots[f"{plotted[0]}-seconds"] = _plot(trained, "seconds", plotted[0])
        if len(trained) < len(report.results):
            plots[f"{plotted[0]}-training_steps"] = _plot(report.results, "training_steps", plotted[0])
    return plots


def _plot(results: Sequence[Result], across: str, key: str) -> str:
    # Imported here, because matplotlib is optional.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(drawn, _INK)
    style |= {"text.parse_math": False}  # "$" in a model's name is a literal dollar
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "codi_jax"}
    with rc_context(style):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        drawn_as: dict[str, Any] = {}
        for i, (name, line) in enumerate(_lines(results, across, key).items()):
            color = _COLORS[i % len(_COLORS)]
            is_level = across == "training_steps" and any(result.training_steps is None for result in line)
            if is_level:  # models without training steps, as a reference level
                drawn_as[name] = axes.axhline(line[0].mean(key), color=color, linestyle="--", linewidth=1.5)
                continue
            deviations = [result.sd(key) for result in line]
            drawn_as[name] = axes.errorbar(
                [1000 * result.mean("seconds") if across == "seconds" else getattr(result, across) for result in line],
                [result.mean(key) for result in line],
                None if set(deviations) == {None} else [each or 0 for each in deviations],  # one seed has no bars
                color=color, marker="o", markersize=5, linewidth=2, capsize=3,
            )  # fmt: skip
        if across != "training_steps":
            axes.set_xscale("log", base=2 if across == "steps" else 10)
            if across == "steps":
                axes.set_xticks(sorted({result.steps for result in results}))
            else:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_ACROSS[across])
        axes.set_ylabel(f"{METRICS[key].label}  ({METRICS[key].better} is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.18, color=_INK)
        # Not by their labels: matplotlib skips labels that begin with "_".
        axes.legend([*drawn_as.values()], [*drawn_as], frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _lines(results: Sequence[Result], across: str, key: str) -> dict[str, list[Result]]:
    """The results that each line of a plot connects, by the line's name.

    Across training steps, a line is a model at one number of sampling steps; models without exports have one line each.
    """
    lines: dict[str, list[Result]] = {}
    in_training = {result.model for result in results if result.training_steps is not None}
    for result in results:
        name = result.model
        if across == "training_steps":
            if result.model in in_training and result.training_steps is None:
                continue  # the last of its exports
            name = f"{result.model}, {result.steps} step{'s' * (result.steps > 1)}"
        line = lines.setdefault(name, [])  # empty if it was not measured, so that colors match other plots
        if key in result.values:
            line.append(result)
    return lines


# ---- The page


def page(report: Report, plots: Mapping[str, str]) -> str:
    """The page: inline styles and images as data, so that nothing is fetched."""
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(report.title),
        facts="".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in report.facts.items()),
        command=html.escape(report.command),
        table=_table(report),
        meanings="".join(
            f"<li><b>{METRICS[key].label}</b>: {METRICS[key].meaning}; {METRICS[key].better} is better.</li>"
            for key in report.metrics()
        ),
        plots="".join(_figure(name, svg) for name, svg in plots.items()),
        pictures=_gallery(report),
    )


def _table(report: Report) -> str:
    keys = report.metrics()
    head = "".join(
        f'<th scope="col" title="{html.escape(METRICS[key].meaning)}">{METRICS[key].label}&nbsp;{_arrow(key)}</th>'
        for key in keys
    )
    best = {key: report.best(key) for key in keys}
    body, previous = [], None
    for i, result in enumerate(report.results):
        cells = "".join(_cell(result, key, i in best[key]) for key in keys)
        how = f"{result.sampler}, guidance {result.guidance_scale:g}"
        name = f'{html.escape(result.name)} <span class="how">{html.escape(how)}</span>'
        first = "" if result.name == previous else ' class="first"'
        shown = "" if result.name == previous else name
        body.append(f'<tr{first}><th scope="row">{shown}</th><td>{result.steps}</td>{cells}</tr>')
        previous = result.name
    return (
        f'<table class="numbers"><thead><tr><th scope="col">Model</th><th scope="col">Steps</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _cell(result: Result, key: str, best: bool) -> str:
    mean, _, sd = _number(result, key).partition(" ± ")
    text = f"<strong>{mean}</strong>" if best else mean
    return f"<td{' class=best' if best else ''}>{text}{f'<small> ± {sd}</small>' if sd else ''}</td>"


def _figure(name: str, svg: str) -> str:
    key, _, across = name.partition("-")
    label = f"{METRICS[key].label} against {_ACROSS[across]}"
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Ids of several plots would collide on one page.
    prefix = re.sub(r"\W", "_", name)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}_", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    return f"<figure>{svg}<figcaption>{html.escape(label)}</figcaption></figure>"


def _gallery(report: Report) -> str:
    models: dict[str, list[int]] = {}
    for i, result in enumerate(report.results):
        models.setdefault(result.name, []).append(i)
    has_condition = any(example.condition is not None for example in report.examples)
    has_truth = any(example.truth is not None for example in report.examples)
    ends = (["Given"] if has_condition else []), (["Real"] if has_truth else [])
    groups = "".join(
        f'<th scope="colgroup" class="edge" colspan="{len(columns)}">{html.escape(name)}</th>'
        for name, columns in models.items()
    )
    steps = "".join(
        f'<th scope="col"{" class=edge" if j == 0 else ""}>{report.results[i].steps}<span> steps</span></th>'
        for columns in models.values()
        for j, i in enumerate(columns)
    )
    before, after = ("".join(f'<th rowspan="2" scope="col" class="edge">{text}</th>' for text in side) for side in ends)
    body = "".join(_pictures(report, models, r, has_condition) for r in range(len(report.examples)))
    return (
        f'<table class="pictures"><thead><tr><th rowspan="2" scope="col">Text</th>{before}{groups}{after}</tr>'
        f"<tr>{steps}</tr></thead><tbody>{body}</tbody></table>"
    )


def _pictures(report: Report, models: Mapping[str, Sequence[int]], r: int, has_condition: bool) -> str:
    example = report.examples[r]
    cells = []
    if has_condition:
        cells.append(_picture(example.condition, f"what the models are given for {example.prompt}", True))
    for columns in models.values():
        for j, i in enumerate(columns):
            result = report.results[i]
            cells.append(_picture(result.pictures[r], f"{example.prompt}, {result.name}, {result.steps} steps", j == 0))
    if example.truth is not None:
        cells.append(_picture(example.truth, f"{example.prompt}, the real picture", True))
    return f'<tr><th scope="row">{html.escape(example.prompt)}</th>{"".join(cells)}</tr>'


def _picture(pixels: np.ndarray | None, alt: str, edge: bool) -> str:
    if pixels is None:
        return "<td></td>"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<td{" class=edge" if edge else ""}><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}"></td>'
    )
