import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_in import State, fingerprint, init_state

from codi_jax.training.checkpoint import (
    CheckpointError,
    CheckpointFlags,
    Checkpoints,
    check_run_config,
    find_checkpoint,
    list_checkpoints,
    require_whole,
    set_damaged_aside,
)

CONFIG = {"learning_rate": 1e-2, "sizes": (64, 64)}


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder: Path, *steps: int, total_limit: int | None = None) -> State:
    """Checkpoints of a state at these steps; the last state."""
    checkpoints = Checkpoints(folder, total_limit)
    state = init_state()
    for step in steps:
        state = dataclasses.replace(state, step=jnp.int32(step))
        checkpoints.save(step, state, {"position": step}, CONFIG)
    checkpoints.close()
    return state


def save_and_wait(checkpoints: Checkpoints, step: int, state: Any) -> None:
    checkpoints.save(step, state, {}, CONFIG)
    checkpoints.wait()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = init_state()
    extremes = jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32)
    state = dataclasses.replace(state, ema={"low": jnp.arange(3, dtype=jnp.bfloat16), "x": extremes, "none": None})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, {"position": 7, "epoch": [1, {"a": None}]}, CONFIG)
    checkpoints.wait()
    restored, position = checkpoints.restore(tmp_path / "checkpoint-5", abstract(state))
    checkpoints.close()
    assert position == {"position": 7, "epoch": [1, {"a": None}]}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    assert fingerprint(restored) == fingerprint(state)
    # The key goes on with the same random numbers.
    np.testing.assert_array_equal(jax.random.normal(restored.key, 4), jax.random.normal(state.key, 4))


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.zeros((256, 1024)), "y": jnp.zeros(2**20)}
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 4):
        state = add(state)
        checkpoints.save(step, state, {}, {})
    for _ in range(20):
        state = add(state)
    checkpoints.wait()
    for step in range(1, 4):
        restored, _ = checkpoints.restore(tmp_path / f"checkpoint-{step}", abstract(state))
        assert all(np.all(np.asarray(leaf) == step) for leaf in jax.tree.leaves(restored))
    checkpoints.close()


def test_names_are_those_of_diffusers(tmp_path):
    save(tmp_path, 9, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    for name in ("checkpoint-007", "checkpoint-11.orbax-checkpoint-tmp", "checkpoint-x", "unet"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == [9, 10]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_total_limit(tmp_path):
    save(tmp_path, 2, 9, 10, 11, total_limit=2)
    assert list_checkpoints(tmp_path) == [10, 11]
    save(tmp_path, 12, total_limit=2)  # those of an earlier process count
    assert list_checkpoints(tmp_path) == [11, 12]


def test_what_was_not_finished_is_removed(tmp_path):
    save(tmp_path, 4)
    left = tmp_path / "checkpoint-6.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("a file")
    mine = tmp_path / "notes"
    mine.mkdir()
    save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8", "notes"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    state = save(tmp_path, 4)
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=2**18), jnp.float32)}
    checkpoints = Checkpoints(tmp_path, total_limit=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-4 is complete.*Make room.*--resume_from_checkpoint latest"
        ) as error:
            save_and_wait(checkpoints, 8, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert list_checkpoints(tmp_path) == [4]
    again = Checkpoints(tmp_path)
    restored, _ = again.restore(tmp_path / "checkpoint-4", abstract(state))
    assert fingerprint(restored) == fingerprint(state)
    again.save(8, state, {}, CONFIG)  # what is left of the attempt is in nobody's way
    again.close()
    assert list_checkpoints(tmp_path) == [4, 8]


def test_a_state_of_another_shape_is_refused(tmp_path):
    save(tmp_path, 4)
    checkpoints = Checkpoints(tmp_path)
    for other, wanted in (
        (init_state(width=4), r"has ema/first/bias with shape \(8,\), this run's has \(4,\)"),
        (dataclasses.replace(init_state(), ema=None), r"has ema/first/bias with shape \(8,\), this run's has None"),
        (dataclasses.replace(init_state(), key=None), r"has key with shape \(2,\), this run's has None"),
    ):
        with pytest.raises(CheckpointError, match=wanted):
            checkpoints.restore(tmp_path / "checkpoint-4", abstract(other))
    checkpoints.close()


def test_settings_must_be_those_of_the_checkpoint(tmp_path):
    save(tmp_path, 4)
    checkpoint = tmp_path / "checkpoint-4"
    check_run_config(checkpoint, CONFIG)
    with pytest.raises(CheckpointError, match=r"made with learning_rate = 0.01, but this run has 0.1: give the same"):
        check_run_config(checkpoint, CONFIG | {"learning_rate": 1e-1})
    with pytest.raises(CheckpointError, match=r"made with sizes = \[64, 64\], but this run has null"):
        check_run_config(checkpoint, {"learning_rate": 1e-2})
    with pytest.raises(CheckpointError, match=r"made with ema = null, but this run has true"):
        check_run_config(checkpoint, CONFIG | {"ema": True})
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-5 is not a checkpoint of codi_jax"):
        check_run_config(tmp_path / "checkpoint-5", CONFIG)


def test_which_checkpoint_is_meant(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine / "checkpoint-9", mine / "checkpoint-10", other / "checkpoint-3", tmp_path / "unet"):
        folder.mkdir(parents=True)
    assert find_checkpoint("latest", mine) == mine / "checkpoint-10"
    assert find_checkpoint("checkpoint-10", mine) == mine / "checkpoint-10"
    assert find_checkpoint(str(mine / "checkpoint-10"), mine) == mine / "checkpoint-10"
    assert find_checkpoint(str(other / "checkpoint-3"), tmp_path / "new") == other / "checkpoint-3"
    assert find_checkpoint("latest", tmp_path / "new") is None
    assert find_checkpoint(None, tmp_path / "new") is None
    with pytest.raises(CheckpointError, match=r"holds checkpoint-10 of an earlier run: resume .* latest, or choose"):
        find_checkpoint(None, mine)
    with pytest.raises(CheckpointError, match=r"checkpoint-7 is not a checkpoint.*holds checkpoint-9, checkpoint-10"):
        find_checkpoint("checkpoint-7", mine)
    with pytest.raises(CheckpointError, match="unet is not a checkpoint"):
        find_checkpoint(str(tmp_path / "unet"), mine)
    for resume in ("checkpoint-9", str(other / "checkpoint-3")):
        with pytest.raises(CheckpointError, match=r"would write over .*checkpoint-10"):
            find_checkpoint(resume, mine)


@pytest.mark.parametrize(("flag", "value"), [("checkpointing_steps", -1), ("checkpoints_total_limit", 0)])
def test_a_number_that_makes_no_sense_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}"):
        CheckpointFlags(**{flag: value}).check()


def test_the_settings_are_plain_json(tmp_path):
    save(tmp_path, 4)
    assert json.loads((tmp_path / "checkpoint-4/run_config/metadata").read_text())["sizes"] == [64, 64]


# Damage


def flip_a_bit(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def files_of(checkpoint: Path) -> list[Path]:
    """All that is not empty, but for what Orbax writes last and nobody reads."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in files if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"))


def test_every_flipped_bit_is_noticed(tmp_path):
    state = save(tmp_path, 4)
    checkpoint, rng = tmp_path / "checkpoint-4", np.random.default_rng(0)
    require_whole(checkpoint)
    names = {path.name for path in files_of(checkpoint)}
    assert {"manifest.ocdbt", "metadata", "checksums.json"} <= names
    for path in files_of(checkpoint) * 3:
        before = path.read_bytes()
        flip_a_bit(path, rng)
        with pytest.raises(CheckpointError, match=f"checkpoint-4 is damaged .*{path.name} is not what was written"):
            require_whole(checkpoint)
        path.write_bytes(before)
    require_whole(checkpoint)
    # What has no checksum does not matter.
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        for path in checkpoint.rglob(name):
            path.write_bytes(b"\x00")
    checkpoints = Checkpoints(tmp_path)
    assert fingerprint(checkpoints.restore(checkpoint, abstract(state))[0]) == fingerprint(state)
    checkpoints.close()


@pytest.mark.parametrize("damage", ["flipped", "halved", "missing", "emptied"])
def test_the_newest_whole_checkpoint_takes_the_place_of_damaged_ones(tmp_path, damage):
    save(tmp_path, 2, 4, 6, 8)
    for step in (6, 8):
        largest = max(files_of(tmp_path / f"checkpoint-{step}"), key=lambda path: path.stat().st_size)
        data = largest.read_bytes()
        if damage == "flipped":
            flip_a_bit(largest, np.random.default_rng(step))
        elif damage == "missing":
            largest.unlink()
        else:
            largest.write_bytes(data[: len(data) // 2] if damage == "halved" else b"")
    lines = set_damaged_aside(tmp_path)
    assert list_checkpoints(tmp_path) == [2, 4]
    assert [line.partition(" is damaged and was set aside: ")[0] for line in lines] == [
        str(tmp_path / "checkpoint-8"), str(tmp_path / "checkpoint-6"),
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-8.damaged").is_dir()
    assert set_damaged_aside(tmp_path) == []
    save(tmp_path, 8)
    flip_a_bit(files_of(tmp_path / "checkpoint-8")[-1], np.random.default_rng(0))
    set_damaged_aside(tmp_path)
    assert (tmp_path / "checkpoint-8.damaged1").is_dir()


def test_where_every_checkpoint_is_damaged_nothing_starts_over(tmp_path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(checkpoint-4: .*checkpoint-2: "):
        set_damaged_aside(tmp_path)
    assert list_checkpoints(tmp_path) == [2, 4]


def test_a_checkpoint_without_checksums_is_taken_as_it_is(tmp_path):
    state = save(tmp_path, 4)
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "checksums.json").unlink()
    require_whole(checkpoint)
    assert set_damaged_aside(tmp_path) == []
    checkpoints = Checkpoints(tmp_path)
    assert fingerprint(checkpoints.restore(checkpoint, abstract(state))[0]) == fingerprint(state)
    for path in (checkpoint / "state").rglob("d/*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4 cannot be read .*move it away"):
        checkpoints.restore(checkpoint, abstract(state))
    checkpoints.close()


def test_settings_that_an_old_checkpoint_does_not_know_are_not_compared(tmp_path):
    save(tmp_path, 4)
    checkpoint, given = tmp_path / "checkpoint-4", CONFIG | {"new": 1}
    check_run_config(checkpoint, given, if_both=("new", "learning_rate"))
    with pytest.raises(CheckpointError, match="made with learning_rate"):
        check_run_config(checkpoint, given | {"learning_rate": 1}, if_both=("new", "learning_rate"))
