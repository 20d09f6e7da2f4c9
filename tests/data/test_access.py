"""What a table may make this machine open: its own folder's files, and public addresses, by the downloader."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_folders import count_tokens, numbered, write_folder
from test_load import numbers, take
from web import Web, jpeg

from codi_jax.data import DataFlags, load_data, streams
from codi_jax.data.access import Access
from codi_jax.data.images import UnreadableImageError, read_image
from codi_jax.data.sources import open_source
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a picture, and one beside it."""
    for folder in ("data", "data-of-others"):
        (tmp_path / folder / "images").mkdir(parents=True)
        numbered(7).save(tmp_path / folder / "images/a.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "data-of-others/images")
    return tmp_path / "data"


def test_paths_in_the_folder(data: Path):
    inside = ["images/a.png", "./images/../images/a.png", f"{data}/images/a.png", f"file://{data}/images/a.png"]
    inside += [f"{data}/../data/images/a.png", "linked/a.png"]  # a link is the user's own
    for name in inside:
        assert Access(str(data)).read(name) == (data / "images/a.png").read_bytes(), name
    (data.parent / "alias").symlink_to(data)
    assert Access(str(data.parent / "alias")).read(f"{data}/images/a.png")


def test_paths_elsewhere(data: Path, monkeypatch: pytest.MonkeyPatch):
    """Unless the user trusts the table."""
    monkeypatch.chdir(data)
    fsspec.filesystem("memory").pipe("/elsewhere/a.png", (data / "images/a.png").read_bytes())
    others = f"{data}-of-others/images/a.png"
    outside = [
        others,
        f"file://{others}",
        f"local://{others}",
        "../data-of-others/images/a.png",
        "memory://elsewhere/a.png",
    ]
    for name in outside:
        with pytest.raises(RejectedError, match="is outside of the data's folder, where only --allow_outside_paths"):
            Access(str(data)).read(name)
        assert Access(str(data), anywhere=True).read(name), name
    chained = [f"simplecache::file://{others}", "zip://a.png::memory://x.zip", "simplecache::http://127.0.0.1/x"]
    for name in (*chained, "gs://bucket/x.png", "hf://datasets/a/b/x.png", "ftp://127.0.0.1/x.png"):
        with pytest.raises(RejectedError, match="outside"):
            Access(str(data)).locate(name)
    with pytest.raises(RejectedError, match="outside"):
        Access().locate("images/a.png")
    for name in ("/dev/zero", "\0", "nothing.png", "images"):
        with pytest.raises(RejectedError, match="no such file"):
            Access(str(data), anywhere=True).read(name)


def test_folders_on_an_object_store():
    files = fsspec.filesystem("memory")
    files.pipe({"/store/data/a.png": b"a", "/store/data2/a.png": b"b"})
    access = Access("memory://store/data")
    assert access.read("a.png") == access.read("memory://store/data/a.png") == access.read("x/../a.png") == b"a"
    for name in (
        "../data2/a.png",
        "memory://store/data2/a.png",
        "/etc/hostname",
        "file:///etc/hostname",
        "gs://store/data/a",
    ):
        with pytest.raises(RejectedError, match="outside"):
            access.locate(name)
    files.store.clear()


def test_addresses_are_downloaded(web: Web):
    """The only way to them, with its limits, and not to private hosts, unless the user named the folder there."""
    address = f"{web.url}/good/3.jpg"
    for access in (Access(), Access(anywhere=True), Access("memory://x")):
        before = web.asked.total()
        with pytest.raises(UnreadableImageError, match="a private address"):
            read_image(address, access)
        assert web.asked.total() == before
    assert Access(downloads=DownloadFlags(allow_private_addresses=True)).read(address) == jpeg(3)
    with pytest.raises(RejectedError, match="larger than 20 MB"):
        Access(downloads=DownloadFlags(allow_private_addresses=True)).read(f"{web.url}/endless/1")
    assert web.sent["/endless/1"] < 100e6
    assert Access(f"{web.url}/good").read("3.jpg") == jpeg(3)
    with pytest.raises(RejectedError, match="a private address"):
        Access(f"{web.url}/good").read(f"{web.url}/typed/3.jpg")


def flags(folder: Path, **changes) -> DataFlags:
    return DataFlags(train_data_dir=str(folder), resolution=32, **changes)


@pytest.mark.parametrize("kind", ["absolute", "file", "above"])
def test_training_reads_nothing_outside_of_its_folder(tmp_path: Path, kind: str):
    """Which is found before anything else is loaded."""
    write_folder(tmp_path / "others", 6)
    names = {
        "absolute": f"{tmp_path}/others/images/",
        "file": f"file://{tmp_path}/others/images/",
        "above": "../others/images/",
    }
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"image": f"{names[kind]}{i}.png", "text": str(i)}) for i in range(6)]
    (tmp_path / "data/meta.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"meta\.jsonl, line 1 names .*0\.png: .* --allow_outside_paths"):
        load_data(flags(tmp_path / "data"), count_tokens, batch_size=3, seed=0)
    batches = take(load_data(flags(tmp_path / "data", allow_outside_paths=True), count_tokens, batch_size=3, seed=0), 2)
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(6))


@pytest.mark.parametrize("streaming", [False, True])
def test_training_downloads_what_a_table_names(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "WINDOW", 6)  # an epoch
    web = Web()
    table = {"image": [f"{web.url}/good/{i}.jpg" for i in range(6)], "text": [str(i) for i in range(6)]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(table), tmp_path / "data/a.parquet")
    loader = load_data(flags(tmp_path / "data", streaming=streaming), count_tokens, batch_size=3, seed=0)
    with pytest.raises(ValueError, match=r"could not be read.* a private address"):
        take(loader, 1)
    loader.close()
    assert not web.asked
    allowed = flags(tmp_path / "data", streaming=streaming, allow_private_addresses=True)
    batches = take(load_data(allowed, count_tokens, batch_size=3, seed=0), 2)
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(6))
    web.close()


def test_a_saved_data_set_does_not_say_itself_what_to_trust(tmp_path: Path):
    """An image folder of `datasets` holds paths of its own; what save_to_disk leaves is a table like any other."""
    numbered(1).save(tmp_path / "secret.png")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "text": ["1"]})
    rows.info.builder_name = "imagefolder"
    rows.save_to_disk(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/dataset_info.json").read_text())["builder_name"] == "imagefolder"
    source = open_source(train_data_dir=str(tmp_path / "saved"))
    with pytest.raises(UnreadableImageError, match="outside"):
        read_image(source.row(0)["image"], source.access)


def test_an_archive_of_images_is_read_from_the_cache(tmp_path: Path):
    """`datasets` unpacks it, so that its paths are not in the folder."""
    (tmp_path / "data").mkdir()
    numbered(5).save(tmp_path / "5.png")
    with zipfile.ZipFile(tmp_path / "data/train.zip", "w") as archive:
        archive.write(tmp_path / "5.png", "5.png")
    (tmp_path / "5.png").unlink()
    source = open_source(train_data_dir=str(tmp_path / "data"), caption_column=None)
    assert np.asarray(read_image(source.row(0)["image"], source.access))[0, 0, 0] == 5
