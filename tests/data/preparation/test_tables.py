"""Tables as others write them: what is in a cell is what the sample has."""

import json
from functools import partial
from pathlib import Path

import datasets
import pytest

from codi_jax.data.preparation.rows import InputRow, Skipped, Url
from codi_jax.data.preparation.tables import Filter, TableFlags, image_columns, open_table

# What pandas takes for missing, what str.splitlines takes for ends of lines, and a quote that never ends.
CAPTIONS = ["NA", "null", "None", "n/a", "nan", "-inf", "a\u2028b", "a\x85b", "a\x1cb", 'a 5" pipe', "last"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def read(file: Path, **options: object) -> list[InputRow | Skipped]:
    flags = TableFlags(input=str(file))
    items, _ = open_table(flags, partial(image_columns, flags, None), **options)  # type: ignore[arg-type]
    return list(items())


def write(file: Path, lines: list[str], mark: bool) -> Path:
    file.write_bytes((("\ufeff" if mark else "") + "\n".join(lines) + "\n").encode())
    return file


@pytest.mark.parametrize("mark", [False, True], ids=["", "byte order mark"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_row_has_its_own_caption(tmp_path: Path, kind: str, shuffle: bool, mark: bool) -> None:
    captions = CAPTIONS if kind != "tsv" else [*CAPTIONS, '"quoted from the start', 'and "to the end"']
    urls = [f"http://host/{i}.jpg" for i in range(len(captions))]
    if kind == "jsonl":
        lines = [json.dumps({"url": u, "text": t}, ensure_ascii=False) for u, t in zip(urls, captions, strict=True)]
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        lines = [f"text{separator}url", *(f"{t}{separator}{u}" for u, t in zip(urls, captions, strict=True))]
    rows = read(write(tmp_path / f"table.{kind}", lines, mark), shuffle=shuffle)
    found = {row.pictures["image"]: row.texts["text"] for row in rows if isinstance(row, InputRow)}
    wanted = [" ".join(caption.split()) for caption in captions]  # a caption is one line
    assert found == {Url(url): caption for url, caption in zip(urls, wanted, strict=True)}


def test_an_empty_cell_has_no_caption_and_no_address(tmp_path: Path) -> None:
    lines = ["text,url", ",http://host/0.jpg", "one,", "two,http://host/2.jpg"]
    rows = read(write(tmp_path / "table.csv", lines, False))
    assert [isinstance(row, InputRow) for row in rows] == [True, False, True]
    assert isinstance(rows[0], InputRow)
    assert rows[0].texts["text"] == ""


def test_scores_that_are_missing_are_rejected(tmp_path: Path) -> None:
    """A column that says NA somewhere is one of texts, and still one of scores."""
    scores = ["0.5", "NA", "0.1", "", "null", "1e-1", "0.9"]
    lines = ["text,url,similarity", *(f"t,http://host/{i}.jpg,{score}" for i, score in enumerate(scores))]
    rows = read(write(tmp_path / "table.csv", lines, False), filters=[Filter("similarity", ("similarity",), 0.4)])
    assert [isinstance(row, InputRow) for row in rows] == [True, *[False] * 5, True]
