"""What is written in each format is read by training, by `datasets` and by plain tools; on object stores too."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image
from test_coyo import contents, images, make, rows_of

from codi_jax.data import DataFlags, load_data
from codi_jax.data.files import Folder
from codi_jax.data.sources import files_fingerprint, open_source

COUNT = 22
FORMATS = ["folder", "save_to_disk", "parquet", "webdataset"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):  # which forbids every URL
        monkeypatch.setattr(datasets.config, name, False)


@pytest.fixture(params=["disk", "object store"])
def target(request, tmp_path) -> Iterator[str]:
    """A folder to write: on disk, or in an object store of fsspec's, which knows no more than one of a cloud."""
    if request.param == "disk":
        yield str(tmp_path / "out")
        return
    yield f"memory://{tmp_path.name}/out"
    fsspec.filesystem("memory").store.clear()


def number_of(text: str) -> int:
    return int(text.removeprefix("picture "))


def tokens(texts: list[str]) -> dict[str, np.ndarray]:
    return {"text_encoder": np.array([[number_of(text)] for text in texts])}


def read_by_training(**flags) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image and condition of each caption, over the batches of one epoch."""
    loader = load_data(
        DataFlags(**{"resolution": 32, "center_crop": True} | flags), tokens, batch_size=4, seed=0, condition="column"
    )
    found = {}
    for _ in range(30):
        batch = next(loader)
        for row, number in enumerate(batch["input_ids"]["text_encoder"][:, 0].tolist()):
            found[number] = batch["pixels"][row], batch["conditioning"][row]
    loader.close()
    return found


@pytest.fixture
def expected(tmp_path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    make(
        images(tmp_path / "in", 26),
        tmp_path / "expected",
        center_crop=True,
        image_format="png",
        max_train_samples=COUNT,
    )
    pictures = {}
    for row in rows_of(tmp_path / "expected"):
        with Image.open(tmp_path / "expected" / row["image"]) as image:
            pixels = np.asarray(image)
        with Image.open(tmp_path / "expected" / row["conditioning_image"]) as image:
            pictures[number_of(row["text"])] = pixels, np.repeat(np.asarray(image)[..., None], 3, axis=2)
    assert pictures.keys() == set(range(COUNT))
    return pictures


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for number, arrays in expected.items():
        for one, other in zip(found[number], arrays, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("output_format", FORMATS)
def test_training_reads_every_format(tmp_path: Path, target: str, expected, output_format: str):
    """22 samples in shards of 8: the last of three is cut off."""
    flags = {"center_crop": True, "image_format": "png", "max_train_samples": COUNT, "output_format": output_format}
    make(tmp_path / "in", target, **flags)
    assert_same(read_by_training(train_data_dir=target), expected)
    if output_format == "webdataset":
        assert_same(read_by_training(train_shards_path_or_url=f"{target}/train-{{00000..00002}}.tar"), expected)
    elif output_format == "save_to_disk":
        assert_same(read_by_training(train_data_dir=target, load_from_disk=True), expected)
    assert_same(read_by_training(train_data_dir=target, streaming=True), expected)
    make(tmp_path / "in", target, **flags)  # which finds that it is finished
    names = Folder(target).names()
    assert ".unfinished" not in names
    assert not [name for name in names if "unfinished" in name]


def test_a_tar_is_one_for_others(tmp_path: Path):
    """Members of a sample follow each other under one key; without times and users it is the same every time."""
    source = images(tmp_path / "in", 5)
    for name in ("one", "two"):
        make(source, tmp_path / name, output_format="webdataset", shard_size=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").glob("*.tar")) == [f"train-0000{n}.tar" for n in range(3)]
    with tarfile.open(tmp_path / "one/train-00001.tar") as tar:
        names = tar.getnames()
        text = tar.extractfile("image_000000003.txt").read()
        picture = Image.open(io.BytesIO(tar.extractfile("image_000000003.jpg").read()))
        assert tar.getmember(names[0]).mtime == 0
    assert text == b"picture 3"
    assert min(picture.size) == 32
    assert names == [
        f"image_00000000{number}.{ending}"
        for number in (2, 3)
        for ending in ("jpg", "conditioning_image.png", "txt", "id.txt")
    ]


def test_parquet_has_the_types_of_images(tmp_path: Path):
    make(images(tmp_path / "in", 5), tmp_path / "out", output_format="parquet", shard_size=2, max_train_samples=3)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        "train-00000.parquet", "train-00001.parquet",
    ]  # fmt: skip
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows["text"][:] == ["picture 0", "picture 1", "picture 2"]
    assert rows[2]["image"].size == (38, 32)


def test_the_same_runs_give_the_same_save_to_disk(tmp_path: Path):
    source = images(tmp_path / "in", 5)
    for name in ("one", "two"):
        make(source, tmp_path / name, output_format="save_to_disk", shard_size=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_fingerprint_of_a_remote_folder_is_that_of_its_files(tmp_path: Path):
    target = f"memory://{tmp_path.name}/print"
    make(images(tmp_path / "in", 3), target)
    first = files_fingerprint(open_source(train_data_dir=target))
    assert files_fingerprint(open_source(train_data_dir=target)) == first
    row = json.loads(Folder(target).read("meta.jsonl").splitlines()[0])
    Folder(target).write_all({row["image"]: b"other"})
    assert files_fingerprint(open_source(train_data_dir=target)) != first


def test_urls_that_cannot_be_opened():
    with pytest.raises(ValueError, match="nosuch://x/y cannot be opened: Protocol not known"):
        open_source(train_data_dir="nosuch://x/y")
    with pytest.raises(ValueError, match="there is no folder memory://nothing/here: check --train_data_dir"):
        open_source(train_data_dir="memory://nothing/here")
