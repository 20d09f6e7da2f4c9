"""Signals that end a run: SIGTERM and SIGINT, after the current step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], int]]:
    """Turns SIGTERM and SIGINT into a function to call after each step: the signal to end the run with, or 0.

    All processes of a run get the same answer after the same step. A second SIGINT ends the process at once.
    """
    received: list[int] = []
    several = jax.process_count() > 1

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if several:
            # JAX has its own SIGTERM handler, and makes the processes agree on a step.
            os.kill(os.getpid(), signal.SIGTERM)

    def answer(step: int) -> int:
        if several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return received[0] if received else 0

    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield answer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
