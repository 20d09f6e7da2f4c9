"""The page that `codi_jax.evaluate` writes: table, plots and images in one self-contained HTML file."""

import base64
import html
import io
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codi_jax.evaluation.plots import ACROSS, INK, draw_plots
from codi_jax.evaluation.results import METRICS, Report, Result, arrow, as_json, number, verdict
from codi_jax.io.atomic import staged_file, write_text
from codi_jax.io.images import labeled_rows

_TEMPLATE = Path(__file__).with_name("report.html")


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
        write_text(folder / f"{name}.svg", svg.replace(INK, "#555555"), errors="backslashreplace")
    write_text(folder / "report.html", page(report, plots), errors="backslashreplace")
    with staged_file(folder / "pictures.png") as stage:
        Image.fromarray(_pictures_alone(report)).save(stage, optimize=True)


def _pictures_alone(report: Report) -> UInt8[np.ndarray, "height width 3"]:
    """Only the images: one row per result, between the conditions and the real images."""
    rows: dict[str, Any] = {}
    if all(example.condition is not None for example in report.examples):
        rows["given"] = [example.condition for example in report.examples]
    for result in report.results:
        rows[f"{result.name}, {result.when}\n{result.time} per image"] = result.pictures
    if all(example.truth is not None for example in report.examples):
        rows["real"] = [example.truth for example in report.examples]
    return labeled_rows(rows, [example.prompt for example in report.examples])


def page(report: Report, plots: Mapping[str, str]) -> str:
    """The page: inline styles and images as data, so that nothing is fetched."""
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(report.title),
        verdict=_verdict(report),
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


def _verdict(report: Report) -> str:
    sentence = verdict(report)
    if sentence is None:
        return ""
    unbroken = html.escape(sentence).replace(" ± ", "&nbsp;±&nbsp;")
    return f'<p class="verdict">{unbroken}</p>'


def _table(report: Report) -> str:
    keys = report.metrics()
    head = "".join(
        f'<th scope="col" title="{html.escape(METRICS[key].meaning)}">{METRICS[key].label}&nbsp;{arrow(key)}</th>'
        for key in keys
    )
    best = {key: report.best(key) for key in keys}
    body, previous = [], None
    for i, result in enumerate(report.results):
        cells = "".join(_cell(result, key, i in best[key]) for key in keys)
        how = f"{result.sampler}, guidance {result.guidance_scale:g}"
        name = f'{html.escape(result.name)} <span class="how">{html.escape(how)}</span>'
        first = "" if result.name == previous else ' class="first"'
        shown = f'<span class="unseen">{html.escape(result.name)}</span>' if result.name == previous else name
        body.append(f'<tr{first}><th scope="row">{shown}</th><td>{result.steps}</td>{cells}</tr>')
        previous = result.name
    return (
        f'<table class="numbers"><thead><tr><th scope="col">Model</th><th scope="col">Steps</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _cell(result: Result, key: str, best: bool) -> str:
    mean, _, sd = number(result, key).partition(" ± ")
    text = f"<strong>{mean}</strong>" if best else mean
    return f"<td{' class=best' if best else ''}>{text}{f'<small> ± {sd}</small>' if sd else ''}</td>"


def _figure(name: str, svg: str) -> str:
    key, _, across = name.partition("-")
    label = f"{METRICS[key].label} against {ACROSS[across]}"
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Ids of several plots would collide on one page.
    prefix = re.sub(r"\W", "_", name)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}_", svg)
    svg = svg.replace("<svg ", f'<svg role="group" aria-label="{html.escape(label)}" ', 1)
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
        f'<th scope="col"{" class=edge" if j == 0 else ""}>{_steps(report.results[i])}</th>'
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
        cells.append(_picture(example.condition, example.prompt, "what the models are given", True))
    for columns in models.values():
        for j, i in enumerate(columns):
            result = report.results[i]
            cells.append(_picture(result.pictures[r], example.prompt, f"{result.name}, {result.when}", j == 0))
    if example.truth is not None:
        cells.append(_picture(example.truth, example.prompt, "the real picture", True))
    button = f'<button type="button" title="Enlarge">{html.escape(example.prompt)}</button>'
    return f'<tr><th scope="row">{button}</th>{"".join(cells)}</tr>'


def _steps(result: Result) -> str:
    number, _, unit = result.when.partition(" ")
    return f"{number}<span> {unit}</span>"


def _picture(pixels: np.ndarray | None, prompt: str, name: str, edge: bool) -> str:
    if pixels is None:
        return "<td></td>"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    texts = f'alt="{html.escape(f"{prompt}, {name}")}" data-name="{html.escape(name)}"'
    edged = " class=edge" if edge else ""
    return f'<td{edged}><img src="data:image/png;base64,{data}" {texts} width="{width}" height="{height}"></td>'
