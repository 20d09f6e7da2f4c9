"""The emoji data set: what is in it, that it is the same every time, and that nothing is in both splits."""

import filecmp
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codi_jax.data.preparation.emoji import read_emoji
from codi_jax.io.images import canny
from dataset_tools import emoji as tool

ROOT = Path(__file__).resolve().parents[2]
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "emoji"
    tool.build(tool.Args(folder))
    return folder


def read_rows(folder: Path) -> Rows:
    return {
        split: [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    return read_rows(folder)


@pytest.fixture(scope="module")
def edits(folder: Path) -> Rows:
    return read_rows(folder / "edits")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def by_codepoints(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["codepoints"]: row for split in rows.values() for row in split}


def test_all_named_pictures_are_there(folder: Path, rows: Rows) -> None:
    counts = {split: len(of_split) for split, of_split in rows.items()}
    assert counts == {"train": 3553, "validation": 400}
    for split, of_split in rows.items():
        named = {row["file_name"] for row in of_split} | {row["conditioning_image"] for row in of_split}
        found = {str(path.relative_to(folder / split)) for path in (folder / split).rglob("*.png")}
        assert named == found


def test_pictures_are_rgb_on_white_with_their_edges(folder: Path, rows: Rows) -> None:
    for row in rows["validation"][::20]:
        picture = pixels(folder / "validation" / row["file_name"])
        assert picture.shape == (64, 64, 3)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        np.testing.assert_array_equal(border, 255)
        edges = Image.open(folder / "validation" / row["conditioning_image"])
        assert edges.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(edges), np.repeat(canny(picture)[..., None], 3, axis=-1))
    conditions = (folder / "validation" / "conditioning_images").iterdir()
    assert [path.stem for path in conditions if not pixels(path).any()] == []


@pytest.mark.parametrize(
    ("codepoints", "char", "caption", "family"),
    [
        ("1f469-1f3fd-200d-1f680", "👩🏽‍🚀", "woman astronaut, medium skin tone", "1f9d1-1f680"),
        ("1f469-1f3ff-200d-1f9b0", "👩🏿‍🦰", "woman, red hair, dark skin tone", "1f9d1"),
        ("1f471-1f3fc-200d-2642-fe0f", "👱🏼‍♂️", "man, blond hair, medium-light skin tone", "1f9d1"),
        ("1f1eb-1f1f7", "🇫🇷", "flag of France", "1f1e8-1f1f5"),  # with Clipperton Island, the same picture
        ("2764", "❤️", "red heart", None),
        (
            "1f469-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3ff",
            "👩🏻‍❤️‍💋‍👨🏿",
            "kiss, woman, man, light skin tone, dark skin tone",
            "1f9d1-2764-1f48b-1f9d1",
        ),
        ("1f468-200d-1f469-200d-1f467", "👨‍👩‍👧", "family, man, woman, girl", "family"),
        ("1f552", "🕒", "three o'clock", "clock"),
        ("1f7e6", "🟦", "blue square", "square"),
        ("2b1b", "⬛", "black large square", "square"),
    ],
)
def test_captions_and_families(rows: Rows, codepoints: str, char: str, caption: str, family: str | None) -> None:
    row = by_codepoints(rows)[codepoints]
    assert (row["emoji"], row["text"][0]) == (char, caption)
    assert family in (None, row["family"])


def test_captions_name_the_picture_and_keywords_add_to_it(rows: Rows) -> None:
    every = by_codepoints(rows).values()
    first = [row["text"][0] for row in every]
    assert len(set(first)) == len(first)
    for row in every:
        said = row["text"][0].split(", ")
        assert all(set(said) <= set(more.split(", ")) and more != row["text"][0] for more in row["text"][1:])
        assert all(text == text.strip() and "_" not in text and "’" not in text for text in row["text"])
        tones = row["text"][0].count("skin tone")
        assert all(text.count("skin tone") == tones for text in row["text"])
    astronaut = by_codepoints(rows)["1f469-1f3fd-200d-1f680"]["text"]
    assert astronaut[1] == "woman astronaut, space, rocket, medium skin tone"
    # "female" and "black" are said of the woman, and of the red heart, by the keywords.
    assert not any("female" in text for text in astronaut)
    assert not any("black" in text for text in by_codepoints(rows)["2764"]["text"])
    assert sum(len(row["text"]) > 1 for row in every) > 3500


def test_no_family_is_in_both_splits(rows: Rows, edits: Rows) -> None:
    families = {split: {row["family"] for row in of_split} for split, of_split in rows.items()}
    assert not families["train"] & families["validation"]
    part = len(families["validation"]) / (len(families["train"]) + len(families["validation"]))
    assert 0.08 < part < 0.12
    for split in rows:
        assert {row["family"] for row in edits[split]} <= families[split]


def test_no_near_duplicates_are_in_both_splits(folder: Path, rows: Rows) -> None:
    """By a measure of its own: the share of their ink in which two pictures of 16 x 16 differ.

    Two faces that differ in the mouth alone are 0.03 apart, two flags with different arms less.
    """
    ink = {}
    for split, of_split in rows.items():
        small = [Image.open(folder / split / row["file_name"]).reduce(4) for row in of_split]
        ink[split] = 255 - np.stack([np.asarray(each, np.float32) for each in small]).reshape(len(small), -1)

    def nearest(picture: np.ndarray, others: np.ndarray) -> float:
        return (np.abs(others - picture).sum(axis=1) / (others.sum(axis=1) + picture.sum())).min()

    assert min(nearest(each, ink["train"]) for each in ink["validation"]) > 0.03
    train = ink["train"]  # the measure would find them
    assert min(nearest(train[i], np.delete(train, i, axis=0)) for i in range(0, 300, 3)) < 0.01


def test_variants_stay_together(rows: Rows) -> None:
    """Whatever differs by a modifier only: skin tones, hair, and the signs of gender and direction."""
    dropped = {*"1f3fb 1f3fc 1f3fd 1f3fe 1f3ff 1f9b0 1f9b1 1f9b2 1f9b3 2640 2642 27a1 200d fe0f".split()}  # noqa: SIM905
    persons = {"1f468": "1f9d1", "1f469": "1f9d1"}
    splits = defaultdict(set)
    for split, of_split in rows.items():
        for row in of_split:
            points = row["codepoints"].split("-")
            kept = [persons.get(point, point) for point in points if point not in dropped]
            splits["-".join(kept) or points[0]].add(split)
    assert {base: found for base, found in splits.items() if len(found) > 1} == {}
    assert sum("f3fb" in row["codepoints"] for row in rows["validation"]) > 20


def test_edit_counts(edits: Rows) -> None:
    counts = {split: Counter(row["kind"] for row in of_split) for split, of_split in edits.items()}
    assert counts == {
        "train": {"skin tone": 9180, "gender": 2760, "hair": 432, "direction": 180, "color": 212},
        "validation": {"skin tone": 720, "gender": 180, "direction": 36, "color": 86},
    }


def test_edits_name_files_and_their_variants(folder: Path, edits: Rows) -> None:
    for split, of_split in edits.items():
        base = folder / "edits" / split
        named = {row[key] for row in of_split for key in ("input_image", "edited_image")}
        assert all((base / name).is_file() and (base / name).resolve().parts[-3] == split for name in named)
        for row in of_split:
            assert {row["input_image"], row["edited_image"]} <= set(row["variants"])
            assert len(set(row["variants"])) == len(row["variants"])
    assert not list((folder / "edits").rglob("*.png"))


def test_an_edit_says_what_changes(edits: Rows, rows: Rows) -> None:
    every, named = [row for split in edits.values() for row in split], by_codepoints(rows)

    def edit(source: str, target: str) -> list[str]:
        ends = (f"/{source}.png", f"/{target}.png")
        return [
            row["edit_prompt"]
            for row in every
            if row["input_image"].endswith(ends[0]) and row["edited_image"].endswith(ends[1])
        ]

    assert edit("1f469-200d-1f680", "1f469-1f3ff-200d-1f680") == ["make the skin tone dark"]
    assert edit("1f469-1f3ff-200d-1f680", "1f469-200d-1f680") == ["make the skin tone yellow"]
    assert edit("1f469-1f3ff-200d-1f680", "1f468-1f3ff-200d-1f680") == ["make it a man"]
    assert edit("1f467", "1f466") == ["make it a boy"]
    assert edit("1f468-200d-1f9b2", "1f468-200d-1f9b0") == ["give them red hair"]
    assert edit("1f9d4", "1f468-200d-1f9b2") == []  # a person and a man: two changes
    assert edit("2764", "1f499") == ["make it blue"]
    assert edit("1f6b6", "1f6b6-200d-27a1-fe0f") == ["make it face right"]
    assert edit("1f469-1f3ff-200d-1f680", "1f468-200d-1f680") == []  # two changes
    for row in every:
        if row["kind"] == "skin tone":
            tone = row["edit_prompt"].removeprefix("make the skin tone ")
            caption = named[Path(row["edited_image"]).stem]["text"][0]
            assert caption.endswith(f" {tone} skin tone") if tone != "yellow" else "skin tone" not in caption


def test_the_two_pictures_of_an_edit_differ(folder: Path, edits: Rows) -> None:
    cache = {path.stem: path.read_bytes() for path in folder.rglob("images/*.png")}
    ends = [[Path(row[key]).stem for key in ("input_image", "edited_image")] for each in edits.values() for row in each]
    assert [pair for pair in ends if cache[pair[0]] == cache[pair[1]]] == []


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_script_makes_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    """As a script, where its own name shadows the package `emoji`; with another hash seed; over an older build."""
    other = tmp_path / "a" / "emoji"
    (other / "edits" / "old").mkdir(parents=True)
    (other / "README.md").write_text(tool.TITLE)
    command = [sys.executable, str(ROOT / "dataset_tools" / "emoji.py"), "--output_dir", "a/emoji"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0].startswith("train: 3553 images of 1374 families; 12764 edits (9180 skin tone,")
    assert ran.stdout.splitlines()[-1] == "wrote a/emoji"
    assert files_of(other) == files_of(folder)
    assert filecmp.cmpfiles(folder, other, files_of(folder), shallow=False)[1:] == ([], [])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["emoji"]


def test_the_licence_stands_beside_the_pictures(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "CC-BY 4.0" in text
    assert "Twemoji" in text
    assert "emoji 2.16.0" in text


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("# Something else\n")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} holds something else: name a new or an empty"):
        tool.build(tool.Args(tmp_path))
    with pytest.raises(ValueError, match="is a file: name a folder"):
        tool.build(tool.Args(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"--validation_fraction 1\.0: it must lie between 0 and 1"):
        tool.build(tool.Args(tmp_path / "new", validation_fraction=1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "notes.txt"]


def test_what_was_there_stays_if_a_build_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "emoji"
    old.mkdir()
    (old / "README.md").write_text(tool.TITLE)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tool, "write_split", fail)
    monkeypatch.setattr(tool, "read_emoji", list)
    with pytest.raises(OSError, match="no space left"):
        tool.build(tool.Args(old))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["emoji", "emoji/README.md"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r'the package emoji is not installed: pip install -e "\.\[emoji\]"'):
        read_emoji()


@pytest.fixture(scope="module")
def with_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "emoji"
    tool.build(tool.Args(folder, copies=2))
    return folder


@pytest.mark.slow
def test_copies_are_added_to_the_training_pictures_alone(with_copies: Path, folder: Path, rows: Rows) -> None:
    found = read_rows(with_copies)
    assert found["train"][:3553] == rows["train"]
    assert found["validation"] == rows["validation"]
    assert len(found["train"]) == 3 * 3553
    assert {row["file_name"] for row in found["train"]} == {
        str(path.relative_to(with_copies / "train")) for path in (with_copies / "train" / "images").glob("*.png")
    }
    assert read_rows(with_copies / "edits") == read_rows(folder / "edits")
    same = filecmp.dircmp(with_copies / "validation" / "images", folder / "validation" / "images")
    assert same.diff_files == same.left_only == same.right_only == []


@pytest.mark.slow
def test_a_copy_is_the_picture_elsewhere(with_copies: Path) -> None:
    rows = read_rows(with_copies)["train"]
    train = by_codepoints({"train": rows[:3553]})
    copies = rows[3553 : 2 * 3553]  # the first round: --max_train_samples takes whole ones
    assert all("copy0" in row["file_name"] for row in copies)
    for copy in copies[::400]:
        original = train[copy["codepoints"]]
        assert (copy["text"], copy["family"]) == (original["text"], original["family"])
        picture, source = (pixels(with_copies / "train" / row["file_name"]) for row in (copy, original))
        assert picture.shape == (64, 64, 3)
        assert np.all(picture[[0, -1]] == 255)
        assert np.all(picture[:, [0, -1]] == 255)
        assert not np.array_equal(picture, source)
        assert np.any(picture < 128)
        edges = pixels(with_copies / "train" / copy["conditioning_image"])
        np.testing.assert_array_equal(edges[..., 0], canny(picture))


@pytest.mark.slow
def test_every_second_copy_shows_and_names_two_training_pictures(with_copies: Path) -> None:
    rows = read_rows(with_copies)["train"]
    names = {row["text"][0] for row in rows[:3553]}
    pairs = rows[2 * 3553 :]
    assert all("copy1" in row["file_name"] for row in pairs)
    for row in pairs:
        (caption,) = row["text"]
        parts = caption.split(" and ")
        halves = [(" and ".join(parts[:n]), " and ".join(parts[n:])) for n in range(1, len(parts))]
        assert any(first in names and second in names for first, second in halves), caption
    # Families are drawn alike: half of all pictures are people with a skin tone, but few of the families.
    toned = sum("skin tone" in row["text"][0].split(" and ")[-1] for row in pairs) / len(pairs)
    assert toned < 0.3


@pytest.mark.parametrize("args", [{"copies": -1}, {"validation_fraction": 1.0}])
def test_arguments_out_of_range_are_refused(tmp_path: Path, args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(args))}"):
        tool.build(tool.Args(tmp_path / "emoji", **args))
