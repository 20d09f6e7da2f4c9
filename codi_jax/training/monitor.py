"""Monitors a run's progress: follows the steps on the device and reports their metrics when due."""

import collections
import contextlib
import datetime
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from codi_jax.training.tracking import Tracker, log
from codi_jax.training.watchdog import Watchdog

Metrics = Mapping[str, Any]
"""Scalars by name, still on the device."""

_SHOWN = ("loss", "grad_norm", "learning_rate")


class Monitor:
    """Follows the steps without blocking the device.

    A step's metrics stay on the device until ``every`` steps' metrics are fetched together, long after the step is
    done.

    Args:
      tracker: where the metrics go.
      every: the number of steps between two reports.
      first: the number of steps done when the run started.
      total: the number of steps when it ends.
      batch_size: the number of examples in a step.
      on_report: called with each report.
      watchdog: watches the steps and the data.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        every: int,
        first: int,
        total: int,
        batch_size: int,
        on_report: Callable[[int, dict[str, float]], None],
        watchdog: Watchdog,
    ) -> None:
        self._tracker, self._every, self._on_report, self._watchdog = tracker, every, on_report, watchdog
        self._total, self._batch_size = total, batch_size
        self._in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._finished: list[Metrics] = []
        self._data_wait = 0.0
        self._began = time.perf_counter()
        shown = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=not shown)

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step that was just dispatched."""
        self._in_flight.append((step, metrics))

    def settle(self, in_flight: int = 0) -> None:
        """Waits until at most this many steps are in flight, and reports the finished ones."""
        while len(self._in_flight) > in_flight:
            step, metrics = self._in_flight.popleft()
            with self._watchdog.watching(f"step {step}"):
                jax.block_until_ready(metrics)
            self._finished.append(metrics)
            self._bar.update()
            if step % self._every == 0 or step == self._total:
                self._report(step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Lets the steps in flight finish, and excludes what follows from their time."""
        self.settle()
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time if the device runs out of work in the meantime."""
        began = time.perf_counter()
        with self._watchdog.watching(f"reading the data of step {self._in_flight[-1][0] + 1}"):
            yield
        if all(leaf.is_ready() for leaf in jax.tree.leaves(self._in_flight[-1][1])):
            self._data_wait += time.perf_counter() - began

    def close(self) -> None:
        """Leaves the bar where it is."""
        self._watchdog.close()
        self._bar.close()

    def _report(self, step: int) -> None:
        now = time.perf_counter()
        seconds, steps = now - self._began, len(self._finished)
        values = _summary(jax.device_get(self._finished)) | {
            "samples_per_second": steps * self._batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self._data_wait / seconds,
            "memory_gib": _memory_in_use() / 2**30,
        }
        self._finished, self._began, self._data_wait = [], now, 0.0
        self._tracker.scalars(values, step)
        self._show(values, step)
        self._on_report(step, values)

    def _show(self, values: Mapping[str, float], step: int) -> None:
        shown = {name: f"{values[name]:.4g}" for name in _SHOWN if name in values}
        if not self._bar.disable:
            self._bar.set_postfix(shown)
            return
        left = datetime.timedelta(seconds=round((self._total - step) * values["seconds_per_step"]))
        metrics = "".join(f"{name} {value}, " for name, value in shown.items())
        log(
            f"step {step}/{self._total}: {metrics}{values['seconds_per_step']:.3g} s/step, "
            f"{values['samples_per_second']:.3g} samples/s, {left} left"
        )


def _summary(metrics: list[Metrics]) -> dict[str, float]:
    """One number for several steps: the mean of the finite values; for counters and the learning rate, the last."""
    summary = {}
    for name, last in metrics[-1].items():
        values = np.asarray([step[name] for step in metrics])
        finite = values[np.isfinite(values)]
        is_last = name == "learning_rate" or np.issubdtype(values.dtype, np.integer)
        summary[name] = float(last if is_last or not finite.size else finite.mean(dtype=np.float64))
    return summary


def _memory_in_use() -> int:
    """The peak memory in bytes: of the first device, or of the process on a CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or peak_memory()


def peak_memory() -> int:
    """The peak of this process's resident memory in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage's peak begins as that of the process that started this one
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
