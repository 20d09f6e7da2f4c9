"""The avatars data set: pictures, captions and edits belong together, and the same command gives the same bytes."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from codi_jax.data.avatars.looks import draw, split_of
from codi_jax.data.avatars.vocabulary import KINDS
from codi_jax.data.sources import open_source
from codi_jax.io.images import canny
from dataset_tools import avatars as tool

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, **flags: Any) -> list[dict[str, Any]]:
    tool.main(tool.Args(train_data_dir=str(folder), **{"max_train_samples": 12, "num_proc": 1, **flags}))
    return [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pictures_show_their_attributes(tmp_path: Path, split: str) -> None:
    rows = make(tmp_path / "data", split=split)
    assert len(rows) == 12
    assert len({row["attributes"] for row in rows}) == 12
    for row in rows:
        look = json.loads(row["attributes"])
        assert split_of(look) == split
        picture = pixels(tmp_path / "data" / row["image"])
        np.testing.assert_array_equal(picture, draw(look, 64))
        np.testing.assert_array_equal(pixels(tmp_path / "data" / row["conditioning_image"]), canny(picture))
        assert look["background"] in row["text"]
    source = open_source(train_data_dir=str(tmp_path / "data"), condition_column="conditioning_image")
    assert [source.row(number)["text"] for number in range(12)] == [row["text"] for row in rows]


def test_edits_change_one_picture_into_the_other(tmp_path: Path) -> None:
    for row in make(tmp_path / "data", task="edit", kinds=("person", "planet"), resolution=32):
        before, after = json.loads(row["attributes"]), json.loads(row["edited_attributes"])
        assert before["kind"] == after["kind"] in ("person", "planet")
        assert before != after
        for look, column in ((before, "input_image"), (after, "edited_image")):
            np.testing.assert_array_equal(pixels(tmp_path / "data" / row[column]), draw(look, 32))


def test_processes_and_formats_do_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "one")
    command = [sys.executable, "dataset_tools/avatars.py", "--train_data_dir", str(tmp_path / "two")]
    flags = ["--max_train_samples", "12", "--num_proc", "2", "--shard_size", "5"]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    names = ["meta.jsonl", *(f"images/image_{number:09}.png" for number in range(12))]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False) == (names, [], [])
    tool.main(tool.Args(train_data_dir=str(tmp_path / "tar"), max_train_samples=12, output_format="webdataset"))
    streamed = open_source(train_shards=str(tmp_path / "tar" / "train-00000.tar"))
    captions = [json.loads(line)["text"] for line in (tmp_path / "one" / "meta.jsonl").read_text().splitlines()]
    assert [row["text"] for row in streamed.rows] == captions


def test_the_flag_names_every_kind() -> None:
    assert get_args(tool.KindName) == tuple(KINDS)


def test_conditions_that_no_picture_gives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--condition depth_from_file is not possible"):
        make(tmp_path / "data", condition="depth_from_file")
    with pytest.raises(ValueError, match="--condition edges is none of canny"):
        make(tmp_path / "data", condition="edges")
