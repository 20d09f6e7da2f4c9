"""Triples for InstructPix2Pix: of tables, of two folders, and drawn by a model and filtered."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import TEXT, make_tokenizer, saved_pipeline
from PIL import Image
from test_coyo import contents, images, rows_of, summary
from web import Web, jpeg

from codi_jax.data import DataFlags, load_data
from codi_jax.data.preparation import edits
from codi_jax.data.preparation.edits import GenerateFlags, fields_of, passes
from codi_jax.data.preparation.similarity import Encoder, Scores, clip_encoder, compare
from dataset_tools import make_edit_dataset as tool


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make(target: Path, **changes) -> None:
    options = {"resolution": 32, "num_proc": 1, "train_data_dir": str(target), "retries": 0, "timeout": 2.0}
    tool.main(tool.Args(**options | changes))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def test_pairs_of_a_table(tmp_path: Path):
    """With an instruction made of its columns; training reads both images and the text."""
    before, after = images(tmp_path / "before", 6), images(tmp_path / "after", 12)
    table = {
        "first": [str(before / f"{number:04}.jpg") for number in range(6)],
        "second": [str(after / f"{number + 6:04}.jpg") for number in range(6)],
        "season": ["winter", "summer", "", "autumn", "spring", "winter"],
        "id": list("abcdef"),
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    flags = {"input": str(tmp_path / "in.parquet"), "input_image_column": "first", "edited_image_column": "second"}
    make(tmp_path / "out", instruction="make it {season}", image_format="png", **flags)
    rows = rows_of(tmp_path / "out")
    assert [row["edit_prompt"] for row in rows] == [f"make it {season}".strip() for season in table["season"]]
    assert [row["id"] for row in rows] == list("abcdef")
    for number, row in enumerate(rows):
        for column, shown in (("input_image", number), ("edited_image", number + 6)):
            source = Image.open(after / f"{shown:04}.jpg").resize((38, 32), Image.Resampling.BOX)
            assert np.abs(pixels(tmp_path / "out" / row[column]) - np.asarray(source, int)).mean() < 4
    loader = load_data(
        DataFlags(
            train_data_dir=str(tmp_path / "out"), resolution=32, image_column="edited_image",
            caption_column="edit_prompt", conditioning_image_column="input_image",
        ),
        lambda texts: {"text_encoder": np.zeros((len(texts), 1), int)}, batch_size=3, seed=0, condition="column",
    )  # fmt: skip
    assert {"pixels", "conditioning", "input_ids"} <= next(loader).keys()
    loader.close()
    make(tmp_path / "empty", instruction="{season}", **flags)
    assert summary(tmp_path / "empty")["rejected"] == {"no instruction": 1}


def test_pairs_from_the_web(tmp_path: Path):
    """A pair of which one image is missing is rejected as one."""
    web = Web()
    pairs = [("good/1.jpg", "good/2.jpg"), ("good/3.jpg", "missing/4.jpg"), ("html/5.jpg", "good/6.jpg")]
    columns = {
        name: [f"{web.url}/{pair[i]}" for pair in pairs] for i, name in enumerate(("input_image", "edited_image"))
    }
    pq.write_table(pa.table({**columns, "edit_prompt": ["a", "b", "c"]}), tmp_path / "in.parquet")
    make(tmp_path / "out", input=str(tmp_path / "in.parquet"), are_urls=True, allow_private_addresses=True)
    web.close()
    assert [row["edit_prompt"] for row in rows_of(tmp_path / "out")] == ["a"]
    assert summary(tmp_path / "out")["rejected"] == {"HTTP 404": 1, "no picture": 1}


def test_two_folders(tmp_path: Path):
    """By name without ending, in subfolders too; what has no partner is left out."""
    before, after = tmp_path / "before", tmp_path / "after"
    images(before / "x", 4)
    images(after / "x", 3)
    with Image.open(after / "x/0001.jpg") as image:
        image.save(after / "x/0001.png")
    (after / "x/0001.jpg").unlink()
    (after / "x/0002.jpg").write_bytes(jpeg(2, (80, 20)))
    flags = {"before_dir": str(before), "after_dir": str(after)}
    make(tmp_path / "out", instruction="draw {name} of {folder}", **flags)
    assert [row["edit_prompt"] for row in rows_of(tmp_path / "out")] == ["draw 0000 of x", "draw 0001 of x"]
    assert summary(tmp_path / "out")["rejected"] == {"two pictures of different shapes": 1}
    lines = [json.dumps({"file_name": name, "instruction": f"of {name}"}) for name in ("x/0000.jpg", "x/0001")]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    make(tmp_path / "table", instructions=str(tmp_path / "table.jsonl"), **flags)
    assert [row["edit_prompt"] for row in rows_of(tmp_path / "table")] == ["of x/0000.jpg", "of x/0001"]
    assert summary(tmp_path / "table")["rejected"]["no instruction"] == 1


def test_flags_that_make_no_sense(tmp_path: Path):
    folder = str(images(tmp_path / "in", 1))
    for changes, message in [
        ({}, "give either --input, a table, or --before_dir and --after_dir"),
        ({"before_dir": folder}, "--before_dir and --after_dir need each other"),
        ({"before_dir": folder, "after_dir": folder, "teacher": "x"}, "--teacher generates both images"),
        ({"before_dir": folder, "after_dir": folder}, "give --instruction, one for all pairs, or --instructions"),
        (
            {"before_dir": folder, "after_dir": f"{folder}x", "instruction": "x"},
            r"there is no folder .*inx: check --after_dir",
        ),
        ({"before_dir": folder, "after_dir": folder, "instruction": "{season}"}, r"--instruction has \{season\}, but"),
        ({"before_dir": folder, "after_dir": folder, "instruction": "{"}, "the template '{' cannot be read"),
        ({"input": "x.parquet", "min_shared": 0.9, "max_shared": 0.1}, "--max_shared 0.1 is not possible"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match="only names of columns"):
        fields_of("{row.__class__}")
    assert not (tmp_path / "out").exists()


def test_scores_are_the_formulas():
    """Cosines in float64, written from the paper: of the pictures, of the two differences, of picture and caption."""
    rng = np.random.default_rng(0)
    a, b, texts = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), rng.standard_normal((2, 5))
    before, after = np.zeros((3, 2, 2, 3), np.uint8), np.ones((3, 2, 2, 3), np.uint8)
    encoder = Encoder(lambda pictures: b if pictures.any() else a, lambda captions: texts)
    scores = compare(encoder, before, after, ("x", "y"))

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return u @ v / np.sqrt((u @ u) * (v @ v))

    def unit(u: np.ndarray) -> np.ndarray:
        return u / np.sqrt(u @ u)

    assert scores.direction is not None
    assert scores.caption is not None
    for i in range(3):
        assert scores.image[i] == pytest.approx(cosine(a[i], b[i]))
        changes = unit(b[i]) - unit(a[i]), unit(texts[1]) - unit(texts[0])
        assert scores.direction[i] == pytest.approx(cosine(*changes))
        assert scores.caption[i] == pytest.approx(min(cosine(a[i], texts[0]), cosine(b[i], texts[1])))
    assert compare(Encoder(encoder.images), before, after, ("x", "y")).direction is None


def test_the_filter():
    """0.7, 0.2 and 0.2, those of the paper's code, themselves included; without texts only pictures count."""
    image, direction, caption = (
        np.array(x) for x in ([0.7, 0.69, 0.9, 0.9], [0.2, 0.9, 0.19, 0.9], [0.2, 0.9, 0.9, 0.1])
    )
    assert passes(Scores(image, direction, caption), GenerateFlags()).tolist() == [True, False, False, False]
    assert passes(Scores(image), GenerateFlags()).tolist() == [True, False, True, True]


def test_clip_of_transformers(tmp_path: Path):
    """Features are those of its own model; a folder that is none is named."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {**TEXT, "projection_dim": 8}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "projection_dim": 8,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    processor = CLIPProcessor(
        CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}), make_tokenizer(tmp_path / "tokenizer")
    )
    processor.save_pretrained(tmp_path)
    encoder = clip_encoder(str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    assert encoder.texts is not None
    inputs = processor(text=["a fox", "b"], images=list(pictures), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    np.testing.assert_allclose(unit(encoder.images(pictures)), out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(unit(encoder.texts(["a fox", "b"])), out.text_embeds.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"--clip_model .*nothing could not be loaded"):
        clip_encoder(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_pairs_drawn_by_a_model(tmp_path: Path, tmp_path_factory, monkeypatch):
    """The best of those that pass are kept; the same again from the same seed; a row that gives none is counted."""
    model = saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))
    rows = [("a fox", "make it blue", "a blue fox"), ("a dog", "", "a cat"), ("reject", "it", "me")]
    lines = [json.dumps(dict(zip(("input", "edit", "output"), row, strict=True))) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    seen: list[Scores] = []

    def scores(encoder, before, after, captions) -> Scores:
        assert before.shape == after.shape == (2, 32, 32, 3) or len(before) == 1
        direction = after.mean(axis=(1, 2, 3)) / 255
        seen.append(Scores(np.ones(len(before)), direction, np.full(len(before), 1.0 - (captions[0] == "reject"))))
        return seen[-1]

    monkeypatch.setattr(edits, "compare", scores)
    monkeypatch.setattr(edits, "_load_encoder", lambda _: None)
    flags = {
        "input": str(tmp_path / "prompts.jsonl"), "teacher": str(model), "steps": 2, "sampler": "ddim",
        "samples_per_prompt": 5, "pairs_at_a_time": 2, "max_pairs_per_prompt": 3, "image_format": "png",
    }  # fmt: skip
    make(tmp_path / "out", **flags)
    directions = np.concatenate([score.direction for score in seen[:3]])
    assert len(directions) == 5
    made = rows_of(tmp_path / "out")
    assert [row["edit_prompt"] for row in made] == ["make it blue"] * 3
    best = np.sort(directions)[::-1][:3]
    drawn = [pixels(tmp_path / "out" / row["edited_image"]).mean() / 255 for row in made]
    np.testing.assert_allclose(drawn, best, atol=1e-6)
    assert len({(tmp_path / "out" / row["input_image"]).read_bytes() for row in made}) == 3
    assert summary(tmp_path / "out")["rejected"] == {
        "a caption or the instruction is missing": 1, "no pair passes the filter": 1,
    }  # fmt: skip
    make(tmp_path / "again", **flags)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
