"""Data sets as others write them: folders with JSON lines, save_to_disk, parquet, imagefolder."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_folders import count_tokens, numbered, write_folder
from test_load import numbers, take

from codi_jax.data import DataFlags, load_data, streams
from codi_jax.data.columns import captions_of
from codi_jax.data.preparation.rows import InputRow
from codi_jax.data.preparation.tables import TableFlags, open_table
from codi_jax.data.sources import files_fingerprint, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def hf_dataset(count: int = 6) -> datasets.Dataset:
    """As on the hub: pictures inside, text, and conditions of another name."""
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "edges": datasets.Image()}
    rows = {
        "image": [numbered(i) for i in range(count)],
        "text": [str(i) for i in range(count)],
        "edges": [numbered(i + 100) for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def check(flags: DataFlags, count: int = 6, condition="column", offset: int = 0) -> None:
    """All samples come, each with its caption and its condition."""
    loader = load_data(flags, count_tokens, batch_size=3, seed=0, condition=condition)
    seen = []
    for batch in take(loader, count // 3):
        assert batch["pixels"][:, 16, 16, 0].tolist() == numbers(batch)
        if condition:
            assert (batch["conditioning"][:, 16, 16, 0] == np.array(numbers(batch)) + offset).all()
        seen += numbers(batch)
    assert sorted(seen) == list(range(count))


def flags(folder: Path | None, **changes) -> DataFlags:
    return DataFlags(train_data_dir=folder and str(folder), resolution=32, **changes)


def rewrite(folder: Path, change) -> None:
    """Applies a function to each row of meta.jsonl."""
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    (folder / "meta.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.mark.parametrize("load_from_disk", [False, True])
@pytest.mark.parametrize("name", ["meta.jsonl", "metadata.jsonl"])
def test_a_folder_as_the_originals_preprocessing_makes_it(tmp_path, load_from_disk, name):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32), name=name)
    check(flags(folder, load_from_disk=load_from_disk))


def test_a_folder_in_the_place_of_a_name(tmp_path):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32))
    check(DataFlags(dataset_name=str(folder), load_from_disk=True, resolution=32))


def test_absolute_paths(tmp_path):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32))
    absolute = {key: lambda path: str(folder.absolute() / path) for key in ("image", "conditioning_image")}
    rewrite(folder, lambda row: {key: absolute.get(key, str)(value) for key, value in row.items()})
    (folder / "meta.jsonl").rename(tmp_path / "meta.jsonl")
    check(flags(tmp_path))


@pytest.mark.parametrize(
    "names", [{"image": "file_name"}, {"text": "caption"}, {"image": "file_name", "text": "caption"}]
)
def test_other_usual_names_of_columns(tmp_path, names):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32))
    rewrite(folder, lambda row: {names.get(key, key): value for key, value in row.items()})
    check(flags(folder))


def test_columns_of_any_name(tmp_path):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32))
    names = {"image": "original_image", "text": "prompt", "conditioning_image": "transformed_image"}
    rewrite(folder, lambda row: {names[key]: value for key, value in row.items()})
    columns = {"image_column": "original_image", "caption_column": "prompt"}
    check(flags(folder, conditioning_image_column="transformed_image", **columns))


def test_rows_without_a_caption_and_blank_lines(tmp_path):
    folder = write_folder(tmp_path / "data", 3)
    lines = (folder / "meta.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = "\n" + json.dumps({**row, "text": None})
    lines[2] = json.dumps({"image": json.loads(lines[2])["image"], "text": []})
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n\n")
    with pytest.warns(UserWarning, match=r"2 of the 3 samples in .*meta.jsonl have no caption"):
        (batch,) = take(load_data(flags(folder), count_tokens, batch_size=3, seed=0), 1)
    assert sorted(numbers(batch)) == [-1, -1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "text": ', r"meta.jsonl, line 2 is not valid JSON .*: fix or delete it"),
        ('["a.png"]', "line 2 holds a JSON list instead of an object: fix or delete it"),
        ('{"text": "a"}', "line 2 has no 'image'"),
        ('{"image": 3, "text": "a"}', "line 2 has 3 under 'image', which is not a path of an image"),
        ('{"image": "a.png", "text": 7}', "line 2 has 7 under 'text', which is not a text or list of texts"),
        ('{"image": "a.png", "text": [1]}', "line 2 has"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    folder = write_folder(tmp_path / "data", 3)
    lines = (folder / "meta.jsonl").read_text().splitlines()
    (folder / "meta.jsonl").write_text("\n".join([lines[0], line, lines[2]]))
    with pytest.raises(ValueError, match=message) as error:
        load_data(flags(folder), count_tokens, batch_size=1, seed=0)
    assert "\n" not in str(error.value)


def test_a_line_that_is_no_text_is_named(tmp_path):
    folder = write_folder(tmp_path / "data", 2)
    (folder / "meta.jsonl").write_bytes((folder / "meta.jsonl").read_bytes() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"meta.jsonl, line 3 is not valid JSON"):
        load_data(flags(folder), count_tokens, batch_size=1, seed=0)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_list_is_refused(tmp_path, content):
    (tmp_path / "meta.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"meta.jsonl is empty: it needs one JSON object for each image"):
        load_data(flags(tmp_path), count_tokens, batch_size=1, seed=0)


@pytest.mark.parametrize("load_from_disk", [False, True])
@pytest.mark.parametrize("split", [None, "train", "all"])
def test_what_save_to_disk_writes(tmp_path, load_from_disk, split):
    data = hf_dataset() if split is None else datasets.DatasetDict({split: hf_dataset()})
    data.save_to_disk(str(tmp_path / "saved"))
    options = {"load_from_disk": load_from_disk, "conditioning_image_column": "edges"}
    check(flags(tmp_path / "saved", **options), offset=100)
    check(DataFlags(dataset_name=str(tmp_path / "saved"), resolution=32, **options), offset=100)


def test_several_splits_without_one_for_training_are_listed(tmp_path):
    datasets.DatasetDict({"red": hf_dataset(), "blue": hf_dataset()}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="has no split named train, but red, blue"):
        check(flags(tmp_path / "saved"))


@pytest.mark.parametrize("load_from_disk", [False, True])
def test_parquet_of_datasets(tmp_path, load_from_disk):
    (tmp_path / "data").mkdir()
    hf_dataset(3).to_parquet(tmp_path / "data" / "train-0.parquet")
    more = hf_dataset(6).select(range(3, 6))
    more.to_parquet(tmp_path / "data" / "train-1.parquet")
    options = {"load_from_disk": load_from_disk, "cache_dir": str(tmp_path / "cache")}
    check(flags(tmp_path / "data", conditioning_image_column="edges", **options), offset=100)


def test_parquet_of_pyarrow(tmp_path):
    """Bytes without a word on what they are, and lists of captions."""
    folder = write_folder(tmp_path / "data", 6)
    images = [(folder / f"images/{i}.png").read_bytes() for i in range(6)]
    (tmp_path / "parquet").mkdir()
    table = pa.table({"image": images, "caption": [[str(i), str(i)] for i in range(6)]})
    pq.write_table(table, tmp_path / "parquet" / "part.parquet")
    check(flags(tmp_path / "parquet", cache_dir=str(tmp_path / "cache")), condition=None)


def test_a_data_set_with_workers(tmp_path):
    hf_dataset().save_to_disk(str(tmp_path / "saved"))
    check(flags(tmp_path / "saved", dataloader_num_workers=1), condition=None)


def test_an_image_folder_of_datasets(tmp_path):
    """A metadata.csv is none of ours: `datasets` reads it."""
    folder = write_folder(tmp_path / "data", 6)
    (folder / "meta.jsonl").unlink()
    rows = "".join(f"images/{i}.png,n{i}\n" for i in range(6))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    check(flags(folder, cache_dir=str(tmp_path / "cache")), condition=None)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("subfolders", [False, True])
def test_a_folder_of_images_and_nothing_else(tmp_path, monkeypatch, streaming, subfolders):
    """Enough for training without text, which has no tokenizer."""
    monkeypatch.setattr(streams, "WINDOW", 6)
    for i in range(6):
        path = tmp_path / "data" / (f"class-{i % 2}" if subfolders else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered(i).save(path)
    of_folder = flags(tmp_path / "data", streaming=streaming, cache_dir=str(tmp_path / "cache"))
    batches = take(load_data(of_folder, None, batch_size=3, seed=0), 2)
    assert all(batch.keys() == {"pixels"} for batch in batches)
    assert sorted(n for batch in batches for n in batch["pixels"][:, 16, 16, 0]) == list(range(6))
    with pytest.raises(ValueError, match="has no column 'text': set --caption_column to one of image"):
        load_data(of_folder, count_tokens, batch_size=3, seed=0)


def test_captions_are_not_looked_at_without_a_tokenizer(tmp_path):
    """Neither missing ones nor what stands in their place."""
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32), captions=[1, *"abcde"])
    (batch,) = take(load_data(flags(folder), None, batch_size=6, seed=0, condition="column"), 1)
    assert batch.keys() == {"pixels", "conditioning"}
    rewrite(folder, lambda row: {key: value for key, value in row.items() if key != "text"})
    (again,) = take(load_data(flags(folder), None, batch_size=6, seed=0, condition="column"), 1)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(
        ValueError, match=r"holds no data set: it has no meta.jsonl or metadata.jsonl.*notes.md"
    ) as error:
        check(flags(tmp_path, cache_dir=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)


def test_a_data_set_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"nobody/nothing could not be loaded: .*--dataset_name") as error:
        check(DataFlags(dataset_name="nobody/nothing", resolution=32))
    assert "\n" not in str(error.value)


def test_a_missing_column_lists_those_that_exist(tmp_path):
    hf_dataset().save_to_disk(str(tmp_path / "saved"))
    for changes, flag in (
        ({"image_column": "picture"}, "no column 'picture': set --image_column to one of image, text, edges"),
        ({"caption_column": "words"}, "no column 'words': set --caption_column to one of"),
        ({}, "no column 'conditioning_image': set --conditioning_image_column to one of image, text, edges"),
    ):
        with pytest.raises(ValueError, match=flag):
            check(flags(tmp_path / "saved", **changes))


def test_a_column_that_holds_no_captions_is_named(tmp_path):
    table = pa.table({"image": [b"x"], "text": [3]})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "part.parquet")
    with pytest.raises(ValueError, match=r"'text' of .* holds Value\('int64'\), not texts .*: set --caption_column"):
        load_data(flags(tmp_path / "data", cache_dir=str(tmp_path)), count_tokens, batch_size=1, seed=0)


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    hf_dataset().select([]).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"data holds no .* no data!"):
        check(flags(tmp_path / "data", conditioning_image_column="edges", cache_dir=str(tmp_path / "cache")))


# What str.splitlines takes for ends of lines, and files do not.
SEPARATORS = "\u2028\u2029\x85\v\f\x1c\x1d\x1e"


def test_prompts_are_cut_where_files_cut_lines_and_nowhere_else(tmp_path):
    prompts = [f"a{separator}b" for separator in SEPARATORS]
    for end, mark in itertools.product(("\n", "\r\n"), ("", "\ufeff")):
        file = tmp_path / "prompts.txt"
        file.write_bytes((mark + end.join(["first", *prompts, "", "last"])).encode())
        source = open_source(train_prompts=str(file), image_column=None)
        assert [row["text"] for row in source.rows] == ["first", *prompts, "last"]


def test_json_lines_are_cut_where_files_cut_lines_and_nowhere_else(tmp_path):
    folder = write_folder(tmp_path / "data", 6, condition_size=(32, 32))
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "text": f"a{SEPARATORS[i]}b"}, ensure_ascii=False) for i, row in enumerate(rows)]
    (folder / "meta.jsonl").write_bytes("\ufeff".encode() + "\n".join(lines).replace("\v", "\\u000b").encode())
    source = open_source(train_data_dir=str(folder))
    assert [row["text"] for row in source.rows] == [json.loads(line)["text"] for line in lines_of(folder)]
    assert next(iter(source.rows))["text"] == "a\u2028b"


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "meta.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_of_texts_has_the_captions_that_it_says(tmp_path, kind):
    captions = ["NA", "null", "None", "n/a", 'a 5" pipe', "a\u2028b\x85c", "nan"]
    separator = {"csv": ",", "tsv": "\t"}[kind]
    (tmp_path / "data").mkdir()
    lines = [f"image{separator}text", *(f"{i}.png{separator}{caption}" for i, caption in enumerate(captions))]
    (tmp_path / "data" / f"train.{kind}").write_bytes(("\ufeff" + "\n".join(lines) + "\n").encode())
    source = open_source(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in source.rows] == captions
    assert [row["image"] for row in source.rows] == [f"{i}.png" for i in range(len(captions))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("subfolder", [".", "train"])
def test_a_folder_of_pictures_with_captions_beside_them(tmp_path, monkeypatch, streaming, subfolder):
    monkeypatch.setattr(streams, "WINDOW", 6)
    folder = tmp_path / "data" / subfolder
    folder.mkdir(parents=True)
    for i in range(6):
        numbered(i).save(folder / f"picture.{i}.png")
        (folder / f"picture.{i}.txt").write_bytes(b"\xef\xbb\xbf" + f"{i}\r\n".encode())
    check(flags(tmp_path / "data", streaming=streaming), condition=None)


def test_captions_beside_pictures_are_those_that_the_data_tool_reads(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i, text in enumerate(["one\ntwo", "\u2028 a b\0", "", None]):
        numbered(i).save(folder / f"{i}.png")
        if text is not None:
            (folder / f"{i}.txt").write_text(text)
    with pytest.warns(UserWarning, match="2 of the 4 pictures in .*data have no caption"):
        source = open_source(train_data_dir=str(folder))
    items, _ = open_table(TableFlags(input=str(folder)), lambda names, where: pytest.fail("no columns are asked for"))
    tool = {row.id: row.texts["text"] for row in items() if isinstance(row, InputRow)}
    assert {row["image"]: row["text"] for row in source.rows} == tool
    assert tool["0.png"] == "one two"
    (folder / "0.txt").write_text("three")
    with pytest.warns(UserWarning, match="have no caption"):
        assert open_source(train_data_dir=str(folder)).fingerprint != source.fingerprint


def test_a_column_that_captions_beside_pictures_do_not_make_is_named(tmp_path):
    numbered(0).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("one")
    with pytest.raises(ValueError, match="no column 'conditioning_image': set --conditioning_image_column to one of"):
        open_source(train_data_dir=str(tmp_path), condition_column="conditioning_image")


def test_captions_in_every_form():
    assert captions_of("a") == ["a"]
    assert captions_of(["a", "b"]) == ["a", "b"]
    assert captions_of(None) == captions_of([]) == [""]
    with pytest.raises(ValueError, match="must be a text or a list of texts"):
        captions_of(3)


def test_the_fingerprint_is_of_the_files(tmp_path):
    folder = write_folder(tmp_path / "data", 3)
    before = files_fingerprint(open_source(train_data_dir=str(folder)))
    assert files_fingerprint(open_source(train_data_dir=str(folder))) == before
    numbered(9).save(folder / "images/1.png")
    assert files_fingerprint(open_source(train_data_dir=str(folder))) != before


def test_the_fingerprint_of_saved_data_is_that_of_its_content(tmp_path):
    hf_dataset().save_to_disk(str(tmp_path / "saved"))
    first = files_fingerprint(open_source(train_data_dir=str(tmp_path / "saved")))
    assert files_fingerprint(open_source(train_data_dir=str(tmp_path / "saved"))) == first
