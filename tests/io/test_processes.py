import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import jax
import pytest
import stand_in
from several import end_of, free_address, start

from codi_jax.io import processes

LAUNCHERS = ("JAX_", "SLURM", "OMPI", "TPU_", "KUBERNETES", "MEGASCALE", "JOB_COMPLETION")
SCRIPT = Path(stand_in.__file__)
LIMIT = {"initialization_timeout": 360}  # beyond that of codi_jax, which ends with a sentence

# A command of two processes, which come to a point together before they do what the test is about.
COMMAND = """
import sys, threading, time
from dataclasses import dataclass
import jax
from codi_jax.cli import command_line
from codi_jax.io import processes
from codi_jax.cli.flags import Flags

@dataclass(frozen=True)
class Args(Flags):
    seed: int = 0

def main(args):
    processes.initialize()
    processes.agree("flags", {"--seed": args.seed}, "give all the same command")
    processes.wait_for_all("start")
    print("joined", flush=True)
    if jax.process_index() == %d:
        %s
    threading.Event().wait(90)  # in Python, so that a signal does what it does

command_line.run(Args, main)
"""


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "host[1-2]"}, True),
        # One task with all the machine's GPUs: JAX would take the first only.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "host1"}, False),
        # Inside sbatch, but not started by srun.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
    ],
)
def test_other_processes_are_joined_only_where_there_are_some(environment, joins, monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    processes.initialize()
    assert calls == ([LIMIT] if joins else [])


def test_processes_can_be_given_in_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    processes.initialize()
    assert calls == [{"num_processes": 4, "process_id": 3, **LIMIT}]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS is not: set it to host:port",
        ),
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID is set and JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two': it must be a whole number"),
    ],
)
def test_processes_without_an_address_do_not_run_alone(environment, message, monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.initialize()


def test_one_process_agrees_with_itself_and_ends_itself():
    processes.agree("flags", {"--seed": 1}, "give all the same command")
    assert processes.gather({"position": 1}) == [{"position": 1}]
    with pytest.raises(SystemExit, match="error: no"):
        processes.end("error: no")


@pytest.mark.parametrize(("index", "other"), [(1, "process 0, which does not answer at"), (0, "the other 1 processes")])
def test_whom_a_process_waits_for_is_said_and_the_wait_has_a_bound(index, other):
    code = "from codi_jax.io import processes; processes.initialize()"
    began = time.monotonic()
    process = start(["-c", code], index, address := free_address(), CODI_JAX_JOIN_TIMEOUT="2")
    ((status, said),) = end_of([process])
    assert status == 1, said
    assert re.match(
        rf"error: waited \d+ s for {other}.*{address}.*check that all processes of the run were started", said
    )
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("start_of_main", ["command_line.run(Args, main)", "main(Args())"])
def test_an_error_in_one_process_ends_both(index, start_of_main):
    """The one that fails ends at once; the other one is told why. So it is in a program of somebody else."""
    command = COMMAND.replace("command_line.run(Args, main)", start_of_main)
    code = ["-c", command % (index, "raise KeyError('lost')")]
    address = free_address()
    began = time.monotonic()
    ended = end_of([start(code, i, address) for i in (0, 1)])
    assert [status for status, _ in ended] == [1, 1]
    assert ended[index][1] == "KeyError: 'lost'"
    host = re.escape(socket.gethostname())
    assert re.fullmatch(
        rf"error: process {index} \({host}\) ended with «KeyError: 'lost'», so this process ends too\.",
        ended[1 - index][1],
    )
    assert time.monotonic() - began < 45


def test_processes_with_other_flags_end_at_the_start():
    code, address = ["-c", COMMAND % (2, "pass")], free_address()
    ended = end_of([start([*code, "--seed", str(i)], i, address) for i in (0, 1)])
    for status, said in ended:
        assert status == 1
        assert re.search(r"differ in their flags: --seed is [01] in process [01] \(.*\) and [01] in process", said)
        assert "give all the same command." in said


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other():
    """Process 0 is told by its silence, and says so before JAX aborts."""
    code, address = ["-c", COMMAND % (2, "pass")], free_address()
    started = [start(code, i, address) for i in (0, 1)]
    for process in started:
        assert "joined\n" in iter(process.stdout.readline, "")
    started[1].send_signal(signal.SIGKILL)
    (status, said), _ = end_of(started, timeout=90)
    assert status == 1
    assert re.search(r"error: process 1 \(.*\) has been silent for 60 s", said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (({}, {"train_batch_size": 2}), "--train_batch_size"),
        (({}, {"max_train_steps": 6}), "--max_train_steps"),
        (({}, {"seed": 3}), "--seed"),
    ],
)
def test_a_training_with_other_flags_in_each_process_does_not_begin(tmp_path, flags, named):
    address = free_address()
    started = [
        start([str(SCRIPT), str(tmp_path), json.dumps({"train_batch_size": 4} | given)], i, address)
        for i, given in enumerate(flags)
    ]
    for status, said in end_of(started, timeout=120):
        assert status == 1
        assert named in said
    assert not (tmp_path / "config.yaml").exists()
