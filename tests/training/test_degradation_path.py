"""The path of DisBack on disk and on the device, with the UNet of a small model."""

import functools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import TINY_SD15
from several import end_of, free_address, start

from codi_jax.io.checksums import digest_of
from codi_jax.io.weights import load_model, save_model
from codi_jax.methods.disback import DisbackFlags, target_index
from codi_jax.models import sharding
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.pipeline.conditions import Frozen
from codi_jax.training import loop
from codi_jax.training.degradation_path import (
    DegradationPath,
    MovingTarget,
    check_identity,
    finish_path,
    open_path,
    write_node,
)

NODES = 3
IDENTITY: dict[str, Any] = {"model": "a/teacher", "teacher": "abc", "timesteps": [399]}
UNET = UNet2DCondition(UNetConfig.from_dict({**TINY_SD15, "block_out_channels": [8, 16], "norm_num_groups": 4}))


def random_unet(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f4"), UNET.abstract_params())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    save_model(folder, "unet", UNET, random_unet(100))
    for number in range(NODES):
        write_node(folder / "path", number, UNET, random_unet(number), np.float32)
    finish_path(folder / "path", NODES, IDENTITY)
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded / "path", tmp_path / "path")


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), ours, theirs)


def test_a_path_is_read_as_it_was_written(folder: Path):
    path = open_path(folder)
    check_identity(path, IDENTITY)
    assert list(path.nodes) == ["node_00", "node_01", "node_02"]
    for number in range(NODES):  # every one of them: the reference deletes the earlier ones
        assert_same(path.load(number, np.float32), random_unet(number))
    assert_same(path.load(-1, np.float32), random_unet(NODES - 1))


def test_a_stage_that_was_not_finished_is_no_path(folder: Path):
    (folder / "path.json").unlink()
    with pytest.raises(ValueError, match=r"no finished path \(no path.json\): record one with --stage degradation"):
        open_path(folder)


def test_a_path_that_is_recorded_anew_is_none_until_it_is_whole(folder: Path):
    write_node(folder, 0, UNET, random_unet(7), np.float32)
    with pytest.raises(ValueError, match="no finished path"):
        open_path(folder)


def test_missing_nodes_are_named(folder: Path):
    shutil.rmtree(folder / "node_01")
    with pytest.raises(ValueError, match="lacks node_01 of its 3 nodes"):
        open_path(folder)


def test_a_node_that_was_replaced_is_refused(folder: Path):
    path = open_path(folder)
    save_model(folder, "node_01", UNET, random_unet(7))
    with pytest.raises(ValueError, match="node_01 is damaged, or was replaced"):
        path.load(1, np.float32)


def test_a_path_of_another_model_is_refused(folder: Path):
    with pytest.raises(ValueError, match="recorded for another model, a/teacher: record a path for b/other"):
        check_identity(open_path(folder), {**IDENTITY, "model": "b/other", "teacher": "def"})
    with pytest.raises(ValueError, match=r"timesteps = \[399\], and this run has \[299\]"):
        check_identity(open_path(folder), {**IDENTITY, "timesteps": [299]})


def test_a_file_that_is_no_path_is_refused(folder: Path):
    (folder / "path.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_path(folder)
    (folder / "path.json").write_text("[]")
    with pytest.raises(ValueError, match="list instead of an object: record the path again"):
        open_path(folder)
    for content in ("{}", '{"nodes": []}'):
        (folder / "path.json").write_text(content)
        with pytest.raises(ValueError, match="names no nodes: record the path again"):
            open_path(folder)


def targets(recorded: Path, path: DegradationPath, flags: DisbackFlags, dtype: Any) -> MovingTarget:
    """As the training makes them."""
    unets: list[Any] = [functools.partial(path.load, number, dtype) for number in reversed(range(NODES))]
    host = lambda _, array: array  # noqa: E731
    unets.append(lambda: load_model(recorded, "unet", dtype=dtype, place=host)[1])
    index_at = functools.partial(target_index, flags=flags, num_nodes=NODES)
    return MovingTarget(Frozen({"scale": jnp.float32(2)}, None), unets, index_at, sharding.make_mesh())


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_target_walks_back_and_ends_at_the_teacher(recorded: Path, dtype: Any):
    """Bit for bit the teacher as the run loaded it, from then on for ever; the reference never gets there."""
    flags = DisbackFlags(interval=2, dfake_gen_update_ratio=3)
    walk = targets(recorded, open_path(recorded / "path"), flags, dtype)
    assert isinstance(walk, loop.Moving)
    _, teacher = load_model(recorded, "unet", dtype=dtype)
    wanted = [*(jax.tree.map(lambda x: jnp.asarray(x, dtype), random_unet(n)) for n in (1, 0)), teacher]
    for step in range(30):
        updates = len(range(0, step, 3))
        trees = walk.at(step)
        assert trees.params["scale"] == 2
        assert_same(trees.target, wanted[min(updates // 2, 2)])
    walk.close()


def test_a_resumed_run_has_the_same_targets(recorded: Path):
    flags = DisbackFlags(interval=2, dfake_gen_update_ratio=3)
    path = open_path(recorded / "path")
    whole = targets(recorded, path, flags, np.float32)
    seen = [digest_of(whole.at(step).target) for step in range(16)]
    whole.close()
    assert len(set(seen)) == NODES
    for first in (1, 6, 7, 13):
        resumed = targets(recorded, path, flags, np.float32)
        assert digest_of(resumed.at(first).target) == seen[first]
        resumed.close()


def test_the_next_one_is_read_ahead_and_only_that():
    """By a thread, once each; an error in it comes out where the node is needed."""
    read: list[tuple[int, bool]] = []

    def reader(number: int) -> Any:
        def load() -> Any:
            if number == 2:
                raise ValueError("node_00 is damaged")
            read.append((number, threading.current_thread() is threading.main_thread()))
            return {"kernel": np.full(3, number, np.float32)}

        return load

    walk = MovingTarget(Frozen({}, None), [reader(i) for i in range(3)], lambda step: step // 2, sharding.make_mesh())
    first = walk.at(0)
    assert walk.at(1) is first
    assert walk.at(2).target["kernel"][0] == 1
    assert read == [(0, True), (1, False)]
    with pytest.raises(ValueError, match="node_00 is damaged"):
        walk.at(4)
    walk.close()


def test_path_json_says_what_the_path_is_of(recorded: Path):
    content = json.loads((recorded / "path" / "path.json").read_text())
    assert content["model"] == "a/teacher"
    assert len(content["nodes"]["node_00"]) == 64


TWO_PROCESSES = """
import sys, time
from pathlib import Path
import jax
from codi_jax.training import degradation_path
from codi_jax.io import processes

processes.initialize()
folder = Path(sys.argv[1])
folder_digest = degradation_path.folder_digest

def slowly(node, pattern):
    time.sleep(0.5)
    return folder_digest(node, pattern)

degradation_path.folder_digest = slowly
degradation_path.finish_path(folder, 3, {})
print(len(degradation_path.open_path(folder).nodes), file=sys.stderr)
"""


def test_every_process_reads_the_path_after_it_is_written(folder: Path):
    (folder / "path.json").unlink()
    address = free_address()
    assert end_of([start(["-c", TWO_PROCESSES, str(folder)], i, address) for i in (0, 1)]) == [(0, "3"), (0, "3")]
