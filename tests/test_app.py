"""The page: each of its tabs over HTTP, against the models called directly."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import gradio_client
import numpy as np
import pytest
from folders import saved_pipeline
from gradio_client.exceptions import AppError
from PIL import Image

from codi_jax import app
from codi_jax.io.images import canny
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.studio import Studio

PROMPT, SEED = "a red cat", 7


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> app.Args:
    scratch = tmp_path_factory.mktemp("models")
    model = functools.partial(saved_pipeline, scratch=scratch)
    return app.Args(
        model=str(model("text-to-image")), student=str(model("lcm")), editor=str(model("instruct-pix2pix")),
        controlnet=str(model("controlnet")), votes=scratch / "votes" / "votes.jsonl", steps=2, student_steps=1,
        warm_up=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def studio(args: app.Args) -> Studio:
    return app.load(args)


@pytest.fixture(scope="module")
def client(args: app.Args, studio: Studio) -> Iterator[gradio_client.Client]:
    page = app.build(studio, args)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True, max_file_size="1mb")
    yield gradio_client.Client(url, verbose=False)
    page.close()


def pixels(shown: Any) -> np.ndarray:
    """The pixels of what an image of the page shows."""
    value = shown["value"] if isinstance(shown, dict) else shown
    return np.asarray(Image.open(value["path"] if isinstance(value, dict) else value).convert("RGB"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize(
        (90, 70), Image.Resampling.NEAREST
    )
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_draw(client: gradio_client.Client, studio: Studio) -> None:
    left = client.predict(PROMPT, SEED, 1, 1.0, api_name="/draw_few")
    right = client.predict(PROMPT, SEED, 2, 3.0, api_name="/draw")
    student, teacher = studio.models["student"], studio.models["teacher"]
    np.testing.assert_array_equal(pixels(left), student(PROMPT, steps=1, guidance_scale=1.0, seed=SEED)[0])
    np.testing.assert_array_equal(pixels(right), teacher(PROMPT, steps=2, guidance_scale=3.0, seed=SEED)[0])
    assert left["label"].startswith("student, 1 step, ")
    assert right["label"].startswith("teacher, 2 steps, ")


def test_edit(client: gradio_client.Client, studio: Studio, photo: Path) -> None:
    shown = client.predict(gradio_client.handle_file(photo), PROMPT, SEED, 1, 3.0, 1.5, api_name="/edit")
    resized = Image.open(photo).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    wanted = studio.models["editor"](PROMPT, resized, steps=1, seed=SEED, **scales)[0]
    np.testing.assert_array_equal(pixels(shown), wanted)


@pytest.mark.parametrize("is_drawn", [True, False])
def test_control(client: gradio_client.Client, studio: Studio, photo: Path, tmp_path: Path, is_drawn: bool) -> None:
    drawn = np.zeros((320, 320, 4), np.uint8)
    drawn[100:110, 40:280] = (0, 0, 0, 255)
    Image.fromarray(drawn).save(tmp_path / "drawn.png")
    sketch = gradio_client.handle_file(tmp_path / "drawn.png")
    drawing = {"background": None, "layers": [sketch], "composite": sketch}
    upload = None if is_drawn else gradio_client.handle_file(photo)
    edges = client.predict(drawing, upload, api_name="/edges")
    if is_drawn:
        wanted = np.zeros((32, 32), np.uint8)
        wanted[10, 4:28] = 255  # a line of 10 pixels where 10 become one
    else:
        resized = Image.open(photo).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        wanted = canny(np.asarray(resized))
    np.testing.assert_array_equal(pixels(edges), np.repeat(wanted[..., None], 3, axis=-1))
    found = gradio_client.handle_file(edges if isinstance(edges, str) else edges["path"])
    result = client.predict(found, PROMPT, SEED, 1, 3.0, api_name="/control")
    condition = Image.fromarray(pixels(edges))
    made = studio.models["controlnet"](PROMPT, control_image=condition, steps=1, guidance_scale=3.0, seed=SEED)[0]
    np.testing.assert_array_equal(pixels(result), made)


def test_compare(client: gradio_client.Client, studio: Studio) -> None:
    gallery = client.predict(PROMPT, SEED, ["teacher", "student"], [2, 1], 3.0, api_name="/compare")
    captions = [entry["caption"].rpartition(",")[0] for entry in gallery]
    assert captions == ["teacher, 1 step", "teacher, 2 steps", "student, 1 step", "student, 2 steps"]
    wanted = studio.models["teacher"](PROMPT, steps=2, guidance_scale=3.0, seed=SEED)[0]
    np.testing.assert_array_equal(pixels(gallery[1]["image"]), wanted)


def test_blind_votes_are_kept(client: gradio_client.Client, studio: Studio, args: app.Args) -> None:
    with pytest.raises(AppError, match="There is nothing to vote on"):
        client.predict(api_name="/vote_left")
    left, right, text = client.predict(PROMPT, ["teacher"], [1, 2], 3.0, api_name="/draw_two")
    assert text == ""
    assert not args.votes.exists()
    text = client.predict(api_name="/vote_right")
    (vote,) = map(json.loads, args.votes.read_text().splitlines())
    assert {vote["left"], vote["right"]} == {"teacher@1", "teacher@2"}
    assert (vote["prompt"], vote["choice"]) == (PROMPT, "right")
    assert text == f"You voted: right is better. Left was {vote['left']}, right {vote['right']}."
    for side, shown in (("left", left), ("right", right)):
        steps = int(vote[side].rpartition("@")[2])
        again = studio.models["teacher"](PROMPT, steps=steps, guidance_scale=3.0, seed=vote["seed"])[0]
        np.testing.assert_array_equal(pixels(shown), again)
    with pytest.raises(AppError, match="There is nothing to vote on"):  # each pair has one vote
        client.predict(api_name="/vote_right")
    with pytest.raises(AppError, match="Choose two"):
        client.predict(PROMPT, ["teacher"], [1], 3.0, api_name="/draw_two")


def test_several_users_at_once(client: gradio_client.Client, studio: Studio) -> None:
    draw = lambda seed: pixels(client.predict(PROMPT, seed, 2, 3.0, api_name="/draw"))  # noqa: E731
    with futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(draw, range(4)))
    for seed, picture in enumerate(made):
        wanted = studio.models["teacher"](PROMPT, steps=2, guidance_scale=3.0, seed=seed)[0]
        np.testing.assert_array_equal(picture, wanted)


def bomb(path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("text.png", lambda path: path.write_text("no picture")),
        ("page.svg", lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")),
        ("bomb.png", bomb),
    ],
)
def test_uploads_that_are_no_pictures(
    client: gradio_client.Client, tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    write(tmp_path / name)
    with pytest.raises(AppError):
        client.predict(gradio_client.handle_file(tmp_path / name), PROMPT, SEED, 1, 3.0, 1.5, api_name="/edit")


def test_uploads_have_a_largest_size(client: gradio_client.Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (900, 900, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(gradio_client.handle_file(tmp_path / "large.png"), PROMPT, SEED, 1, 3.0, 1.5, api_name="/edit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a" * 1001, SEED, 2, 3.0), ""),
        ((PROMPT, SEED, 3, 3.0), "3"),
        ((PROMPT, -1, 2, 3.0), ""),
        ((PROMPT, SEED, 2, 1e9), ""),
    ],
)
def test_what_the_page_does_not_offer_is_refused(
    client: gradio_client.Client, arguments: tuple[Any, ...], message: str
) -> None:
    """By those who call it without the page, too."""
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name="/draw")


def test_other_files_are_not_served(client: gradio_client.Client, args: app.Args) -> None:
    import urllib.error
    import urllib.request

    for path in (Path(__file__), Path(str(args.model)) / "model_index.json", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{client.src}gradio_api/file={path}")


def test_the_controlnet_shares_the_teachers_weights(studio: Studio) -> None:
    controlled = studio.models["controlnet"].params
    assert "controlnet" in controlled
    assert all(controlled[name] is params for name, params in studio.models["teacher"].params.items())


def test_steps_are_counted(studio: Studio) -> None:
    seen: list[tuple[int, int]] = []
    studio.make("teacher", PROMPT, 20, lambda *counts: seen.append(counts), seed=0)
    assert {total for _, total in seen} <= {20}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_lora_as_the_student_and_models_for_other_tasks(args: app.Args, studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--editor must be a model for edit, not for text-to-image"):
        app.load(dataclasses.replace(args, editor=args.model))
    with pytest.raises(ValueError, match="--model must be a model for text-to-image, not for edit"):
        app.load(dataclasses.replace(args, model=args.editor, controlnet=None))
    with pytest.raises(ValueError, match="--student and --student_lora exclude each other"):
        dataclasses.replace(args, student_lora="x").check()
    with pytest.raises(ValueError, match="--steps 3 is not possible: it must be one of 1, 2, 4, 8, 20, 50"):
        dataclasses.replace(args, steps=3).check()


def test_without_flags_it_shows_the_embedded_models(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, editor = studio.models["teacher"], studio.models["editor"]
    loaded: list[tuple[Any, ...]] = []

    def load(*names: Any, **_: Any) -> Any:
        loaded.append(tuple(Path(name).name for name in names))
        return teacher if "edit" not in str(names[0]) else editor

    monkeypatch.setattr(Model, "from_pretrained", load)
    app.load(app.Args())
    assert loaded[0] == ("avatars",)
    assert ("avatars", "avatars-controlnet") in loaded
    assert app.Args().host == "127.0.0.1"
    monkeypatch.setattr(app, "_ASSETS", Path("/nowhere"))
    with pytest.raises(ValueError, match="the embedded models are not installed: name a model with --model"):
        app.load(app.Args())


def test_the_students_guidance_is_the_teachers_or_built_in(args: app.Args, studio: Studio) -> None:
    of_text = Studio({**studio.models, "student": studio.models["teacher"]})
    assert app.scale_of("student", studio, args) == args.guidance_scale == 3  # an input of the LCM
    assert app.scale_of("student", of_text, args) == 1
    assert app.scale_of("teacher", of_text, args) == 3
    assert app.scale_of("student", studio, dataclasses.replace(args, student_guidance_scale=0.0)) == 0


def test_the_page_starts_with_compiled_programs(args: app.Args, studio: Studio) -> None:
    assert list(app.warm_up(studio, args)) == ["teacher", "student", "editor", "controlnet"]
    before = studio.models["teacher"].compile_seconds
    studio.make("teacher", PROMPT, args.steps, lambda *_: None, guidance_scale=3.0)
    assert studio.models["teacher"].compile_seconds < 0.1, before
