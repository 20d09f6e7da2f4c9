"""Batches: order, epochs, processes, workers, resuming, pairs of images, and unreadable files."""

import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import tyro
from picture_folders import count_tokens, numbered, write_folder
from PIL import Image

from codi_jax.data import DataFlags, PromptFlags, load_data, open_data
from codi_jax.data.access import Access
from codi_jax.data.columns import Columns
from codi_jax.data.images import canny
from codi_jax.data.loader import Loader
from codi_jax.data.sources import Source
from codi_jax.data.table_files import load_prompts

COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Non-square pictures with conditions that are the same pictures, so both halves of a pair must always agree."""
    return write_folder(tmp_path_factory.mktemp("data"), COUNT, size=(48, 32), condition_size=(48, 32))


def flags(folder: Path, **changes) -> DataFlags:
    return replace(DataFlags(train_data_dir=str(folder), resolution=32, random_flip=True), **changes)


def load(folder: Path, batch_size: int = 4, seed: int = 0, condition="column", process=(0, 1), **changes) -> Loader:
    index, count = process
    options = {"condition": condition, "process_index": index, "process_count": count}
    return load_data(flags(folder, **changes), count_tokens, batch_size=batch_size, seed=seed, **options)


def take(loader: Loader, count: int) -> list[dict]:
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def numbers(batch: dict) -> list[int]:
    """Which samples a batch holds, by what its captions say."""
    return batch["input_ids"]["text_encoder"][:, 0].tolist()


def contents(batch: dict) -> list[tuple[int, bytes, bytes]]:
    """The samples of a batch, crops and flips included, as something to sort."""
    pictures = (map(bytes, batch[name]) for name in ("pixels", "conditioning"))
    return list(zip(numbers(batch), *pictures, strict=True))


def assert_same(batches: list[dict], expected: list[dict]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert batch["input_ids"].keys() == other["input_ids"].keys()
        for name in batch.keys() - {"input_ids"}:
            assert np.array_equal(batch[name], other[name]), name
        for name, ids in batch["input_ids"].items():
            assert np.array_equal(ids, other["input_ids"][name])


def test_a_batch_is_of_the_contract(folder):
    (batch,) = take(load(folder), 1)
    assert batch.keys() == {"pixels", "conditioning", "input_ids"}
    for name in ("pixels", "conditioning"):
        assert batch[name].shape == (4, 32, 32, 3)
        assert batch[name].dtype == np.uint8
    assert batch["input_ids"]["text_encoder"].shape == (4, 1)
    assert batch["input_ids"]["text_encoder"].dtype == np.int32


def test_captions_belong_to_their_pictures(folder):
    for batch in take(load(folder), 20):
        assert batch["pixels"][:, 16, 16, 0].tolist() == numbers(batch)


def test_every_sample_comes_once_an_epoch_and_in_another_order_in_the_next(folder):
    seen = [number for batch in take(load(folder), 45) for number in numbers(batch)]
    epochs = [seen[start : start + COUNT] for start in range(0, 180, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != sorted(epochs[0])


def test_seeds_give_other_orders_and_no_shifted_ones(folder):
    orders = [[n for batch in take(load(folder, seed=seed), 30) for n in numbers(batch)] for seed in (0, 1, -1, 2**63)]
    epochs = [tuple(order[start : start + COUNT]) for order in orders for start in range(0, 120, COUNT)]
    assert len(set(epochs)) == len(epochs)


def test_both_pictures_of_a_sample_are_cropped_and_flipped_alike(folder):
    batches = take(load(folder), 20)
    corners, flips = set(), set()
    for batch in batches:
        assert np.array_equal(batch["pixels"], batch["conditioning"])
        green = batch["pixels"][:, 0, :, 1].astype(int)
        flips |= set((green[:, 0] > green[:, -1]).tolist())
        corners |= set(green.min(axis=1).tolist())
    assert flips == {True, False}
    assert len(corners) > 8  # of 17 places


def test_crop_and_flip_are_pillows(folder):
    """Each sample is one of the crops that Pillow makes of its picture, or the mirror image of one."""
    (batch,) = take(load(folder, batch_size=20), 1)
    for number, pixels in zip(numbers(batch), batch["pixels"], strict=True):
        crops = [np.asarray(numbered(number, (48, 32)).crop((left, 0, left + 32, 32))) for left in range(17)]
        assert sum(np.array_equal(pixels, crop) or np.array_equal(pixels, crop[:, ::-1]) for crop in crops) == 1


def test_random_choices_differ_between_epochs(folder):
    batches = take(load(folder), 45)
    views: dict[int, set[bytes]] = {}
    for batch in batches:
        for number, pixels in zip(numbers(batch), batch["pixels"], strict=True):
            views.setdefault(number, set()).add(pixels.tobytes())
    assert np.mean([len(view) for view in views.values()]) > 4  # of 6 epochs, of 34 views


def test_no_flips_and_centre_crops_unless_asked(folder):
    for batch in take(load(folder, center_crop=True, random_flip=False), 8):
        for number, pixels in zip(numbers(batch), batch["pixels"], strict=True):
            assert np.array_equal(pixels, np.asarray(numbered(number, (48, 32)).crop((8, 0, 40, 32))))


# At 8 the next batch lies in two epochs.
@pytest.mark.parametrize(("workers", "stops"), [(0, (0, 1, 7, 8, 12)), (2, (8,))])
def test_a_resumed_run_is_the_same_run(folder, workers, stops):
    loader = load(folder, dataloader_num_workers=workers)
    states, whole = [], []
    for _ in range(15):
        states.append(json.loads(json.dumps(loader.get_state())))
        whole.append(next(loader))
    loader.close()
    for stop in stops:
        fresh = load(folder, dataloader_num_workers=workers)
        fresh.set_state(states[stop])
        assert fresh.get_state() == states[stop]
        assert_same(take(fresh, 3), whole[stop : stop + 3])


def test_a_state_can_be_set_again(folder):
    loader = load(folder)
    start = loader.get_state()
    first = [next(loader), next(loader)]
    loader.set_state(start)
    assert_same(take(loader, 2), first)


def test_a_loader_that_was_closed_goes_on(folder):
    whole = take(load(folder), 6)
    loader = load(folder)
    assert_same(take(loader, 3) + take(loader, 3), whole)


def test_workers_change_nothing(folder):
    assert_same(take(load(folder, dataloader_num_workers=2), 9), take(load(folder), 9))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_the_batches_of_one(folder, count):
    whole = take(load(folder, batch_size=8), 9)
    parts = [take(load(folder, batch_size=8, process=(index, count)), 9) for index in range(count)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [len(share["pixels"]) for share in shares] == [8 // count] * count
        # In their order, too: the noise of a step belongs to places in the batch.
        assert contents(batch) == [each for share in shares for each in contents(share)]


def test_a_state_serves_another_number_of_processes(folder):
    whole = take(load(folder, batch_size=4), 6)
    loader = load(folder, batch_size=4)
    for _ in range(3):
        next(loader)
    parts = [load(folder, batch_size=4, process=(index, 2)) for index in range(2)]
    for part in parts:
        part.set_state(loader.get_state())
    for batch in whole[3:]:
        assert numbers(batch) == [n for part in parts for n in numbers(next(part))]
    for each in (loader, *parts):
        each.close()


def test_a_state_of_other_data_is_refused(folder, tmp_path):
    state = load(write_folder(tmp_path / "other", 20), condition=None).get_state()
    with pytest.raises(ValueError, match="number of samples is 30, and was 20"):
        load(folder).set_state(state)
    with pytest.raises(ValueError, match="seed is 1, and was 0"):
        load(folder, seed=1).set_state(load(folder).get_state())


def test_empty_prompts_have_their_proportion(folder):
    seen = [number for batch in take(load(folder, proportion_empty_prompts=0.3), 150) for number in numbers(batch)]
    assert 0.22 < seen.count(-1) / len(seen) < 0.38  # 600 draws: ± 4 standard deviations
    assert all(n == -1 for batch in take(load(folder, proportion_empty_prompts=1), 4) for n in numbers(batch))
    assert all(n >= 0 for batch in take(load(folder), 20) for n in numbers(batch))


def test_one_of_several_captions_is_drawn_in_each_epoch(tmp_path):
    captions = [[str(10 * i), str(10 * i + 1), str(10 * i + 2)] for i in range(5)] + ["50"]
    loader = load(write_folder(tmp_path / "data", 6, captions=captions), condition=None, batch_size=6)
    drawn = [sorted(numbers(batch)) for batch in take(loader, 40)]
    assert all([n // 10 for n in epoch] == [0, 1, 2, 3, 4, 5] for epoch in drawn)
    counts = np.bincount([n % 10 for epoch in drawn for n in epoch[:5]], minlength=3)
    assert len(counts) == 3
    assert counts.min() > 40  # of 200 draws, 67 are expected of each


@pytest.mark.parametrize("task", ["super_resolution", "inpainting", "canny"])
def test_a_condition_is_made_of_the_picture_and_flipped_with_it(tmp_path, task):
    folder = write_folder(tmp_path / "data", 8, size=(64, 64))
    batches = take(load(folder, condition=task, resolution=64), 8)
    again = take(load(folder, condition=task, resolution=64), 8)
    assert_same(again, batches)
    for batch in batches:
        assert batch["conditioning"].shape == batch["pixels"].shape
        if task == "super_resolution":
            assert np.abs(batch["conditioning"].astype(int) - batch["pixels"]).max() < 24
        if task == "inpainting":
            hole = (batch["conditioning"] == 128).all(-1)
            assert hole.any(axis=(1, 2)).all()
            assert np.array_equal(batch["conditioning"][~hole], batch["pixels"][~hole])
    if task == "inpainting":
        assert len({batch["conditioning"].tobytes() for batch in batches}) == 8


def test_edges_are_made_only_where_there_is_no_column(folder, tmp_path):
    (batch,) = take(load(folder, condition="canny"), 1)
    assert np.array_equal(batch["conditioning"], batch["pixels"])  # the column's
    (batch,) = take(load(write_folder(tmp_path / "data", 8), condition="canny", random_flip=False), 1)
    rng = np.random.default_rng(0)
    assert np.array_equal(batch["conditioning"], np.stack([canny(pixels, rng) for pixels in batch["pixels"]]))


def test_a_condition_can_be_any_function(folder):
    for batch in take(load(folder, condition=lambda pixels, rng: 255 - pixels), 3):
        assert np.array_equal(batch["conditioning"], 255 - batch["pixels"])


def test_a_condition_of_another_size_is_resized_along(tmp_path):
    folder = write_folder(tmp_path / "data", 8, size=(48, 32), condition_size=(96, 64))
    for batch in take(load(folder), 6):
        assert np.abs(batch["pixels"].astype(int) - batch["conditioning"]).max() < 12


@pytest.mark.parametrize("workers", [0, 2])
def test_a_condition_of_another_shape_names_the_sample(tmp_path, workers):
    folder = write_folder(tmp_path / "data", 8, size=(48, 32), condition_size=(48, 32))
    numbered(5, (32, 32)).save(folder / "processed_images/5.png")
    loader = load(folder, dataloader_num_workers=workers)
    with pytest.raises(ValueError, match=r"the condition of row 5 of .*images/5.png.* 32×32 and .* 48×32"):
        take(loader, 2)
    loader.close()


def test_sdxl_gets_sizes(folder):
    loader = load_data(flags(folder, center_crop=True), count_tokens, batch_size=4, seed=0, time_ids=True)
    (batch,) = take(loader, 1)
    assert batch["time_ids"].dtype == np.float32
    assert batch["time_ids"].tolist() == [[32, 48, 0, 8, 32, 32]] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_named_and_replaced(tmp_path, workers, caplog):
    folder = write_folder(tmp_path / "data", 20)
    (folder / "images/3.png").write_bytes(b"this is no image")
    (folder / "images/11.png").unlink()
    loader = load(folder, condition=None, dataloader_num_workers=workers)
    with caplog.at_level(logging.WARNING, "codi_jax"):
        batches = take(loader, 10)
    for epoch in (batches[:5], batches[5:]):
        seen = [number for batch in epoch for number in numbers(batch)]
        assert len(seen) == 20
        assert set(seen) == set(range(20)) - {3, 11}
    assert all((batch["pixels"][:, 16, 16, 0] == numbers(batch)).all() for batch in batches)
    assert loader.unreadable == 2
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # one for each, not one for each epoch
    assert any("row 3 of" in line and "images/3.png" in line and "identify" in line for line in lines)
    assert any("row 11 of" in line and "images/11.png" in line and "No such file" in line for line in lines)
    fresh = load(folder, condition=None)
    fresh.set_state(json.loads(json.dumps(loader.get_state())))
    assert fresh.unreadable == 2


def test_unreadable_images_leave_processes_in_step(tmp_path):
    folder = write_folder(tmp_path / "data", 20)
    (folder / "images/3.png").unlink()
    whole = take(load(folder, condition=None), 10)
    parts = [take(load(folder, condition=None, process=(index, 2)), 10) for index in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert numbers(batch) == numbers(first) + numbers(second)


def test_too_many_unreadable_images_are_an_error(tmp_path):
    folder = write_folder(tmp_path / "data", 40)
    for i in range(15):
        (folder / f"images/{i}.png").unlink()
    with pytest.raises(ValueError, match=r"11 of the first \d+ images .* more than --max_unreadable_share 0.01"):
        take(load(folder, condition=None), 20)
    assert len(take(load(folder, condition=None, max_unreadable_share=0.5), 5)) == 5


def test_not_one_unreadable_image_is_forgiven_if_so_asked(tmp_path):
    folder = write_folder(tmp_path / "data", 8)
    (folder / "images/0.png").unlink()
    with pytest.raises(ValueError, match="1 of the first"):
        take(load(folder, condition=None, max_unreadable_share=0), 2)


def test_no_readable_image_at_all_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "data", 8)
    for file in (folder / "images").iterdir():
        file.unlink()
    loader = load(folder, condition=None)
    with pytest.raises(ValueError, match=r"20 images in a row could not be read; the last was row .*No such file"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "a/b"}, "--dataset_name and --train_data_dir exclude each other"),
        ({"train_data_dir": None}, "give --dataset_name or --train_data_dir"),
        ({"max_train_samples": 0}, "--max_train_samples 0 is not possible: it must be at least 1"),
        ({"resolution": 0}, "--resolution 0 is not possible: it must be at least 1"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1 is not possible: it must be at least 0"),
        (
            {"proportion_empty_prompts": 1.5},
            "--proportion_empty_prompts 1.5 is not possible: it must be between 0 and 1",
        ),
        ({"max_unreadable_share": -0.1}, "--max_unreadable_share -0.1 is not possible: it must be between 0 and 1"),
        ({"streaming": True, "cache_latents": True}, "remove one of them"),
        ({"cache_latents": True}, "--cache_latents has no use here"),
        ({"max_train_samples": 3}, "has 3 samples, fewer than one batch of 4"),
        ({"train_data_dir": "/no/such/folder"}, "there is no folder /no/such/folder: check --train_data_dir"),
        (
            {"caption_column": "words"},
            "no column 'words': set --caption_column to one of image, text, conditioning_image",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(folder, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load(folder, **changes)
    assert "\n" not in str(error.value)


# Prompts alone


def prompts_of(flags: PromptFlags, **options) -> Loader:
    source = open_data(flags, batch_size=2, has_images=False)
    return load_data(flags, count_tokens, batch_size=2, seed=0, source=source, **options)


@pytest.mark.parametrize("kind", ["lines", "parquet", "pickle", "folder"])
def test_prompts_need_no_images(tmp_path, folder, kind):
    """Lines, a column of parquet, a pickled list, or captions of a data set whose pictures are not even opened."""
    texts = [str(i) for i in range(6)]
    (tmp_path / "prompts.txt").write_text("\n".join(["", *texts, "  "]) + "\n")
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "prompts.parquet"))
    (tmp_path / "prompts.pkl").write_bytes(pickle.dumps(texts))
    shutil.copy(folder / "meta.jsonl", tmp_path)
    given = {
        "lines": {"train_prompt_path": str(tmp_path / "prompts.txt")},
        "parquet": {"train_prompt_path": str(tmp_path / "prompts.parquet")},
        "pickle": {"train_prompt_path": str(tmp_path / "prompts.pkl")},
        "folder": {"train_data_dir": str(tmp_path), "max_train_samples": 6},
    }[kind]
    loader = prompts_of(PromptFlags(resolution=32, **given), time_ids=True)
    assert loader.samples_per_epoch == 6
    batches = take(loader, 3)
    assert all(batch.keys() == {"input_ids", "time_ids"} for batch in batches)
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(6))
    assert batches[0]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2  # whole, and of the size that is wanted


def test_prompts_go_on_where_they_were(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, range(6))))
    flags = PromptFlags(train_prompt_path=str(tmp_path / "prompts.txt"))
    whole = take(prompts_of(flags), 7)
    first = prompts_of(flags)
    take(first, 3)
    second = prompts_of(flags)
    second.set_state(first.get_state())
    assert list(map(numbers, take(second, 4))) == list(map(numbers, whole[3:]))


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("\n  \n", {}, "prompts.txt is empty: write one prompt per line"),
        ("a\nb", {"train_data_dir": "."}, "--train_prompt_path and --train_data_dir exclude each other"),
        ("a\nb", {"cache_latents": True}, "--cache_latents is for images"),
        ("a", {}, "has 1 samples, fewer than one batch of 2"),
        (None, {}, "there is no file .*prompts.txt: check --train_prompt_path"),
        (b"\xff\xfe\x00", {}, "is not UTF-8 text: write one prompt per line, or give a .parquet file"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_in_one_sentence(tmp_path, content, changes, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        prompts_of(PromptFlags(train_prompt_path=str(path), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Path("x")), "is no pickled list of texts: pathlib"),
        (pickle.dumps({"a": "b"}), "holds something other than a list of texts"),
        (pickle.dumps(["a", 1]), "holds something other than a list of texts"),
        (pickle.dumps(["a" * 100])[:-50], "is no pickled list of texts: "),
        (pickle.dumps([]), "is empty"),
    ],
)
def test_pickles_are_read_and_not_executed(tmp_path, content, message):
    (tmp_path / "prompts.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prompts_of(PromptFlags(train_prompt_path=str(tmp_path / "prompts.pkl")))
    assert "\n" not in str(error.value)


def test_pickled_prompts_may_be_many(tmp_path):
    """More than the limit for the pickles of tensors; ``None`` stands for no text, as in DMD2."""
    texts = [None, *(f"{i:0100}" for i in range(400_000))]
    (tmp_path / "prompts.pkl").write_bytes(pickle.dumps(texts))
    assert load_prompts(tmp_path / "prompts.pkl", Columns(None, "text"))["text"][:2] == ["", f"{0:0100}"]


def test_images_where_there_are_none_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb")
    flags = PromptFlags(train_prompt_path=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="--train_prompt_path has no images, which training with these flags needs"):
        open_data(flags, batch_size=2)
    with pytest.raises(ValueError, match="give --train_prompt_path or --train_data_dir"):
        open_data(PromptFlags(), batch_size=2)


def test_a_batch_that_cannot_be_divided_is_refused(folder):
    with pytest.raises(ValueError, match="a batch of 4 samples cannot be divided among 3 processes"):
        load(folder, process=(0, 3))


def test_only_the_first_samples_are_used(folder):
    loader = load(folder, max_train_samples=8)
    assert loader.samples_per_epoch == 8
    assert {n for batch in take(loader, 6) for n in numbers(batch)} == set(range(8))


def test_flags_are_those_of_the_originals():
    line = "--dataset_name a --load_from_disk --cache_dir c --resolution=64 --dataloader_num_workers=16 "
    line += "--image_column original_image --caption_column prompt --conditioning_image transformed_image "
    line += "--proportion_empty_prompts 0.5 --max_train_samples 7 --center_crop --random_flip --streaming"
    parsed = tyro.cli(DataFlags, args=line.split(), use_underscores=True)
    assert parsed == DataFlags(
        dataset_name="a", load_from_disk=True, cache_dir="c", resolution=64, dataloader_num_workers=16,
        image_column="original_image", caption_column="prompt", conditioning_image_column="transformed_image",
        proportion_empty_prompts=0.5, max_train_samples=7, center_crop=True, random_flip=True, streaming=True,
    )  # fmt: skip


def test_a_picture_that_is_a_stranger_to_the_disk_is_not_opened_twice(tmp_path):
    """Rows that several samples share, as when a file is listed twice, stay two samples."""
    folder = write_folder(tmp_path / "data", 4)
    lines = (folder / "meta.jsonl").read_text()
    (folder / "meta.jsonl").write_text(lines + lines)
    seen = sorted(n for batch in take(load(folder, condition=None), 2) for n in numbers(batch))
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pictures_are_laid_on_white_in_batches(tmp_path):
    folder = write_folder(tmp_path / "data", 4)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(folder / "images/2.png")
    (batch,) = take(load(folder, condition=None), 1)
    assert (batch["pixels"][numbers(batch).index(2)] == 255).all()


def test_a_run_is_not_resumed_with_other_data_of_the_same_size(folder, tmp_path):
    """Nor refused because the data has moved."""
    state = load(folder).get_state()
    shutil.copytree(folder, tmp_path / "moved")
    load(tmp_path / "moved").set_state(state)
    table = tmp_path / "moved" / "meta.jsonl"
    lines = table.read_text().splitlines()
    other = json.loads(lines[-1]) | {"text": "something else"}
    table.write_text("\n".join([*lines[:-1], json.dumps(other)]) + "\n")
    with pytest.raises(ValueError, match="the data is not the checkpoint's: its content is"):
        load(tmp_path / "moved").set_state(state)
    older = {name: value for name, value in state.items() if name != "content"}
    load(tmp_path / "moved").set_state(older)


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_what_a_data_set_is_known_by_does_not_depend_on_where_it_lies(tmp_path, kind):
    digests = []
    for number, colors in enumerate([(1, 2), (1, 2), (1, 3)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        cells = []
        for index, color in enumerate(colors):
            path = folder / f"{index if kind == 'bytes' else color}.png"
            Image.new("RGB", (8, 8), (color, 0, 0)).save(path)
            cells.append({"bytes": path.read_bytes() if kind == "bytes" else None, "path": str(path)})
        rows = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]})
        digests.append(Source(rows, Columns("image", "text"), Access(), "data", str(number)).content_digest())
    assert digests[0] == digests[1] != digests[2]
