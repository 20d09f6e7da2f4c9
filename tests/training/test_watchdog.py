"""A run that hangs ends, and says where."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import stand_in
from several import free_address, start

SCRIPT = str(Path(stand_in.__file__))


def test_data_that_never_come(tmp_path: Path):
    flags = {"hang_at_batch": 3, "hang_timeout": 2, "checkpointing_steps": 1, "validation_steps": 0}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path / "run"), json.dumps(flags)], env=dict(os.environ), capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: reading the data of step 3 has taken more than 2 s: a device, a connection or a disk"
    )
    assert "in hang" in done.stderr  # where the thread is
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    subprocess.run([sys.executable, SCRIPT, str(tmp_path / "run"), json.dumps(resumed)], check=True)


def test_the_process_that_hangs_is_named(tmp_path: Path):
    """The first waits for the second in a step, and the second for its data."""
    flags = {"hang_at_batch": 3, "hang_timeout": 3, "checkpointing_steps": 0, "train_batch_size": 4}
    address = free_address()
    started = [start([SCRIPT, str(tmp_path / "run"), json.dumps(flags)], index, address) for index in (0, 1)]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode != 0 for process in started)
    message = next(line for line in said[0].splitlines() if line.startswith("error: "))
    assert "has taken more than 3 s" in message
    assert re.search(r"process 1 \([\w.-]+\): reading the data of step 3", message)


def test_a_silent_process_is_lost_after_the_time_that_a_flag_sets(tmp_path: Path):
    """Stopped, not killed: its connections stay open."""
    flags = {"peer_timeout": 6, "hang_timeout": 0, "checkpointing_steps": 0, "max_train_steps": 100_000}
    address = free_address()
    started = [start([SCRIPT, str(tmp_path / "run"), json.dumps(flags)], index, address) for index in (0, 1)]
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert all(process.poll() is None for process in started)
        time.sleep(0.1)
    os.kill(started[1].pid, 19)  # SIGSTOP
    began = time.monotonic()
    out, err = started[0].communicate(timeout=100)
    started[1].kill()
    assert started[0].returncode == 1, out
    assert "process 1" in err
    assert "has been silent for 6 s" in err
    assert time.monotonic() - began < 40


def test_what_takes_long_for_a_reason_is_not_watched(tmp_path: Path):
    """Validation images, checkpoints and exports may take longer than a step."""

    def slow(*_: object) -> dict:
        time.sleep(2.5)
        return {}

    state = stand_in.run(tmp_path, hang_timeout=1, max_train_steps=3, validation_steps=2, validate=slow)
    assert int(state.step) == 3
