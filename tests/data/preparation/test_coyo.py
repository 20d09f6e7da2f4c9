"""The tool as users run it: against a bad web, killed and restarted, in every format, with bad input."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from web import Web, bomb, jpeg

from codi_jax.data.files import Folder
from codi_jax.data.preparation.formats import FormatName
from codi_jax.data.preparation.job import ShardTask, ShardWork
from codi_jax.io.images import canny
from dataset_tools import coyo_1m_dataset_preprocess as tool

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "dataset_tools/coyo_1m_dataset_preprocess.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def web():
    server = Web()
    yield server
    server.close()


def images(folder: Path, count: int, size: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:04}.jpg").write_bytes(jpeg(number, size))
        (folder / f"{number:04}.txt").write_text(f"picture {number}")
    return folder


def make(source: Path | str, target: Path, **changes) -> None:
    options = {"resolution": 32, "shard_size": 8, "num_proc": 1, "retries": 1, "timeout": 1.0}
    tool.main(tool.Args(**options | {"input": str(source), "train_data_dir": str(target)} | changes))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "meta.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    """Every file, with a digest of what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_folder_of_images(tmp_path: Path):
    """The seed's layout; edges are those of the picture that is written; the size is the shorter side's."""
    make(images(tmp_path / "in", 21, (96, 64)), tmp_path / "out", max_train_samples=13, image_format="png")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images", "processed_images", "meta.jsonl", "summary.json",
    }  # fmt: skip
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == [f"picture {number}" for number in range(13)]
    assert len(contents(tmp_path / "out")) == 2 * 13 + 2
    for number, row in enumerate(rows):
        image = Image.open(tmp_path / "out" / row["image"])
        assert image.size == (48, 32)
        reference = Image.open(tmp_path / "in" / f"{number:04}.jpg").resize((48, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(image, int) - np.asarray(reference, int)).mean() < 2
        edges = np.asarray(Image.open(tmp_path / "out" / row["conditioning_image"]))
        assert np.array_equal(edges, canny(image, 100, 200))


def test_a_bad_web(web: Web, tmp_path: Path):
    """All that is good arrives once, and each that is not is counted with its reason."""
    kinds = {
        "missing": "HTTP 404", "slow": "timed out", "truncated": "broken off", "half": "a broken picture",
        "html": "no picture", "liar": "no picture", "empty": "an empty file", "endless": "larger than 1 MB",
        "bomb": "more than 100 megapixels", "loop": "too many redirects", "file": "neither http nor https",
    }  # fmt: skip
    good = ["good", "typed", "redirect", "flaky"]
    paths = [f"{(good + list(kinds))[number % 15]}/{100 + number}.jpg" for number in range(60)]
    assert len(bomb()) < 1e6
    table = {"url": [f"{web.url}/{path}" for path in paths], "text": [f"caption {path}" for path in paths]}
    table["url"] += ["", None, "no url"]
    table["text"] += ["x"] * 3
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    make(tmp_path / "in.parquet", tmp_path / "out", allow_private_addresses=True, max_megabytes=1, shard_size=50)
    expected = [path for path in paths if path.split("/")[0] in good]
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == [f"caption {path}" for path in expected]
    for row, path in zip(rows, expected, strict=True):
        number = int(re.findall(r"\d+", path)[0])
        with Image.open(tmp_path / "out" / row["image"]) as image:
            reference = Image.open(Path(_written(tmp_path, number))).resize(image.size, Image.Resampling.BOX)
            assert np.abs(np.asarray(image, int) - np.asarray(reference, int)).mean() < 8
    counted = {}
    for path in paths:
        if reason := kinds.get(path.split("/")[0]):
            counted[reason] = counted.get(reason, 0) + 1
    counted |= {"no address": 2, "neither http nor https": counted["neither http nor https"] + 1}
    assert summary(tmp_path / "out")["rejected"] == counted
    assert summary(tmp_path / "out")["samples"] + sum(counted.values()) == 63
    assert all(web.asked[f"/{path}"] == 1 for path in expected if path.startswith(("good", "typed")))


@pytest.mark.parametrize("kind", ["texts", "datasets"])
def test_an_address_in_a_column_of_images_is_downloaded(tmp_path: Path, web: Web, kind: str):
    """By the downloader with its limits, and not from private hosts: which is not even asked."""
    paths = [*(f"good/{number}.jpg" for number in range(200, 203)), "endless/203.jpg", "missing/204.jpg"]
    addresses = [f"{web.url}/{path}" for path in paths]
    cells = addresses if kind == "texts" else [{"bytes": None, "path": address} for address in addresses]
    pq.write_table(pa.table({"image": cells, "text": paths}), tmp_path / "in.parquet")
    before = web.asked.total()
    with pytest.raises(ValueError, match="none of the 5 rows gives a sample: 5 a private address"):
        make(tmp_path / "in.parquet", tmp_path / "out")
    assert web.asked.total() == before
    make(tmp_path / "in.parquet", tmp_path / "out", allow_private_addresses=True, max_megabytes=1)
    assert [row["text"] for row in rows_of(tmp_path / "out")] == paths[:3]
    assert summary(tmp_path / "out")["rejected"] == {"larger than 1 MB": 1, "HTTP 404": 1}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_table_copies_nothing_from_elsewhere(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever it names, unless the user trusts it; and bytes are no path, not even empty ones."""
    others = images(tmp_path / "others", 4)
    table = images(tmp_path / "in", 2) / "table.parquet"
    outside = [f"{others}/0000.jpg", f"file://{others}/0001.jpg", "../others/0002.jpg", "memory://x/0003.jpg"]
    rows = [f"{tmp_path}/in/0000.jpg", f"file://{tmp_path}/in/0001.jpg", *outside]
    pq.write_table(pa.table({"image": rows, "text": [str(number) for number in range(6)]}), table)
    monkeypatch.chdir(tmp_path / "in")
    source = table if kind == "file" else tmp_path / "in"
    make(source, tmp_path / "out")
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["0", "1"]
    assert summary(tmp_path / "out")["rejected"] == {"a path outside of the input's folder": 4}
    make(source, tmp_path / "all", allow_outside_paths=True)
    assert [row["text"] for row in rows_of(tmp_path / "all")] == ["0", "1", "2", "3", "4"]
    assert summary(tmp_path / "all")["rejected"] == {"no such file": 1}


def test_bytes_are_no_path(tmp_path: Path):
    source = images(tmp_path / "in", 2)
    cells = [jpeg(0), f"{source}/0000.jpg".encode(), b""]
    nested = [{"bytes": cell, "path": f"{source}/0001.jpg"} for cell in cells]
    for name, column in {"plain": pa.array(cells, pa.binary()), "of datasets": pa.array(nested)}.items():
        pq.write_table(pa.table({"image": column, "text": list("abc")}), tmp_path / f"{name}.parquet")
        make(tmp_path / f"{name}.parquet", tmp_path / name)
        assert [row["text"] for row in rows_of(tmp_path / name)] == ["a"]
        assert summary(tmp_path / name)["rejected"] == {"no picture": 1, "an empty file": 1}


def _written(folder: Path, number: int) -> Path:
    (folder / "reference.jpg").write_bytes(jpeg(number))
    return folder / "reference.jpg"


def test_it_stops_at_exactly_so_many_good_images(tmp_path: Path):
    """Whatever is broken, and however shards and processes lie; what was rejected later is not counted."""
    source = images(tmp_path / "in", 40)
    for number in (0, 1, 5, 9, 17, 18, 22, 33):
        (source / f"{number:04}.jpg").write_text("broken")
    good = [number for number in range(40) if number not in (0, 1, 5, 9, 17, 18, 22, 33)]
    made = set()
    for shard_size, processes in ((3, 1), (7, 2), (100, 1)):
        target = tmp_path / f"out{shard_size}"
        make(source, target, max_train_samples=17, shard_size=shard_size, num_proc=processes)
        assert [row["text"] for row in rows_of(target)] == [f"picture {number}" for number in good[:17]]
        assert summary(target)["rejected"] == {"no picture": 7}
        files = contents(target)
        files.pop("summary.json")
        made.add(json.dumps(files, sort_keys=True))
    assert len(made) == 1


def test_fewer_than_wanted(tmp_path: Path, capsys):
    make(images(tmp_path / "in", 5), tmp_path / "out", max_train_samples=10)
    assert "--max_train_samples asks for 10, but the input has only 5 that can be used" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out")) == 5


def killed(command: list[str], target: Path, seconds: float) -> bool:
    """Starts the tool and kills it and its processes, so many seconds after it began to work; whether it was alive."""
    process = subprocess.Popen([*command, str(target)], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    before = list(os.walk(target))  # names alone: the tool moves files, and a walk puts up with that
    while process.poll() is None and list(os.walk(target)) == before:
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert alive or process.returncode == 0, error
    return alive


@pytest.mark.parametrize(
    ("output_format", "kills", "count"),
    [
        ("folder", 2, 120),
        *(pytest.param(name, 10, 400, marks=pytest.mark.slow) for name in get_args(FormatName)),
    ],
)
def test_killed_and_restarted_it_is_as_if_nothing_had_happened(
    tmp_path: Path, output_format: str, kills: int, count: int
):
    """Bit for bit the same files and lines as of a run that was left alone, and never a torn line."""
    source = images(tmp_path / "in", count, (480, 400))
    for number in range(0, count, 11):
        (source / f"{number:04}.jpg").write_text("broken")
    flags = {
        "input": source, "resolution": 256, "shard_size": 10, "num_proc": 2, "output_format": output_format,
        "max_train_samples": count * 3 // 4,
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
    command += ["--canny_low", "20", "100", "--train_data_dir"]
    subprocess.run([*command, str(tmp_path / "clean")], check=True, capture_output=True, cwd=ROOT)
    chance, left = random.Random(kills), kills
    while left:
        if killed(command, tmp_path / "out", chance.uniform(0, 0.25)):
            left -= 1
        elif left:  # it had been done before: the remaining kills get a new one
            shutil.rmtree(tmp_path / "out")
        meta = tmp_path / "out/meta.jsonl"
        assert not meta.exists() or all(json.loads(line) for line in meta.read_text().splitlines())
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True, cwd=ROOT)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    if output_format == "folder":
        rows = rows_of(tmp_path / "out")
        assert len(rows) == len({row["image"] for row in rows}) == count * 3 // 4


def test_threads_of_opencv_do_not_stop_the_processes(tmp_path: Path):
    """A notebook that has resized something large has them, and processes are forked from it."""
    code = (
        "import cv2, numpy, sys; cv2.setNumThreads(4); cv2.resize(numpy.zeros((64, 64, 3), 'uint8'), (3000, 3000))\n"
        "from dataset_tools import coyo_1m_dataset_preprocess as tool\n"
        "tool.main(tool.Args(input=sys.argv[1], train_data_dir=sys.argv[2], num_proc=2, shard_size=2))\n"
    )
    command = [sys.executable, "-c", code, str(images(tmp_path / "in", 8)), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=240)
    assert len(rows_of(tmp_path / "out")) == 8


def test_a_run_that_was_stopped_does_only_what_is_left(tmp_path: Path, monkeypatch):
    """Shards that have a record are not done again; one without is, whatever lies in its folder."""
    source, target = images(tmp_path / "in", 40), tmp_path / "out"
    make(source, tmp_path / "clean")
    calls: list[int] = []
    stage = ShardWork._stage

    def counted(work: ShardWork, task: ShardTask, stop: int = 3):
        calls.append(task.shard)
        if task.shard == stop:
            work.output_format.stage(work.staging / f"{stop:08}", [])
            raise KeyboardInterrupt
        return stage(work, task)

    monkeypatch.setattr(ShardWork, "_stage", counted)
    with pytest.raises(KeyboardInterrupt):
        make(source, target)
    assert calls == [0, 1, 2, 3]
    monkeypatch.setattr(ShardWork, "_stage", lambda work, task: counted(work, task, stop=-1))
    make(source, target)
    assert calls[4:] == [3, 4]
    assert contents(target) == contents(tmp_path / "clean")
    make(source, target)
    assert len(calls) == 6, "a finished data set is left as it is"


def test_other_flags_are_refused(tmp_path: Path):
    source = images(tmp_path / "in", 3)
    make(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds a finished data set with other flags \(resolution\): name another"):
        make(source, tmp_path / "out", resolution=16)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(precious.txt\): name a new or an empty folder"):
        make(source, tmp_path / "other")
    assert contents(tmp_path / "other").keys() == {"precious.txt"}


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    source = images(tmp_path / "in", 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--train_data_dir .*file/out cannot be written: Not a directory"):
        make(source, tmp_path / "file/out")


def test_a_full_disk(tmp_path: Path, monkeypatch):
    """One sentence, nothing half-written, and it goes on when there is room again."""
    source = images(tmp_path / "in", 20)
    make(source, tmp_path / "clean")
    write = Folder.write_all

    def full(folder: Folder, files) -> None:
        if folder.path.endswith("00000001"):
            write(folder, dict(list(files.items())[:3]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, files)

    monkeypatch.setattr(Folder, "write_all", full)
    with pytest.raises(OSError, match=r"No space left on device\. Fix this, and run the same"):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out/meta.jsonl").exists()
    monkeypatch.undo()
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_ids_and_captions_of_any_kind(tmp_path: Path):
    """Path separators and duplicates in ids, newlines and broken UTF-8 in captions: no file lands elsewhere."""
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    ids = ["../../etc/passwd", "a/b", "a/b", "/root/x", "..", "nul\0byte"]
    captions = [b"two\nlines", b"broken \xff\xfe", b"r\r\n\ttab", "\u2028 Grüße".encode(), b"", b'quote " and \\']
    table = {
        "image": [f"{tmp_path}/{number}.jpg" for number in range(6)],
        "id": ids,
        "text": pa.Array.from_buffers(pa.string(), 6, pa.array(captions, pa.binary()).buffers()),
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    before = contents(tmp_path)
    make(tmp_path / "in.parquet", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == [
        "two lines", "broken \ufffd\ufffd", "r tab", "Grüße", "", 'quote " and \\',
    ]  # fmt: skip
    assert [row["id"] for row in rows] == [*ids[:-1], "nul byte"]
    assert len({row["image"] for row in rows}) == 6
    assert {path for path in contents(tmp_path) if not path.startswith(("out/", "datasets/"))} == before.keys()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "pictures inside", "metadata", "save_to_disk"])
def test_tables_of_every_kind(tmp_path: Path, kind: str):
    """Each gives the same pictures and captions; what is broken in the text of one is replaced."""
    source = images(tmp_path / "in", 5)
    paths, texts = [str(source / f"{number:04}.jpg") for number in range(5)], [f"picture {n}" for n in range(5)]
    file = tmp_path / f"table.{kind}"
    if kind in ("csv", "tsv"):
        separator = b"," if kind == "csv" else b"\t"
        lines = [b"text%cimage" % separator, *(t.encode() + separator + p.encode() for t, p in zip(texts, paths))]
        lines[1] = lines[1].replace(b"picture", b"p\xffcture")
        file.write_bytes(b"\n".join(lines) + b"\n")
        texts[0] = "p\ufffdcture 0"
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"image": p, "caption": t}) + "\n" for p, t in zip(paths, texts)))
    elif kind == "parquet":
        pq.write_table(pa.table({"image": paths, "text": texts}), file)
    elif kind == "metadata":
        file = source
        lines = [json.dumps({"file_name": Path(p).name, "text": t}) + "\n" for p, t in zip(paths, texts)]
        (source / "metadata.jsonl").write_text("".join(lines))
    else:
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": paths, "text": texts}, features=features)
        if kind == "save_to_disk":
            rows.save_to_disk(file)
        else:
            file = tmp_path / "inside.parquet"
            rows.to_parquet(file)
    make(file, tmp_path / "out")
    make(images(tmp_path / "again", 5), tmp_path / "expected")
    assert [row["text"] for row in rows_of(tmp_path / "out")] == texts
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert {name: digest for name, digest in found.items() if "/" in name} == {
        name: digest for name, digest in expected.items() if "/" in name
    }


def test_columns_that_are_not_there(tmp_path: Path):
    pq.write_table(pa.table({"address": ["http://a.org/x.jpg"], "words": ["x"]}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"has none of the columns image, .*set --image_column or --url_column to one"):
        make(tmp_path / "in.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no column 'link': set --url_column to one of address, words"):
        make(tmp_path / "in.parquet", tmp_path / "out", url_column="link")
    with pytest.raises(ValueError, match=r"set --caption_column to one of address, words"):
        make(tmp_path / "in.parquet", tmp_path / "out", url_column="address")
    with pytest.raises(ValueError, match=r"--input .*nothing.parquet could not be read: there is no such file"):
        make(tmp_path / "nothing.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_filters_of_the_reference(tmp_path: Path):
    """Counted by the first that rejects; a row without a number is rejected; 0.3, 0.4 and 6.0 are kept."""
    source = images(tmp_path / "in", 7)
    table = {
        "image": [str(source / f"{number:04}.jpg") for number in range(7)],
        "text": [f"picture {number}" for number in range(7)],
        "clip_similarity_vitb32": [0.3, 0.29, 0.5, None, 0.5, 0.31, 0.1],
        "watermark_score": [0.4, 0.1, 0.41, 0.1, 0.2, 0.2, 0.9],
        "aesthetic_score_laion_v2": [6.0, 7.0, 7.0, 7.0, 5.99, 6.5, 1.0],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    make(tmp_path / "in.parquet", tmp_path / "out", shard_size=1)
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["picture 0", "picture 5"]
    assert summary(tmp_path / "out")["rejected"] == {
        "clip similarity below 0.3": 3, "watermark score above 0.4": 1, "aesthetic score below 6": 1,
    }  # fmt: skip
    make(tmp_path / "in.parquet", tmp_path / "first", max_train_samples=1)
    assert summary(tmp_path / "first")["rejected"] == {}, "rows after the last sample are not looked at"


def test_nothing_is_left(tmp_path: Path):
    source = images(tmp_path / "in", 3)
    with pytest.raises(ValueError, match="none of the 3 rows gives a sample: 3 smaller than 100 pixels"):
        make(source, tmp_path / "out", min_side=100)
    make(source, tmp_path / "out")
