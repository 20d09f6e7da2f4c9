"""Data read row after row: everything comes, in another order each time, and a resumed run is the same run."""

import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from picture_folders import count_tokens, write_folder
from several import start_all
from test_load import assert_same, contents, numbers, take

from codi_jax.data import DataFlags, load_data, streams
from codi_jax.data.loader import Loader

COUNT = 24


@pytest.fixture(autouse=True)
def _small_window(monkeypatch):
    """Divides an epoch, of one process and of four: so no window lies in two epochs."""
    monkeypatch.setattr(streams, "WINDOW", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), COUNT, size=(48, 32), condition_size=(48, 32))


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory) -> Path:
    """Four files, as on the hub, but for the pictures, which stay where they are: outside of the folder."""
    target = tmp_path_factory.mktemp("parquet")
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    images = {name: [str(folder / row[name]) for row in rows] for name in ("image", "conditioning_image")}
    data = datasets.Dataset.from_dict({**images, "text": [row["text"] for row in rows]})
    data = data.cast_column("image", datasets.Image()).cast_column("conditioning_image", datasets.Image())
    for shard in range(4):
        data.shard(4, shard).to_parquet(target / f"train-{shard}.parquet")
    return target


def load(folder: Path, seed: int = 0, process: tuple[int, int] = (0, 1), **changes) -> Loader:
    flags = DataFlags(
        train_data_dir=str(folder), streaming=True, resolution=32, random_flip=True, allow_outside_paths=True, **changes
    )
    options = {"condition": "column", "process_index": process[0], "process_count": process[1]}
    return load_data(flags, count_tokens, batch_size=4, seed=seed, **options)


@pytest.fixture(params=["folder", "parquet"])
def source(request) -> Path:
    return request.getfixturevalue(request.param)


def test_every_sample_comes_once_an_epoch(source):
    loader = load(source)
    assert loader.samples_per_epoch is None
    batches = take(loader, 3 * COUNT // 4)
    seen = [n for batch in batches for n in numbers(batch)]
    epochs = [seen[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for batch in batches:
        assert np.array_equal(batch["pixels"], batch["conditioning"])
        assert batch["pixels"][:, 16, 16, 0].tolist() == numbers(batch)


def test_random_choices_differ_between_epochs(source):
    """Crops and flips of a sample are not those of the epoch before, also after a resume in between."""
    loader = load(source)
    first = take(loader, COUNT // 4)
    resumed = load(source)
    resumed.set_state(loader.get_state())
    second = take(resumed, COUNT // 4)
    pictures = [
        {number: pixels for batch in epoch for number, pixels, _ in contents(batch)} for epoch in (first, second)
    ]
    assert pictures[0].keys() == pictures[1].keys() == set(range(COUNT))
    assert sum(pictures[0][number] != pictures[1][number] for number in range(COUNT)) > COUNT // 2


def test_seeds_give_other_orders(source):
    first, again, other = (take(load(source, seed=seed), 6) for seed in (0, 0, 1))
    assert_same(again, first)
    assert [numbers(batch) for batch in other] != [numbers(batch) for batch in first]


def test_a_resumed_run_is_the_same_run(source):
    loader = load(source)
    states, whole = [], []
    for _ in range(16):
        states.append(json.loads(json.dumps(loader.get_state())))
        whole.append(next(loader))
    loader.close()
    for stop in (0, 1, 5, 6, 12):
        fresh = load(source)
        fresh.set_state(states[stop])
        assert_same(take(fresh, 4), whole[stop : stop + 4])


def test_a_loader_that_was_closed_goes_on(source):
    whole = take(load(source), 8)
    loader = load(source)
    assert_same(take(loader, 3) + take(loader, 5), whole)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_different_samples(source, count):
    parts = [take(load(source, process=(index, count)), COUNT // 4) for index in range(count)]
    seen = [n for part in parts for batch in part for n in numbers(batch)]
    assert all(len(batch["pixels"]) == 4 // count for part in parts for batch in part)
    assert sorted(seen) == list(range(COUNT))


def test_a_state_of_another_process_is_refused(folder):
    state = load(folder, process=(0, 2)).get_state()
    with pytest.raises(ValueError, match="process index is 1, and was 0"):
        load(folder, process=(1, 2)).set_state(state)
    with pytest.raises(ValueError, match="number of processes is 1, and was 2"):
        load(folder).set_state(state)


IN_TWO_PROCESSES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from picture_folders import count_tokens
from test_load import numbers, take
from codi_jax.io import processes
from codi_jax.models import sharding
from codi_jax.training.checkpoint import Checkpoints
from codi_jax.data import DataFlags, load_data, streams

streams.WINDOW = 6
processes.initialize()

def load():
    flags = DataFlags(train_data_dir=sys.argv[1], streaming=True, resolution=32, allow_outside_paths=True)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return load_data(flags, count_tokens, batch_size=4, seed=0, **process)

whole, loader = [numbers(batch) for batch in take(load(), 8)], load()
begun = [numbers(next(loader)) for _ in range(3)]
checkpoints, state = Checkpoints(Path(sys.argv[2])), sharding.put(sharding.make_mesh(), {"x": np.ones(3)})
checkpoints.save(3, state, loader.get_state(), {})
checkpoints.wait()
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
_, position = checkpoints.restore(Path(sys.argv[2]) / "checkpoint-3", like)
resumed = load()
resumed.set_state(position)
print(json.dumps([whole, begun + [numbers(batch) for batch in take(resumed, 5)], resumed.unreadable]))
"""


@pytest.mark.slow
def test_every_process_goes_on_where_it_was(parquet, tmp_path):
    """Through a checkpoint of two processes, whose states have not even the same size."""
    folder = Path(shutil.copytree(parquet, tmp_path / "data"))
    rows = datasets.Dataset.from_parquet(str(folder / "train-0.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows.map(lambda row, i: {"image": {"bytes": b"broken"} if i == 0 else row["image"]}, with_indices=True)
    rows.to_parquet(folder / "train-0.parquet")
    found = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))
    code = ["-c", IN_TWO_PROCESSES, str(folder), str(tmp_path / "out")]
    started = start_all(code, 2, PYTHONPATH=found)
    texts = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), texts
    (first, *_), (second, *_) = results = [json.loads(out.splitlines()[-1]) for out, _ in texts]
    assert not {n for batch in first for n in batch} & {n for batch in second for n in batch}
    assert all(resumed == whole for whole, resumed, _ in results)
    assert sorted(unreadable for *_, unreadable in results) == [0, 1]


def test_random_choices_are_those_of_the_sample(folder):
    """The same sample is flipped and cropped alike whatever the window that it comes in."""
    first = {each for batch in take(load(folder), 4) for each in contents(batch)}
    streams.WINDOW = 8
    second = {each[0]: each for batch in take(load(folder), 5) for each in contents(batch)}
    common = [each for each in first if each[0] in second]
    assert len(common) > 5
    assert all(second[each[0]] == each for each in common)


def test_only_the_first_samples_are_used(source):
    seen = {n for batch in take(load(source, max_train_samples=8), 8) for n in numbers(batch)}
    assert len(seen) == 8


def test_unreadable_images_are_left_out(tmp_path, caplog):
    folder = write_folder(tmp_path / "data", COUNT, condition_size=(32, 32))
    (folder / "images/5.png").write_bytes(b"no image")
    loader = load(folder)
    with caplog.at_level(logging.WARNING, "codi_jax"):
        seen = {n for batch in take(loader, 12) for n in numbers(batch)}
    assert seen == set(range(COUNT)) - {5}
    assert loader.unreadable == 1
    assert sum("row 5 of" in record.getMessage() for record in caplog.records) == 1


def test_no_readable_image_at_all_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "data", 8, condition_size=(32, 32))
    for file in (folder / "images").iterdir():
        file.unlink()
    loader = load(folder)
    with pytest.raises(ValueError, match="20 images in a row could not be read"):
        next(loader)
    loader.close()


def test_less_than_a_batch_is_an_error(folder):
    loader = load(folder, max_train_samples=3)
    with pytest.raises(ValueError, match="has 3 samples for this process, fewer than the 4 of one batch"):
        next(loader)
    loader.close()


def test_a_missing_column_is_found_at_once(source):
    with pytest.raises(ValueError, match="no column 'words': set --caption_column to one of"):
        load(source, caption_column="words")
