"""The comparison of models, as a user runs it, on tiny models with random weights."""

import base64
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import SIZE, refuse_weights, saved_pipeline
from pages import Page
from PIL import Image
from quick_features import quarters

from codi_jax import evaluate
from codi_jax.evaluate import Args, run
from codi_jax.evaluation import measures, plots
from codi_jax.evaluation.candidates import Candidate, Checkpoint
from codi_jax.evaluation.comparison import make_pictures
from codi_jax.evaluation.metrics import edge_f1, fid, kid, psnr
from codi_jax.evaluation.samples import Samples, open_samples
from codi_jax.io.images import canny
from codi_jax.pipeline.model import Model

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a family's model, made once."""
    return functools.partial(saved_pipeline, scratch=tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "load_features", lambda: quarters)


def read_samples(where: Path, most: int | None = None) -> Samples:
    """All samples of a folder, or some."""
    opened = open_samples(str(where)).evenly_spread(most)
    return opened.read(range(opened.count))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of squares with their edges, and edits of one into another."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(5):
        picture = np.full((SIZE, SIZE, 3), 255, np.uint8)
        picture[4 : 10 + 4 * i, 6:24] = (40 * i, 200 - 40 * i, 120)
        Image.fromarray(picture).save(folder / f"{i}.png")
        Image.fromarray(canny(picture)).save(folder / f"edges_{i}.png")
        text = [f"square {i}", "something else"] if i else "square 0"
        rows.append({"file_name": f"{i}.png", "conditioning_image": f"edges_{i}.png", "text": text})
    write_rows(folder, rows)
    names = [f"../{i}.png" for i in range(5)]
    write_rows(
        folder / "edits",
        [
            {"input_image": names[i], "edited_image": names[i + 1], "edit_prompt": "taller", "variants": names[: i + 2]}
            for i in range(4)
        ],
    )
    return folder


@pytest.mark.slow
def test_a_comparison(models: Models, data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Two models, one with a ControlNet, through the command line; the report holds what was measured."""
    plain, controlled = models("text-to-image"), models("controlnet")
    shutil.move(shutil.copytree(controlled, tmp_path / "both") / "controlnet", tmp_path / "control")
    flags = ["--models", f"plain={plain}", f"edges={plain}+{tmp_path / 'control'}", "--data", str(data)]
    flags += ["--steps", "1", "2", "--seeds", "0", "3", "--batch_size", "3", "--num_shown", "2"]
    flags += ["--samplers", "plain:euler", "--guidance_scales", "edges:1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    evaluate.main()

    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    results = {(result["model"], result["steps"]): result for result in written["results"]}
    assert list(results) == [("plain", 1), ("plain", 2), ("edges", 1), ("edges", 2)]
    assert (results["plain", 2]["sampler"], results["plain", 2]["guidance_scale"]) == ("euler", 7.5)
    assert (results["edges", 2]["sampler"], results["edges", 2]["guidance_scale"]) == ("ddim", 1.0)
    assert written["command"] == "python3 -m codi_jax.evaluate " + " ".join(flags)

    # The same by hand, one picture after the other: no batch, no filling up.
    by_hand = Model.from_pretrained(plain, tmp_path / "control")
    samples = read_samples(data)
    assert samples.prompts == [f"square {i}" for i in range(5)]
    assert samples.conditions is not None
    by_seed = []
    for seed in (0, 3):
        pictures = np.concatenate(
            [
                by_hand(prompt, None, edges, steps=2, guidance_scale=1, seed=1_000_000 * seed + i)
                for i, (prompt, edges) in enumerate(zip(samples.prompts, samples.conditions, strict=True))
            ]
        )
        edges = np.stack([canny(picture) for picture in pictures]) > 0
        found, real = quarters(pictures), quarters(samples.truth)
        f1 = edge_f1(edges, samples.conditions[..., 0] > 0).mean()
        by_seed.append([fid(found, real), 1000 * kid(found, real), f1, psnr(pictures, samples.truth).mean()])
    for key, values in zip(("fid_lite", "kid_lite", "edge_f1", "psnr"), np.transpose(by_seed), strict=True):
        # Batches of 3 and of 1 may round a pixel to its neighbor.
        np.testing.assert_allclose(results["edges", 2][key]["values"], values, rtol=1e-2, atol=1e-3)
        assert results["edges", 2][key]["mean"] == pytest.approx(np.mean(results["edges", 2][key]["values"]))
        assert results["edges", 2][key]["sd"] == pytest.approx(np.std(results["edges", 2][key]["values"], ddof=1))
    assert "edge_f1" not in results["plain", 2]  # it has not seen them
    assert min(each["seconds"]["mean"] for each in results.values()) > 0

    html = Page((tmp_path / "out" / "report.html").read_text())
    pictures = html.all("img")
    assert len(pictures) == 2 * (1 + 4 + 1)
    assert all(picture["alt"] and picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[-1]["src"].partition(",")[2]))))
    np.testing.assert_array_equal(shown, samples.truth[4])
    assert len(html.all("svg")) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "edge_f1-steps.svg", "fid_lite-seconds.svg", "fid_lite-steps.svg", "metrics.json", "pictures.png",
        "psnr-steps.svg", "report.html", "shards",
    ]  # fmt: skip
    rows = np.asarray(Image.open(tmp_path / "out" / "pictures.png"))
    assert len(rows) == 14 * 2 + SIZE * (1 + 4 + 1)  # the texts above, of two lines
    np.testing.assert_array_equal(rows[28 : 28 + SIZE, -SIZE:], samples.conditions[4])
    np.testing.assert_array_equal(rows[-SIZE:, -SIZE:], samples.truth[4])
    out = capsys.readouterr().out
    assert out.startswith("| model | steps | FID-lite ↓ | KID-lite ×10³ ↓ | Edge F1 ↑ | PSNR dB ↑ | s / image ↓ |\n")
    sentence = written["verdict"]
    assert sentence.startswith("edges in ")
    assert out.endswith(f"{sentence}\nwrote {tmp_path}/out/report.html\n")


def test_editing(models: Models, data: Path, tmp_path: Path) -> None:
    args = Args(
        models=(f"editor={models('instruct-pix2pix')}",),
        data=str(data / "edits"),
        steps=(1,),
        seeds=(0,),
        output_dir=tmp_path,
    )
    (result,) = run(args).results
    assert set(result.values) == {"fid_lite", "kid_lite", "edit_success", "preservation", "psnr", "seconds"}
    assert result.sd("psnr") is None
    assert "taller" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_model_trained_several_times(models: Models, data: Path, tmp_path: Path) -> None:
    """Each training makes the pictures of its seed, and the table has them in one row."""
    first, second = models("text-to-image"), models("controlnet")
    several = Args(models=(f"both={first},{second}",), data=str(data), steps=(1,), seeds=(0, 3), output_dir=tmp_path)
    alone = Args(models=(f"a={first}", f"b={second}"), data=str(data), steps=(1,), seeds=(0, 3), output_dir=tmp_path)
    (both,), (a, b) = run(several).results, run(alone).results
    assert both.values["psnr"] == [a.values["psnr"][0], b.values["psnr"][1]]
    np.testing.assert_array_equal(both.pictures, a.pictures)


def test_every_batch_has_one_shape_and_noise_of_its_own(data: Path) -> None:
    """The last batch is filled up, and what fills it is not kept."""
    samples, calls = read_samples(data), []

    class Recorder(Model):
        task = "text-to-image"
        seconds = 1.5

        def __init__(self) -> None:
            pass

        def __call__(self, prompts: list[str], *_: Any, **options: Any) -> np.ndarray:
            calls.append((prompts, options["seed"], options["height"], options["width"]))
            made = [np.full((2, 2, 3), int(prompt[-1]) + 10 * i, np.uint8) for i, prompt in enumerate(prompts)]
            return np.stack(made)

    candidate = Candidate("a", (Checkpoint("b", None),))
    made = make_pictures(Recorder(), candidate, samples, 4, 7_000_000, batch_size=2, size=(SIZE, SIZE))
    assert made.pictures[:, 0, 0, 0].tolist() == [0, 11, 2, 13, 4]
    assert [prompts for prompts, *_ in calls] == [["square 0", "square 1"], ["square 2", "square 3"], ["square 4"] * 2]
    assert [seed for _, seed, *_ in calls] == [7_000_000, 7_000_002, 7_000_004]
    assert {size for *_, height, width in calls for size in (height, width)} == {SIZE}
    assert made.seconds == pytest.approx(3 * 1.5 / 6)


def test_the_noise_of_tcd_is_that_of_the_flag(models: Models, data: Path, tmp_path: Path) -> None:
    """Of one model by three γ, 0 and 1 by name and 0.3 by default, each as the model draws by itself."""
    names = {"none": 0.0, "some": 0.3, "all": 1.0}
    folder = models("text-to-image")
    flags = Args(
        models=tuple(f"{name}={folder}" for name in names),
        samplers=tuple(f"{name}:tcd" for name in names),
        gammas=("none:0", "all:1"),
        data=str(data),
        steps=(2,),
        seeds=(0,),
        batch_size=5,
        guidance_scale=1.0,
        output_dir=tmp_path,
    )
    drawn = [result.pictures[:5] for result in run(flags).results]
    model, prompts = Model.from_pretrained(folder), read_samples(data).prompts
    for made, gamma in zip(drawn, names.values(), strict=True):
        wanted = model(
            prompts, steps=2, sampler="tcd", gamma=gamma, guidance_scale=1.0, height=SIZE, width=SIZE, seed=0
        )
        np.testing.assert_array_equal(made, wanted)
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    swapped = run(dataclasses.replace(flags, gammas=("none:1", "all:0"))).results  # into the same folder
    np.testing.assert_array_equal([swapped[i].pictures[:5] for i in (2, 1, 0)], drawn)


def test_steps_that_a_sampler_cannot_take_are_left_out(models: Models, data: Path, tmp_path: Path) -> None:
    args = Args(models=(f"student={models('lcm')}",), data=str(data), steps=(1, 500), seeds=(0,), output_dir=tmp_path)
    with pytest.warns(UserWarning, match="student is not run with 500 steps: "):
        done = run(args)
    assert [result.steps for result in done.results] == [1]
    with (
        pytest.warns(UserWarning, match="500 steps"),
        pytest.raises(ValueError, match="no model can be run with any of --steps"),
    ):
        run(Args(models=args.models, data=str(data), steps=(500,), seeds=(0,), output_dir=tmp_path))


def test_max_samples_are_spread_over_the_folder(data: Path) -> None:
    assert read_samples(data, 3).prompts == ["square 0", "square 2", "square 4"]
    assert len(read_samples(data, 99).prompts) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("teacher",)}, r"--models teacher: write NAME=FOLDER or NAME=FOLDER\+CONTROLNET_FOLDER\."),
        ({"models": ()}, r"--models is empty: write NAME=FOLDER\."),
        ({"models": ("a=./none",)}, r"--models a=\./none: there is no folder \./none\."),
        ({"models": ("a=o/r+/none",)}, r"--models a=o/r\+/none: there is no folder /none\."),
        ({"models": ("a=o/r", "a=o/s")}, "--models names two models a: give each its own name"),
        ({"models": ("a@4,x=o/r",)}, "--models a@4,x: write NAME@STEPS, such as base@4,1"),
        ({"models": ("a@0=o/r",)}, "--models a@0: write NAME@STEPS"),
        (
            {"models": ("a@50=o/r", "a@4,50=o/s")},
            "--models names a with 50 steps twice: rename one of them",
        ),
        ({"samplers": ("b:ddim",)}, "--samplers b:ddim: --models does not name b, only a"),
        ({"samplers": ("a:best",)}, "--samplers: there is no sampler best; there are ddim, euler, "),
        ({"guidance_scales": ("a",)}, "--guidance_scales a: write NAME:VALUE"),
        ({"guidance_scales": ("a:high",)}, "--guidance_scales: high is not a number"),
        ({"guidance_scales": ("a:nan",)}, "--guidance_scales: nan is not possible: it must be a finite number of at"),
        ({"image_guidance_scales": ("a:-1",)}, "--image_guidance_scales: -1 is not possible"),
        ({"gammas": ("a:1.5",)}, "--gammas: 1.5 is not possible: it must be from 0 to 1"),
        ({"models": ("a\udcff=o/r",)}, "the name must consist of printable characters"),
        ({"steps": (0, 1)}, "--steps must be at least 1"),
        ({"seeds": (1, 1)}, "--seeds must be different numbers"),
        ({"batch_size": 0}, "--batch_size and --num_shown must be at least 1"),
        ({"max_samples": 1}, "--max_samples must be at least 2"),
        (
            {"data": "/none"},
            r"there is no data /none: check --data, or draw some with dataset_tools/avatars\.py",
        ),
    ],
)
def test_bad_flags_are_named_before_any_work(fields: dict[str, Any], message: str, tmp_path: Path, data: Path) -> None:
    args = Args(**{"models": ("a=owner/repository",), "data": str(data), "output_dir": tmp_path / "out", **fields})
    with pytest.raises(ValueError, match=message):
        run(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "0.png", "text": "a"}], "names 1 pictures: metrics need at least two"),
        ([{"file_name": "0.png"}] * 2, r"metadata\.jsonl has a line without text"),
        ([{"file_name": "none.png", "text": "a"}] * 2, r"There is no image .*none\.png"),
        (
            [{"file_name": "0.png", "text": "a"}, {"file_name": "large.png", "text": "b"}],
            "the pictures of .* differ in size: give --resolution",
        ),
    ],
)
def test_bad_data_is_named(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path, rows)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "large.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_samples(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1 is not valid JSON .*: write one object a line"):
        read_samples(tmp_path)


def test_a_model_for_another_task_is_refused(models: Models, data: Path, tmp_path: Path) -> None:
    editor = (f"editor={models('instruct-pix2pix')}",)
    with pytest.raises(ValueError, match=f"the model editor is for the task 'edit', but {data} is for another: "):
        run(Args(models=editor, data=str(data), output_dir=tmp_path))
    write_rows(tmp_path / "plain", [{"file_name": f"{i}.png", "text": "a"} for i in range(2)])
    for i in range(2):
        shutil.copyfile(data / f"{i}.png", tmp_path / "plain" / f"{i}.png")
    with pytest.raises(ValueError, match=r"the model a has a ControlNet, but .*plain names no conditioning_image"):
        run(Args(models=(f"a={models('controlnet')}",), data=str(tmp_path / "plain"), output_dir=tmp_path))


def test_every_model_is_checked_before_weights_are_read(
    models: Models, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one would be found out after the hours that the first one takes."""
    refuse_weights(monkeypatch)
    good, editor = f"a={models('text-to-image')}", f"b={models('instruct-pix2pix')}"
    with pytest.raises(ValueError, match="the model b is for the task 'edit'"):
        run(Args(models=(good, editor), data=str(data), output_dir=tmp_path / "out"))
    with (
        pytest.warns(UserWarning, match="a is not run with 5000 steps"),
        pytest.raises(ValueError, match="no model can be run with any of --steps"),
    ):
        run(Args(models=(good,), data=str(data), steps=(5000,), output_dir=tmp_path / "out"))
    write_rows(tmp_path / "odd", [{"file_name": "odd.png", "text": "a"}] * 2)
    Image.new("RGB", (30, 30)).save(tmp_path / "odd" / "odd.png")
    with pytest.raises(ValueError, match="the model a: height = 30, width = 30: this model makes images whose sides"):
        run(Args(models=(good,), data=str(tmp_path / "odd"), output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_told_first(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'the plots need matplotlib: pip install "codi_jax\[evaluation\]"'):
        run(Args(models=("a=owner/repository",), data=str(data)))
