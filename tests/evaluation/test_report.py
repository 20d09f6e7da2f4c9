"""The report: its numbers and verdict, its plots and its page."""

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from scipy.stats import t as students_t

from codi_jax.evaluation import plots, report
from codi_jax.evaluation.plots import INK, draw_plots
from codi_jax.evaluation.report import page
from codi_jax.evaluation.results import Example, Report, Result, as_json, differ, markdown, verdict


@pytest.fixture
def small_report() -> Report:
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    results = [
        Result("a <b>", 1, "lcm", 1.0, {"fid_lite": [3.0, 5.0], "edge_f1": [0.5, 0.5], "seconds": [0.1, 0.1]}, picture),
        Result("a <b>", 4, "lcm", 1.0, {"fid_lite": [2.0, 2.0], "edge_f1": [0.9, 0.9], "seconds": [0.4, 0.4]}, picture),
        Result("c|d", 4, "ddim", 7.5, {"fid_lite": [2.001, 2.001], "seconds": [0.8, 0.8]}, picture),
    ]
    examples = [Example('"quoted" & <i>', picture[0], None)]
    return Report("Title & more", results, examples, {"Data": "<here>"}, "python3 -m codi_jax.evaluate 'a b'")


def test_the_table_marks_the_best(small_report: Report) -> None:
    assert markdown(small_report).splitlines() == [
        "| model | steps | FID-lite ↓ | Edge F1 ↑ | s / image ↓ |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a <b> | 1 | **4.00 ± 1.41** | 0.500 ± 0.000 | 0.1000 ± 0.0000 |",
        "| a <b> | 4 | **2.00 ± 0.00** | **0.900 ± 0.000** | 0.4000 ± 0.0000 |",
        "| c\\|d | 4 | **2.00 ± 0.00** | – | 0.8000 ± 0.0000 |",
    ]
    text = page(small_report, {})
    best = re.findall(r"<td class=best><strong>([\d.]+)</strong>", text)
    assert best == ["4.00", "2.00", "0.900", "2.00"]  # the first differs from the others only by noise


def test_the_page_is_whole_and_escaped(small_report: Report) -> None:
    text = page(small_report, draw_plots(small_report))
    tags = Page(text)
    assert "<i>" not in text
    assert "<b>c" not in text
    assert tags.all("img")[0]["alt"] == '"quoted" & <i>, a <b>, 1 step'
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)
    ids = [attributes["id"] for _, attributes in tags.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(targets) <= set(ids)
    assert len(targets) > 0
    # Nothing is fetched: no style sheet, no address but those that name XML's vocabularies.
    assert tags.all("script") == [{}]
    assert not tags.all("link")
    fetched = [value for _, attributes in tags.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(value and value.startswith("data:") for value in fetched)


def test_plots_take_the_color_of_the_page(small_report: Report) -> None:
    drawn = draw_plots(small_report)
    text = page(small_report, drawn)
    assert "currentColor" in text
    assert INK not in text
    assert all("#d55e00" in svg for svg in drawn.values())  # the second model
    assert text.count("#d55e00") == sum(svg.count("#d55e00") for svg in drawn.values())


def test_one_seed_has_no_error_bars(small_report: Report) -> None:
    values = {"fid_lite": [3.0], "seconds": [0.1]}
    results = [dataclasses.replace(each, values=values) for each in small_report.results]
    alone = draw_plots(dataclasses.replace(small_report, results=results))
    assert "LineCollection" in draw_plots(small_report)["fid_lite-steps"]
    assert "LineCollection" not in alone["fid_lite-steps"]


def test_names_are_plotted_as_they_are(small_report: Report) -> None:
    """Nothing in them is a formula, or hides them."""
    names = ["$x^$", "5$", "a$b$", "_hidden", "\\alpha"]
    results = [dataclasses.replace(small_report.results[0], model=name) for name in names]
    for across in ("steps", "seconds"):
        svg = draw_plots(dataclasses.replace(small_report, results=results))[f"fid_lite-{across}"]
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert [text for text in texts if text in names] == names


def test_the_numbers_are_written_before_anything_else(
    small_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Report) -> None:
        raise RuntimeError

    monkeypatch.setattr(report, "draw_plots", fail)
    nan = dataclasses.replace(small_report.results[0], values={"fid_lite": [float("nan"), 1.0]})
    with pytest.raises(RuntimeError):
        report.write_report(tmp_path, dataclasses.replace(small_report, results=[nan], command="a\udcff"))
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert (path.name, written["command"]) == ("metrics.json", "a\udcff")
    assert written["results"][0]["fid_lite"] == {"mean": None, "sd": None, "values": [None, 1.0]}


def test_plots_are_the_same_every_time(small_report: Report) -> None:
    assert draw_plots(small_report) == draw_plots(small_report)


def test_training_is_plotted_with_what_is_not_trained_as_a_level(small_report: Report) -> None:
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    training = [
        Result("new", 1, "lcm", 1.0, {"fid_lite": [value, value], "seconds": [1.0, 1.0]}, picture, steps)
        for steps, value in [(100, 9.0), (200, 4.5)]
    ]
    last = dataclasses.replace(training[-1], training_steps=None)
    whole = dataclasses.replace(small_report, results=[*training, last, *small_report.results])
    assert [line.split(" | ")[0] for line in markdown(whole).splitlines()[2:5]] == [
        "| new after 100", "| new after 200", "| new",
    ]  # fmt: skip
    assert as_json(whole)["results"][0]["training_steps"] == 100
    lines = plots._lines(whole.results, "training_steps", "fid_lite")
    assert {name: [result.training_steps for result in own] for name, own in lines.items()} == {
        "new, 1 step": [100, 200], "a <b>, 1 step": [None], "a <b>, 4 steps": [None], "c|d, 4 steps": [None],
    }  # fmt: skip
    drawn = draw_plots(whole)
    assert "steps of training" in drawn["fid_lite-training_steps"]
    assert "against steps of training" in page(whole, drawn)
    assert "fid_lite-training_steps" not in draw_plots(small_report)


# ---- The verdict


def result(model: str, steps: int, seconds: float, *seeds: float, key: str = "fid_lite", **given: int) -> Result:
    values = {key: [float(each) for each in seeds], "seconds": [float(seconds)] * len(seeds)}
    return Result(model, steps, "lcm", 1.0, values, np.zeros((1, 4, 4, 3), np.uint8), **given)


def judged(*results: Result) -> str | None:
    return verdict(Report("", results, [], {}, ""))


TEACHER = (
    result("teacher", 50, 1.0, 0.9, key="attribute_accuracy"),
    result("teacher", 1, 0.02, 0.6, key="attribute_accuracy"),
)


def test_the_verdict_is_on_the_fastest_that_is_close() -> None:
    student = [
        result("student", n, n / 100, value, key="attribute_accuracy") for n, value in ((1, 0.8), (2, 0.88), (4, 0.95))
    ]
    assert judged(*TEACHER, *student) == (
        "student in 2 steps is 50 times as fast as teacher in 50 steps, and scores 0.880 against 0.900 in attributes "
        "(higher is better)."
    )
    assert judged(*TEACHER, student[0]) == (
        "student in 1 step is 100 times as fast as teacher in 50 steps, and scores 0.800 against 0.900 in attributes "
        "(higher is better); teacher in 1 step scores 0.600."
    )


def test_of_a_distance_less_is_better() -> None:
    teacher, near, far = result("teacher", 50, 1, 40), result("a", 4, 0.4, 42), result("b", 4, 0.1, 43)
    assert judged(teacher, near, far) == (
        "a in 4 steps is 2.5 times as fast as teacher in 50 steps, and scores 42.00 against 40.00 in FID-lite "
        "(lower is better)."
    )
    assert str(judged(teacher, far, result("c", 1, 0.01, 80))).startswith("b in 4 steps is 10 times as fast as teacher")


def test_one_model_is_judged_by_its_own_steps() -> None:
    assert str(judged(*TEACHER)).startswith(
        "teacher in 1 step is 50 times as fast as teacher in 50 steps, and scores 0.600"
    )


def test_what_is_only_noise_is_said() -> None:
    teacher = result("teacher", 50, 1, 10, 30, 20)
    assert str(judged(teacher, result("a", 50, 1, 35, 15, 25))).startswith(
        "a in 50 steps is as fast as teacher in 50 steps,"
    )
    assert str(judged(teacher, result("a", 50, 3, 35, 15, 25))).endswith(
        "(lower is better), a difference within the noise."
    )
    assert "3 times slower than" in str(judged(teacher, result("a", 50, 3, 35, 15, 25)))


def test_there_is_no_verdict_on_nothing() -> None:
    assert judged(TEACHER[0]) is None
    assert judged(result("a", 1, 1, 1, key="psnr"), result("b", 1, 1, 1, key="psnr")) is None
    assert judged(TEACHER[0], result("b", 1, 1, float("nan"), key="attribute_accuracy")) is None
    exports = result("teacher", 1, 1, 0.5, key="attribute_accuracy", training_steps=100)
    assert judged(TEACHER[0], exports) is None


@pytest.mark.parametrize("gap", [0.5, 1.5])
def test_results_differ_by_welchs_test(gap: float) -> None:
    """Equal spreads of three seeds each: t with four degrees of freedom, by the formula."""
    first, second = np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 2.0, 3.0]) + 2 * gap
    statistic = 2 * gap / np.sqrt(1 / 3 + 1 / 3)
    expected = 2 * students_t.sf(statistic, df=4) < 0.05
    assert expected == (gap > 1)
    assert differ(result("a", 1, 1, *first), result("b", 1, 1, *second), "fid_lite") == expected


def test_unequal_spreads_have_fewer_degrees_of_freedom() -> None:
    """Nearly two, of which t = 3.5 is not rare; with four, as of equal spreads, it would be."""
    narrow, wide = [1.99, 2.0, 2.01], [3.02, 4.02, 5.02]
    assert 2 * students_t.sf(3.5, df=2) > 0.05 > 2 * students_t.sf(3.5, df=4)
    assert not differ(result("a", 1, 1, *narrow), result("b", 1, 1, *wide), "fid_lite")


def test_without_spread_the_shown_digits_decide() -> None:
    assert not differ(result("a", 1, 1, 2.001), result("b", 1, 1, 2.002), "fid_lite")
    assert differ(result("a", 1, 1, 2.01), result("b", 1, 1, 2.02), "fid_lite")
    assert differ(result("a", 1, 1, 2.01, 2.01), result("b", 1, 1, 2.02, 2.02), "fid_lite")


def test_what_does_not_rank_models_has_no_mark() -> None:
    blurry, sharp = result("a", 1, 1, 30.0, key="psnr"), result("b", 1, 1, 20.0, key="psnr")
    assert Report("", [blurry, sharp], [], {}, "").best("psnr") == []


# ---- What can be done on the page


def test_points_say_what_they_are(small_report: Report) -> None:
    svg = draw_plots(small_report)["fid_lite-steps"]
    tips = re.findall(r'class="point" role="img" aria-label="([^"]*)"><title>([^<]*)</title>', svg)
    assert [shown for shown, _ in tips] == [
        "a &lt;b&gt;, 1 step: FID-lite 4.00 ± 1.41, 100 ms",
        "a &lt;b&gt;, 4 steps: FID-lite 2.00 ± 0.00, 400 ms",
        "c|d, 4 steps: FID-lite 2.00 ± 0.00, 800 ms",
    ]
    assert all(label == title for label, title in tips)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0102, "10.2 ms"), (0.511, "511 ms"), (0.9996, "1 s"), (12.34, "12.3 s")]
)
def test_times_are_in_words(seconds: float, shown: str) -> None:
    assert result("a", 1, seconds, 1.0).time == shown


def test_the_page_has_its_verdict_and_a_button_for_each_row(small_report: Report) -> None:
    text = page(small_report, {})
    (shown,) = re.findall(r'<p class="verdict">(.*)</p>', text)
    assert html.unescape(shown).replace("\N{NO-BREAK SPACE}", " ") == verdict(small_report)
    assert text.count('<button type="button" title="Enlarge">&quot;quoted&quot; &amp; &lt;i&gt;</button>') == 1
    names = [image["data-name"] for image in Page(text).all("img")]
    assert names == ["a <b>, 1 step", "a <b>, 4 steps", "c|d, 4 steps", "the real picture"]
