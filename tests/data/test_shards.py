"""WebDataset shards: tar files as they are published, on disk and from a web server."""

import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from picture_folders import count_tokens, numbered
from test_load import take

from codi_jax.data import DataFlags, load_data

SIDE, COUNT = 16, 6


def write_shard(path: Path, first: int, endings: dict[str, str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + COUNT):
            for kind, ending in endings.items():
                data = io.BytesIO()
                if kind == "text":
                    data.write(str(number).encode())
                else:
                    shift = 100 if kind == "before" else 0
                    numbered(number + shift, (SIDE, SIDE)).save(data, "png")
                entry = tarfile.TarInfo(f"{number:06}.{ending}")
                entry.size = data.tell()
                data.seek(0)
                tar.addfile(entry, data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(2):
        write_shard(tmp_path / f"{shard:03}.tar", shard * COUNT, {"after": "png", "text": "txt"})
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def load(shards: str, condition=None, **changes):
    flags = DataFlags(**{"train_shards_path_or_url": shards, "resolution": SIDE, **changes})
    return load_data(flags, count_tokens, batch_size=4, seed=0, condition=condition)


def assert_all_samples(batches: list) -> None:
    numbers = np.concatenate([batch["pixels"][:, 0, 0, 0] for batch in batches])
    assert set(numbers.tolist()) == set(range(2 * COUNT))
    for batch in batches:
        np.testing.assert_array_equal(batch["input_ids"]["text_encoder"][:, 0], batch["pixels"][:, 0, 0, 0])


def test_shards_of_a_range(folder: Path) -> None:
    assert_all_samples(take(load(f"{folder}/{{000..001}}.tar"), 30))


def test_shards_from_a_web_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert_all_samples(take(load(f"{server}/{{000..001}}.tar"), 30))


def test_pairs_by_the_names_of_their_columns(tmp_path: Path) -> None:
    endings = {"before": "input_image.png", "after": "edited_image.png", "text": "edit_prompt.txt"}
    write_shard(tmp_path / "0.tar", 0, endings)
    columns = {"image_column": "edited_image", "caption_column": "edit_prompt"}
    loader = load(f"{tmp_path}/0.tar", "column", conditioning_image_column="input_image", **columns)
    batch = take(loader, 1)[0]
    np.testing.assert_array_equal(batch["conditioning"][:, 0, 0, 0], 100 + batch["pixels"][:, 0, 0, 0])
    np.testing.assert_array_equal(batch["input_ids"]["text_encoder"][:, 0], batch["pixels"][:, 0, 0, 0])


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no shard .*002\.tar: check --train_shards_path_or_url"):
        load(f"{folder}/{{000..002}}.tar")
    (folder / "000.tar").write_text("no tar file")
    with pytest.raises(ValueError, match=r"the shards .* could not be read"):
        load(f"{folder}/000.tar")
    with pytest.raises(ValueError, match="--train_data_dir and --train_shards_path_or_url exclude each other"):
        load("x.tar", train_data_dir=str(folder))
    with pytest.raises(ValueError, match="which --train_shards_path_or_url does not read"):
        load("x.tar", cache_latents=True)
