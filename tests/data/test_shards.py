"""WebDataset shards: tar files as they are published, on disk and from a web server."""

import contextlib
import functools
import gzip
import io
import json
import re
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from picture_folders import count_tokens, numbered
from PIL import Image
from test_load import assert_same, take
from web import Web

from codi_jax.data import DataFlags, load_data, streams
from codi_jax.data.sources import open_source

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
    flags = DataFlags(**{"train_shards_path_or_url": shards or None, "resolution": SIDE, **changes})
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


def png(number: int) -> bytes:
    data = io.BytesIO()
    numbered(number, (SIDE, SIDE)).save(data, "png")
    return data.getvalue()


def write_members(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def samples(first: int = 0, count: int = COUNT) -> dict[str, bytes]:
    pairs = [{f"{n:04}.png": png(n), f"{n:04}.txt": str(n).encode()} for n in range(first, first + count)]
    return {name: data for pair in pairs for name, data in pair.items()}


def read(path: Path | str, batches: int = 12, **changes) -> tuple[set[tuple[int, int]], list[str]]:
    """Pairs of the numbers of pictures and of captions, -1 for an empty one, and what could not be read."""
    loader, problems = load(str(path), **changes), []
    loader._count = lambda key, reason: problems.append(reason)
    pairs = set()
    for batch in take(loader, batches):
        pairs |= set(zip(batch["pixels"][:, 0, 0, 0].tolist(), batch["input_ids"]["text_encoder"][:, 0].tolist()))
    return pairs, sorted(set(problems))


def same(*numbers: int) -> set[tuple[int, int]]:
    return {(number, number) for number in numbers}


@pytest.fixture
def _one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than is read: an epoch or two are looked at."""
    monkeypatch.setattr(streams, "WINDOW", 4)


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("damage", ["in a picture", "in a header", "a header", "no tar", "gzip"])
def test_a_damaged_shard_is_skipped_and_named(tmp_path: Path, damage: str):
    """What comes before is read, the others are read to their end, and it is counted as one that cannot be read."""
    write_members(tmp_path / "0.tar", samples())
    data = bytearray(write_members(tmp_path / "1.tar", samples(10), "w:gz" if damage == "gzip" else "w").read_bytes())
    with tarfile.open(tmp_path / "1.tar") as tar:
        entry = tar.getmember("0013.png")
    cut = {
        "in a picture": entry.offset_data + 20,
        "in a header": entry.offset + 100,
        "no tar": 0,
        "gzip": len(data) // 2,
    }
    if damage == "a header":
        data[entry.offset : entry.offset + 512] = b"x" * 512
    else:
        del data[cut[damage] :]
    (tmp_path / "1.tar").write_bytes(data or b"<html>Not found</html>" * 99)
    write_members(tmp_path / "2.tar", samples(20))
    pairs, problems = read(tmp_path / "{0..2}.tar")
    whole = same(*range(6), *range(20, 26))
    assert whole <= pairs
    before = {"in a picture": same(10, 11, 12), "no tar": set(), "gzip": pairs - whole}
    assert pairs - whole == before.get(damage, same(10, 11)), "whether the last one is whole, a header would say"
    assert len(problems) == 1
    assert f"the shard {tmp_path}/1.tar ends after" in problems[0]


@pytest.mark.usefixtures("_one_window")
def test_a_run_goes_on_where_it_was_in_damaged_shards(tmp_path: Path):
    for shard in range(3):
        data = write_members(tmp_path / f"{shard}.tar", samples(10 * shard)).read_bytes()
        (tmp_path / f"{shard}.tar").write_bytes(data[: len(data) // 3] if shard == 1 else data)
    shards = f"{tmp_path}/{{0..2}}.tar"
    loader, states, whole = load(shards), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(loader.get_state())))
        whole.append(next(loader))
    counted = loader.unreadable
    loader.close()
    assert counted == 1
    for stop in (1, 3, 7):
        again = load(shards)
        again.set_state(states[stop])
        assert_same(take(again, 5), whole[stop : stop + 5])


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("text", [None, b""])
def test_a_missing_caption_is_the_empty_text_with_a_warning(tmp_path: Path, table: bool, text: bytes | None):
    """Wherever it is, the first sample included; as in folders with a list of samples."""
    members = samples()
    for number in (0, 4):
        members[f"{number:04}.txt"] = text
    members = {name: data for name, data in members.items() if data is not None}
    write_members(tmp_path / "0.tar", members)
    where = {"train_data_dir": str(tmp_path), "cache_dir": str(tmp_path)} if table else {}
    expected = (
        contextlib.nullcontext()
        if text == b""
        else pytest.warns(UserWarning, match="2 of the 6 samples in .*0.tar have no")
    )
    with expected:
        pairs, problems = read("" if table else tmp_path / "0.tar", **where)
    assert pairs == same(1, 2, 3, 5) | {(0, -1), (4, -1)}
    assert not problems


@pytest.mark.usefixtures("_one_window")
def test_no_captions_at_all_are_an_error(tmp_path: Path):
    write_members(tmp_path / "0.tar", {"0.png": png(0), "1.png": png(1)})
    with pytest.raises(ValueError, match=r"0\.tar has no column 'text': set --caption_column to one of .*png"):
        load(str(tmp_path / "0.tar"))


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("table", [False, True])
def test_a_caption_that_is_not_utf_8(tmp_path: Path, table: bool):
    """Is read as far as it can be, and named."""
    write_members(tmp_path / "0.tar", samples() | {"0002.txt": b"caf\xe9", "0003.txt": "n\ufffd".encode()})
    where = {"train_data_dir": str(tmp_path)} if table else {"train_shards": f"{tmp_path}/0.tar"}
    with pytest.warns(UserWarning, match=r"1 captions in .*0\.tar are not UTF-8, the first 0002\.txt: .* U\+FFFD"):
        texts = [row["text"] for row in open_source(**where, cache_dir=str(tmp_path / "cache")).rows]
    assert texts == ["0", "1", "caf\ufffd", "n\ufffd", "4", "5"]


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("table", [False, True])
def test_shards_of_several_kinds_of_pictures(tmp_path: Path, table: bool):
    """Endings in capitals, packed members and folders too; what is no picture's or text's is not looked at."""
    names = ["a/0.jpg", "a/1.png", "b/0.JPEG", "b/1.WebP", "4.png.gz", "5.gif"]
    members = {}
    for number, name in enumerate(names):
        data = io.BytesIO()
        kind = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp", "gif": "gif"}[
            name.lower().removesuffix(".gz").split(".")[1]
        ]
        Image.new("RGB", (SIDE, SIDE), (40 * number,) * 3).save(data, kind)
        members[name] = gzip.compress(data.getvalue()) if name.endswith("gz") else data.getvalue()
        stem = name.split(".")[0]
        members |= {
            f"{stem}.json": b"{broken",
            f"{stem}.txt": str(number).encode(),
            f"{stem}.cls": b"x",
            f"{stem}.npy": b"",
        }
    write_members(tmp_path / "0.tar", members | {"a/.hidden.png": b"", "README": b""})
    where = {"train_data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")} if table else {}
    pairs, problems = read("" if table else tmp_path / "0.tar", **where)
    assert {(round(pixel / 40), caption) for pixel, caption in pairs} == same(*range(6))
    assert not problems


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("table", [False, True])
def test_an_empty_member_is_no_path(tmp_path: Path, table: bool, monkeypatch: pytest.MonkeyPatch):
    """Whatever it is called: a file of the user's, or an address, which is not asked."""
    web = Web()
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png(77))
    names = [f"{tmp_path}/secret.png", "../secret.png", f"{web.url}/good/1.png"]
    members = {name.replace(".png", f"{end}"): data for name in names for end, data in ((".png", b""), (".txt", b"7"))}
    write_members(tmp_path / "data/0.tar", samples() | members)
    monkeypatch.chdir(tmp_path / "data")
    where = {"train_data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")} if table else {}
    where |= {"allow_outside_paths": True, "allow_private_addresses": True}
    pairs, problems = read("" if table else tmp_path / "data/0.tar", **where)
    web.close()
    assert pairs == same(*range(6))
    assert not web.asked
    assert len(problems) >= 2
    assert all("an empty file" in problem for problem in problems)


BOMB = gzip.compress(bytes(200 * 2**20), 1)


@pytest.mark.usefixtures("_one_window")
@pytest.mark.parametrize("kind", ["picture", "caption", "shard", "header", "sparse", "twice"])
def test_what_would_fill_the_memory_is_not_unpacked(tmp_path: Path, kind: str):
    """200 MB of zeros in 1 MB; the other samples are read."""
    bad = {"picture": {"9.png.gz": BOMB, "9.txt": b"9"}, "caption": {"9.png": png(9), "9.txt.gz": BOMB}}
    bad |= {
        "shard": {f"9{i}.png": bytes(10 * 2**20) for i in range(20)},
        "twice": {"9.png": png(9), "9.PNG": png(9), "9.txt": b"9"},
    }
    path = write_members(tmp_path / "0.tar", samples() | bad.get(kind, {}), "w:gz" if kind == "shard" else "w")
    assert path.stat().st_size < 2**21
    if kind in ("header", "sparse"):
        with tarfile.open(path, "a") as tar:
            entry = tarfile.TarInfo("9.png" if kind == "sparse" else "x" * 200)
            entry.type = tarfile.GNUTYPE_SPARSE if kind == "sparse" else tarfile.GNUTYPE_LONGNAME
            entry.size = 2**32 if kind == "header" else 0
            tar.addfile(entry)
    tracemalloc.start()
    pairs, problems = read(path, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs == same(*range(5 if kind == "header" else 6))
    said = {"header": "it has a header of", "twice": r"two files that end with \.png", "sparse": "^$"}
    assert re.search(said.get(kind, "it unpacks to more than 100 times its size"), "".join(problems))
    assert peak < 150 * 2**20


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
