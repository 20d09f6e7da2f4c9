"""What the loop reports of its steps, without waiting for them."""

import dataclasses
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from stand_in import Loader, make_train_step, metrics_of, run

from codi_jax.training import loop


def slow_step(rounds: int):
    """A step that keeps the device busy for a while."""

    def train_step(state, frozen, batch):
        x = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), jnp.eye(256) * state.params["second"]["bias"][0])
        state, metrics = make_train_step()(state, frozen, batch)
        return state, metrics | {"busy": x[0, 0]}

    return train_step


def test_the_host_runs_ahead_of_the_device_but_not_far(tmp_path, monkeypatch):
    """The loop asks for the next batch while steps are under way; fetching a metric each step would drain them."""
    in_flight, adding = [], loop.Monitor.add

    def add(self, step, metrics):
        adding(self, step, metrics)
        in_flight.append(sum(not metrics["busy"].is_ready() for _, metrics in self._in_flight))

    fetched, device_get = [], jax.device_get
    monkeypatch.setattr(loop.Monitor, "add", add)
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or device_get(tree))
    run(tmp_path, train_step=slow_step(40), max_train_steps=40, logging_steps=7, checkpointing_steps=0)
    assert sorted(in_flight)[len(in_flight) // 4] >= 2
    assert max(in_flight) <= 3
    # All steps of a report at once.
    assert fetched == [7, 7, 7, 7, 7, 5]


def test_metrics(tmp_path):
    def train_step(state, frozen, batch):
        step = state.step + 1
        metrics = {
            "loss": jnp.where(step == 2, jnp.nan, step.astype(float)),
            "skipped": step,
            "learning_rate": 1.0 / step,
        }
        return dataclasses.replace(state, step=step), metrics

    run(tmp_path, train_step=train_step, logging_steps=4)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["loss"] for line in lines] == pytest.approx([(1 + 3 + 4) / 3, 6.5, 9.5])
    assert [line["skipped"] for line in lines] == [4, 8, 10]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1 / 4, 1 / 8, 1 / 10])
    for line in lines:
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds_per_step"])
        assert 0.01 < line["memory_gib"] < 100


def test_time_without_data_is_told_from_time_with(tmp_path):
    slow = Loader(8, lambda number: time.sleep(0.02))
    run(tmp_path / "data", loader=slow, max_train_steps=20, logging_steps=20, checkpointing_steps=0)
    run(tmp_path / "device", train_step=slow_step(40), max_train_steps=20, logging_steps=20, checkpointing_steps=0)
    (data,), (device,) = metrics_of(tmp_path / "data"), metrics_of(tmp_path / "device")
    assert data["data_wait"] > 0.5
    assert data["seconds_per_step"] >= 0.019
    assert device["data_wait"] < 0.25


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, logging_steps=5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("step")] == ["step 5/10", "step 10/10"]
    assert "samples/s, 0:00:0" in lines[-1]
    assert any(line.startswith("compiled the step in ") for line in lines)


MEMORY = """
import subprocess, sys
filled = bytearray(2 * 2**30)
code = "from codi_jax.training.monitor import peak_memory; print(peak_memory())"
subprocess.run([sys.executable, "-c", code], check=True)
"""


def test_the_peak_is_that_of_the_process_alone():
    """And not, as getrusage has it, of the larger one that started it."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 1.5e9
