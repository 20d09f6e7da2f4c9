"""The same work on one machine and on Ray."""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from test_coyo import contents, images, make

from codi_jax.data.files import Folder
from codi_jax.data.preparation.engine import EngineFlags, run
from codi_jax.data.preparation.job import ShardRecord, _kept, begin

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    """A local Ray with two cores, started by the tool itself; stopped afterward."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def workers() -> list[int]:
    """The processes of this test's Ray that are at work."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended
            if "".join(process.cmdline()[:1]).startswith("ray::Map"):
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_ray_makes_the_same_data_set(tmp_path: Path, cluster):
    source = images(tmp_path / "in", 60)
    for number in (3, 17, 40):
        (source / f"{number:04}.jpg").write_text("broken")
    for engine in ("datasets", "ray"):
        make(source, tmp_path / engine, engine=engine, num_proc=2, max_train_samples=45)
    assert contents(tmp_path / "ray") == contents(tmp_path / "datasets")


@dataclass(frozen=True)
class KilledOnce:
    """Doubles a number, and kills its own process the first time that it sees one of these."""

    folder: Path
    fatal: tuple[int, ...]

    def __call__(self, number: int) -> int:
        mark = self.folder / str(number)
        if number in self.fatal and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number


@pytest.mark.slow
def test_ray_does_again_what_was_lost_with_a_process(tmp_path: Path, cluster):
    flags = EngineFlags(engine="ray", num_proc=2)
    assert sorted(run(KilledOnce(tmp_path, (3, 11)), range(16), flags)) == [2 * number for number in range(16)]
    assert {path.name for path in tmp_path.iterdir()} == {"3", "11"}, "nothing was killed"


@pytest.mark.slow
def test_a_ray_worker_killed_in_the_middle_loses_nothing(tmp_path: Path, cluster):
    source = images(tmp_path / "in", 400, (480, 400))
    make(source, tmp_path / "clean", num_proc=2, resolution=256, shard_size=10)
    killed: list[int] = []

    def kill_one() -> None:
        staging = tmp_path / "out/.unfinished"
        while len(list(staging.glob("*/record.json"))) < 4:
            time.sleep(0.01)
        while not (at_work := workers()):
            time.sleep(0.01)
        os.kill(at_work[0], signal.SIGKILL)
        killed.append(at_work[0])

    killer = threading.Thread(target=kill_one)
    killer.start()
    make(source, tmp_path / "out", engine="ray", num_proc=2, resolution=256, shard_size=10)
    killer.join()
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_killed_process_is_said(tmp_path: Path):
    flags = EngineFlags(num_proc=2)
    with pytest.raises(ChildProcessError, match="one of the processes was killed, perhaps for lack of memory: run the"):
        run(KilledOnce(tmp_path, (3,)), range(8), flags)


def test_results_of_two_processes():
    assert sorted(run(abs, [-3, 2, -1], EngineFlags(num_proc=2))) == [1, 2, 3]


def test_a_ray_that_is_not_there():
    with pytest.raises(ValueError, match="--ray_address auto is not possible: it must be omitted, or"):
        EngineFlags(ray_address="auto").check()


def test_a_data_set_begun_under_the_former_name_of_a_condition_goes_on(tmp_path: Path):
    target = Folder(str(tmp_path / "begun"))
    (target / ".unfinished").write("job.json", b'{"condition": "mask", "resolution": 512}')
    assert begin(target, {"condition": "inpainting", "resolution": 512})
    with pytest.raises(ValueError, match=r"was begun with other flags \(condition\)"):
        begin(target, {"condition": "canny", "resolution": 512})


def test_what_an_earlier_start_wrote_down_is_named_where_it_is_damaged(tmp_path: Path):
    target = Folder(str(tmp_path / "finished"))
    for damaged in (b"", b'{"samples": 3, "ma', b"[]", b"\x00\x00"):
        target.write("summary.json", damaged)
        with pytest.raises(ValueError, match=r"summary.json .* JSON .*name another --train_data_dir, or remove"):
            begin(target, {})
    target = Folder(str(tmp_path / "begun"))
    (target / ".unfinished").write("job.json", b"{")
    with pytest.raises(ValueError, match=r"\.unfinished/job.json is not valid JSON"):
        begin(target, {})
    # The record of one shard is not missed: the shard is made again.
    staging = target / ".unfinished"
    for damaged in (b"", b"[1]", b'{"sizes": 1}'):
        (staging / "00000003").write("record.json", damaged)
        assert _kept(staging, 3) is None
    (staging / "00000003").write("record.json", b'{"size": 1}')
    assert _kept(staging, 3) == ShardRecord(1)
