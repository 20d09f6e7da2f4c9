"""Cached latents: equal to what the encoders give, found again, never stale, and as fast as a copy."""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_folders import count_tokens, write_folder
from several import end_of, free_address, start
from test_load import take

from codi_jax.data import DataFlags, latent_encoding, load_data, row_files
from codi_jax.data.latent_encoding import Encoders, Part
from codi_jax.data.load import cache_data, open_data
from codi_jax.data.loader import Loader

COUNT = 21
SIDE = 16


class Model:
    """Encoders whose results tell what they were given, and that count their calls."""

    def __init__(self, fingerprint: str = "a model", fail_after: float = float("inf")) -> None:
        self.images = self.texts = 0
        self.fail_after = fail_after
        self.encoders = Encoders(self.encode_images, self.encode_texts, fingerprint, batch_size=4)

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape in ((4, SIDE, SIDE, 3), (4, 8, 8, 3))
        assert pixels.dtype == np.uint8
        self.images += 1
        if self.images > self.fail_after:
            raise KeyboardInterrupt
        return pixels[:, ::8, ::8].astype(np.float32) / 4

    def encode_texts(self, ids: dict) -> dict[str, np.ndarray]:
        assert ids["text_encoder"].shape == (4, 1)
        self.texts += 1
        numbers = ids["text_encoder"].astype(np.float32)
        return {"context": numbers[:, :, None] + np.arange(3.0)[None, None], "pooled": numbers}


def load(folder: Path, model: Model | None, condition="column", seed: int = 0, **changes) -> Loader:
    options = {"resolution": SIDE, "center_crop": True, "random_flip": True, "cache_latents": model is not None}
    flags = DataFlags(**options | {"train_data_dir": str(folder), "cache_dir": str(folder.parent / "cache")} | changes)
    encoders = model and model.encoders
    return load_data(flags, count_tokens, batch_size=4, seed=seed, condition=condition, encoders=encoders)


def caches(folder: Path) -> set[Path]:
    return set((folder.parent / "cache" / "latents").glob("*/manifest.json"))


@pytest.fixture
def folder(tmp_path) -> Path:
    captions = [[str(i), str(i + 100)] if i % 3 else str(i) for i in range(COUNT)]
    return write_folder(tmp_path / "data", COUNT, size=(24, 16), condition_size=(24, 16), captions=captions)


@pytest.mark.parametrize("condition", ["column", "canny", "super_resolution", "inpainting", None])
def test_cached_batches_are_those_of_the_data_encoded(folder, condition):
    """Order, flips, captions, empty prompts and conditions are the same with and without a cache."""
    plain = take(load(folder, None, condition, proportion_empty_prompts=0.3), 16)
    cached = take(load(folder, Model(), condition, proportion_empty_prompts=0.3), 16)
    for batch, expected in zip(cached, plain, strict=True):
        assert batch.keys() == {"moments", "context", "pooled"} | ({"conditioning"} if condition else set())
        assert batch["moments"].dtype == batch["context"].dtype == batch["pooled"].dtype == np.float16
        assert np.array_equal(batch["moments"], expected["pixels"][:, ::8, ::8].astype(np.float16) / 4)
        numbers = expected["input_ids"]["text_encoder"]
        assert np.array_equal(batch["context"], numbers[:, :, None] + np.arange(3)[None, None])
        assert np.array_equal(batch["pooled"], numbers)
        if condition:
            assert batch["conditioning"].dtype == np.uint8
            assert np.array_equal(batch["conditioning"], expected["conditioning"])


def test_conditions_are_encoded_where_a_model_takes_their_latents(folder):
    """Mirrored with their image."""
    model = Model()
    model.encoders = replace(model.encoders, conditions_too=True)
    plain, cached = take(load(folder, None), 16), take(load(folder, model), 16)
    for batch, expected in zip(cached, plain, strict=True):
        assert batch.keys() == {"moments", "conditioning_moments", "context", "pooled"}
        assert np.array_equal(
            batch["conditioning_moments"], expected["conditioning"][:, ::8, ::8].astype(np.float16) / 4
        )
    assert len(caches(folder)) == 1
    load(folder, Model())
    assert len(caches(folder)) == 2, "a cache without encoded conditions was used"


def test_token_ids_are_kept_where_the_text_encoder_is_trained(folder):
    model = Model()
    model.encoders = replace(model.encoders, text=None)
    plain = take(load(folder, None, None, proportion_empty_prompts=0.3), 16)
    cached = take(load(folder, model, None, proportion_empty_prompts=0.3), 16)
    for batch, expected in zip(cached, plain, strict=True):
        assert batch.keys() == {"moments", "input_ids"}
        ids = batch["input_ids"]["text_encoder"]
        assert np.array_equal(ids, expected["input_ids"]["text_encoder"])
    take(load(folder, Model(), None), 1)
    assert len(caches(folder)) == 2  # of ids and of features


def test_sizes_for_sdxl_are_kept(folder):
    options = {"batch_size": 4, "seed": 0, "time_ids": True}
    flags = DataFlags(train_data_dir=str(folder), resolution=SIDE, center_crop=True)
    plain = take(load_data(flags, count_tokens, **options), 3)
    flags = replace(flags, cache_latents=True, cache_latents_dir=str(folder.parent / "here"))
    cached = take(load_data(flags, count_tokens, encoders=Model().encoders, **options), 3)
    assert all(np.array_equal(a["time_ids"], b["time_ids"]) for a, b in zip(plain, cached, strict=True))
    assert len(list((folder.parent / "here").glob("*/manifest.json"))) == 1


def test_a_resumed_run_is_the_same_run(folder):
    model = Model()
    loader = load(folder, model)
    states, whole = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(loader.get_state())))
        whole.append(next(loader))
    loader.close()
    for stop in (0, 4, 5, 9):
        fresh = load(folder, model)
        fresh.set_state(states[stop])
        for batch, expected in zip(take(fresh, 3), whole[stop:], strict=False):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def test_every_image_and_text_is_encoded_once(folder):
    model = Model()
    load(folder, model)
    assert model.images == 2 * 6  # both orientations of 21 images, in batches of 4
    assert model.texts == 9  # 21 + 14 captions and the empty one
    load(folder, model)
    assert (model.images, model.texts) == (12, 9)
    assert len(caches(folder)) == 1


def test_without_flips_one_orientation_is_encoded(folder):
    model = Model()
    load(folder, model, random_flip=False)
    assert model.images == 6


CHANGES = {
    "model": "model",
    "image": "data",
    "caption": "data",
    "max_train_samples": "data",
    "random_flip": "random_flip",
    "resolution": "resolution",
    "conditions": "data, columns, condition",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_cache_is_never_used_and_left_alone(folder, change, caplog):
    load(folder, Model())
    (before,) = caches(folder)
    content = before.read_bytes()
    model = Model("another" if change == "model" else "a model")
    other = {"max_train_samples": 20, "random_flip": False, "resolution": 8}
    changes = {change: other[change]} if change in other else {}
    if change == "image":
        os.utime(folder / "images/3.png", ns=(1, 1))
    elif change == "caption":
        text = (folder / "meta.jsonl").read_text().replace('"3"', '"33"')
        (folder / "meta.jsonl").write_text(text)
    elif change == "conditions":
        changes = {"condition": "inpainting"}
    with caplog.at_level(logging.WARNING, "codi_jax"):
        load(folder, model, **changes)
    assert model.images > 0
    assert len(caches(folder)) == 2
    assert before.read_bytes() == content
    (line,) = [record.getMessage() for record in caplog.records]
    said = f"are of the same data set but do not fit (they differ in {CHANGES[change]}). They are kept"
    assert f"{before.parent} {said}" in line


def test_seed_and_empty_prompts_need_no_other_cache(folder):
    model = Model()
    load(folder, model)
    load(folder, model, seed=1, proportion_empty_prompts=0.5)
    assert len(caches(folder)) == 1


@pytest.mark.parametrize("calls", [0, 5])
def test_an_interrupted_build_is_not_taken_for_a_finished_one_and_goes_on(folder, monkeypatch, calls):
    monkeypatch.setattr(latent_encoding, "_BATCHES_TO_KEEP", 1)
    with pytest.raises(KeyboardInterrupt):
        load(folder, Model(fail_after=calls))
    assert {path.suffix for path in (folder.parent / "cache" / "latents").iterdir()} == {".building", ".lock"}
    model = Model()
    interrupted = take(load(folder, model), 8)
    assert model.images == 2 * 6 - calls // 2 * 2
    assert model.texts == 0
    other = folder.parent / "other"
    whole = take(load(folder, Model(), cache_latents_dir=str(other)), 8)
    for batch, expected in zip(interrupted, whole, strict=True):
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    assert not list((folder.parent / "cache" / "latents").glob("*.building"))


def test_unreadable_images_are_those_of_the_plain_loader(folder):
    (folder / "images/4.png").write_bytes(b"no image")
    (folder / "processed_images/9.png").unlink()
    plain, cached = load(folder, None), load(folder, Model())
    for batch, expected in zip(take(cached, 12), take(plain, 12), strict=True):
        assert np.array_equal(batch["pooled"], expected["input_ids"]["text_encoder"])
    assert cached.unreadable == plain.unreadable == 2


def test_a_batch_of_unreadable_images_only_does_not_stop_the_build(folder):
    for i in range(4):
        (folder / f"images/{i}.png").unlink()
    loader = load(folder, Model())
    seen = {int(n) % 100 for batch in take(loader, 12) for n in batch["pooled"][:, 0]}
    assert seen == set(range(4, COUNT))


def test_too_many_unreadable_images_stop_the_build_and_leave_nothing(folder):
    for i in range(11):
        (folder / f"images/{i}.png").unlink()
    with pytest.raises(ValueError, match=r"11 of the first \d+ images could not be read"):
        load(folder, Model())
    assert [path.suffix for path in (folder.parent / "cache" / "latents").iterdir()] == [".lock"]


def test_random_crops_of_images_that_are_not_square_are_refused(folder):
    with pytest.raises(ValueError, match=r"row 0 of .*images/0.png.* is not square: add --center_crop"):
        load(folder, Model(), center_crop=False)
    assert not caches(folder)


def test_random_crops_of_squares_are_no_crops(tmp_path):
    folder = write_folder(tmp_path / "data", 8, size=(20, 20))
    assert len(take(load(folder, Model(), None, center_crop=False), 3)) == 3


def test_what_float16_cannot_hold_is_refused(folder):
    model = Model()
    huge = replace(model.encoders, images=lambda pixels: pixels[:, ::8, ::8] * np.float32(1e6))
    model.encoders = huge
    with pytest.raises(ValueError, match="the VAE produced moments that float16 cannot hold"):
        load(folder, model)
    assert not caches(folder)


def test_workers_build_the_same_cache(folder):
    whole = take(load(folder, Model()), 6)
    parallel = load(folder, Model(), dataloader_num_workers=2, cache_latents_dir=str(folder.parent / "other"))
    for batch, expected in zip(take(parallel, 6), whole, strict=True):
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def compute_part(folder: Path, model: Model, index: int, count: int, condition="column") -> Path | None:
    """One part of the cache that `load` reads."""
    flags = DataFlags(
        train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), resolution=SIDE, center_crop=True,
        random_flip=True,
    )  # fmt: skip
    source = open_data(flags, batch_size=1, condition=condition)
    part = Part(index, count)
    return cache_data(flags, count_tokens, source=source, encoders=model.encoders, condition=condition, part=part)


@pytest.mark.parametrize(("count", "condition"), [(1, None), (3, "column"), (40, "inpainting")])
def test_parts_give_the_same_files_as_one_build(folder, tmp_path, count, condition):
    """Also more parts than images, in any order; a training finds them, and encodes nothing."""
    (folder / "images/4.png").write_text("broken")
    load(folder, Model(), condition, cache_latents_dir=str(tmp_path / "whole"))
    order = np.random.default_rng(0).permutation(count).tolist()
    model = Model()
    *rest, found = [compute_part(folder, model, index, count, condition) for index in order]
    assert set(rest) <= {None}
    (whole,) = (tmp_path / "whole").glob("*/")
    assert found is not None
    assert found.name == whole.name
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert [path.name for path in found.parent.iterdir() if path.is_dir()] == [found.name]
    idle = Model()
    load(folder, idle, condition)
    assert idle.images == idle.texts == 0
    assert compute_part(folder, idle, 0, count, condition) == found


def test_an_interrupted_part_goes_on(folder):
    """What was kept is not computed again, and what other parts did is theirs."""
    whole = Model()
    load(folder, whole)
    expected = {file.name: file.read_bytes() for file in next(iter(caches(folder))).parent.iterdir()}
    shutil.rmtree(folder.parent / "cache")
    model = Model()
    assert compute_part(folder, model, 0, 2) is None
    stopped = Model(fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        compute_part(folder, stopped, 1, 2)
    resumed = Model()
    found = compute_part(folder, resumed, 1, 2)
    assert found is not None
    assert resumed.images == 4  # both orientations of 11 images in batches of 4, but for the first, which was kept
    assert {file.name: file.read_bytes() for file in found.iterdir()} == expected


TWO_PROCESSES = """
import sys
from pathlib import Path
from test_latent_cache import Model, SIDE
from picture_folders import count_tokens
from codi_jax.data import DataFlags, load_data
from codi_jax.io import processes

processes.initialize()
index, folder, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3 + int(sys.argv[1])]
flags = DataFlags(train_data_dir=folder, resolution=SIDE, center_crop=True, cache_latents=True, cache_latents_dir=cache)
model = Model()
loader = load_data(flags, count_tokens, batch_size=4, seed=0, condition="column", encoders=model.encoders,
                   process_index=index, process_count=2)
print(model.images, next(loader)["moments"].sum(), file=sys.stderr)
processes.wait_for_all("the end")
"""


@pytest.mark.parametrize("is_shared", [True, False])
def test_processes_build_a_cache_together(folder, tmp_path, monkeypatch, is_shared):
    """Each encodes half of the images; where they have no folder in common, each has to encode all."""
    alone = Model()
    load(folder, alone, random_flip=False)
    (whole,) = caches(folder)
    places = [tmp_path / name for name in (("one", "one") if is_shared else ("one", "two"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    address = free_address()
    words = ["-c", TWO_PROCESSES]
    ends = end_of([start([*words, str(i), str(folder), *map(str, places)], i, address) for i in (0, 1)], timeout=120)
    assert [status for status, _ in ends] == [0, 0], ends
    encoded = [int(said.split()[0]) for _, said in ends]
    assert encoded == ([3, 3] if is_shared else [3 + alone.images] * 2)
    for place in places:
        (made,) = place.glob("*/manifest.json")
        assert {file.name: file.read_bytes() for file in made.parent.iterdir()} == {
            file.name: file.read_bytes() for file in whole.parent.iterdir()
        }
        assert [path for path in place.iterdir() if path.is_dir()] == [made.parent]


# Damage


def files_of_cache(folder: Path) -> list[Path]:
    (manifest,) = caches(folder)
    return sorted(manifest.parent.glob("*.npy"))


def same(batches: list[dict], expected: list[dict]) -> bool:
    return all(
        np.array_equal(batch[name], other[name])
        for batch, other in zip(batches, expected, strict=True)
        for name in other
    )


def put(file: Path, data: bytes) -> None:
    """Another file in its place: threads may still read the old one."""
    file.with_suffix(".new").write_bytes(data)
    file.with_suffix(".new").replace(file)


def test_a_flipped_bit_is_never_trained_on(folder):
    """In any of the files: reading says so, or the cache is computed again, or the bit lies where nothing is read."""
    whole = take(load(folder, Model()), 12)
    rng, refusals = np.random.default_rng(0), []
    for file in files_of_cache(folder) * 2:
        before = file.read_bytes()
        data = bytearray(before)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        put(file, data)
        try:
            assert same(take(load(folder, Model()), 12), whole), file
        except ValueError as error:
            refusals.append(str(error))
        put(file, before)
    assert len(refusals) > 8
    for refusal in refusals:
        assert re.search(r"\.npy is damaged at row \d+: remove the folder .* to compute", refusal)


def test_a_damaged_header_is_a_damaged_file(tmp_path):
    """NumPy parses headers as Python code, and fails in as many ways."""
    file = tmp_path / "rows.npy"
    np.save(file, np.zeros((3, 4), "f4"))
    whole, damaged = file.read_bytes(), 0
    for bit in range(8 * (len(whole) - 48)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            row_files.open_rows(tmp_path)
        except row_files.DamagedRowsError:
            damaged += 1
    assert damaged > 900


@pytest.mark.parametrize("damage", ["halved", "missing", "emptied", "manifest", "no manifest"])
def test_a_cache_that_is_not_whole_is_computed_again(folder, damage, caplog):
    whole = take(load(folder, Model()), 12)
    file = next(file for file in files_of_cache(folder) if file.name == "moments.npy")
    if "manifest" in damage:
        file = file.with_name("manifest.json")
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        data = file.read_bytes()
        put(file, b"" if damage == "emptied" else data[: len(data) // 2])
    model = Model()
    with caplog.at_level(logging.WARNING, "codi_jax"):
        assert same(take(load(folder, model), 12), whole)
    assert model.images > 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(rf"The latents in .* are damaged and are computed again: .*{file.name}", line)


def test_a_cache_from_before_there_were_checksums_still_serves(folder):
    whole = take(load(folder, Model()), 12)
    for file in files_of_cache(folder):
        if ".crc32" in file.name:
            file.unlink()
    (manifest,) = caches(folder)
    contents = json.loads(manifest.read_text())
    del contents["arrays"]
    manifest.write_text(json.dumps(contents))
    model = Model()
    assert same(take(load(folder, model), 12), whole)
    assert model.images == 0


def test_a_damaged_cache_beside_is_in_nobody_s_way(folder):
    load(folder, Model())
    (manifest,) = caches(folder)
    manifest.write_text("{")
    load(folder, Model("another"))


def test_a_full_disk_is_an_error_and_not_a_signal(folder, monkeypatch):
    asked = []

    def full(file: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no space for the .* GB of .*\.npy: free some, or .* --cache_latents_dir"):
        load(folder, Model())
    assert not list((folder.parent / "cache" / "latents").glob("*.building/*.npy.*"))
    monkeypatch.undo()
    take(load(folder, Model()), 1)


def test_the_place_of_every_array_is_taken_before_it_is_written(folder, monkeypatch):
    sizes, allocate = {}, os.posix_fallocate

    def note(file: int, start: int, size: int) -> None:
        sizes[Path(f"/proc/self/fd/{file}").readlink().name] = size
        allocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", note)
    load(folder, Model())
    written = {file.name: file.stat().st_size for file in files_of_cache(folder)}
    at_once = [name for name in written if name.startswith(("text", "first_caption"))]
    assert sizes == {name: size for name, size in written.items() if name not in at_once}


def test_joined_parts_keep_their_checksums(folder):
    for index in (0, 1):
        compute_part(folder, Model(), index, 2)
    names = {file.name for file in files_of_cache(folder)}
    assert {"moments.crc32.npy", "context.crc32.npy", "text.crc32.npy"} <= names
    file = next(file for file in files_of_cache(folder) if file.name == "moments.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    put(file, data)
    with pytest.raises(ValueError, match=f"moments.npy is damaged at row {COUNT - 1}"):
        take(load(folder, Model()), 12)
