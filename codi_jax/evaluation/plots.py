"""Plots of quality against steps, time and training, as SVG."""

import html
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from codi_jax.evaluation.results import METRICS, Report, Result, number

# Okabe & Ito's color-blind-safe palette; the first is brighter, for dark backgrounds.
_COLORS = ("#2f86c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_NOT_PLOTTED = ("seconds", "kid", "kid_lite")

ACROSS = {"steps": "steps", "seconds": "milliseconds per image", "training_steps": "steps of training"}
"""What the metrics are plotted against, by key."""

INK = "#123456"
"""The color of axes and text, to be replaced by the page's own."""


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
    style: dict[Any, Any] = dict.fromkeys(drawn, INK)
    style |= {"text.parse_math": False}  # "$" in a model's name is a literal dollar
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "codi_jax"}
    with rc_context(style):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        drawn_as: dict[str, Any] = {}
        tips: list[str] = []
        for i, (name, line) in enumerate(_lines(results, across, key).items()):
            color = _COLORS[i % len(_COLORS)]
            is_level = across == "training_steps" and any(result.training_steps is None for result in line)
            if is_level:  # models without training steps, as a reference level
                drawn_as[name] = axes.axhline(line[0].mean(key), color=color, linestyle="--", linewidth=1.5)
                continue
            at = [1000 * result.mean("seconds") if across == "seconds" else getattr(result, across) for result in line]
            values = [result.mean(key) for result in line]
            deviations = [result.sd(key) for result in line]
            bars = None if set(deviations) == {None} else [each or 0 for each in deviations]  # one seed has none
            drawn_as[name] = axes.errorbar(
                at, values, bars, color=color, marker="o", markersize=5, linewidth=2, capsize=3
            )
            for x, y, result in zip(at, values, line, strict=True):
                axes.plot(x, y, "o", color=color, alpha=0, markersize=14, gid=f"point{len(tips)}")  # larger than seen
                tips.append(_tip(result, key))
        if across != "training_steps":
            axes.set_xscale("log", base=2 if across == "steps" else 10)
            if across == "steps":
                axes.set_xticks(sorted({result.steps for result in results}))
            else:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(ACROSS[across])
        axes.set_ylabel(f"{METRICS[key].label}  ({METRICS[key].better} is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.18, color=INK)
        # Not by their labels: matplotlib skips labels that begin with "_".
        axes.legend([*drawn_as.values()], [*drawn_as], frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    for i, tip in enumerate(map(html.escape, tips)):
        found = f'<g id="point{i}"'
        svg = svg.replace(f"{found}>", f'{found} class="point" role="img" aria-label="{tip}"><title>{tip}</title>', 1)
    return svg


def _tip(result: Result, key: str) -> str:
    """What a point says of itself."""
    return f"{result.name}, {result.when}: {METRICS[key].label} {number(result, key)}, {result.time}"


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
            name = f"{result.model}, {result.when}"
        line = lines.setdefault(name, [])  # empty if it was not measured, so that colors match other plots
        if key in result.values:
            line.append(result)
    return lines
