"""Ends a run that hangs, and says where: a step that never ends, data that never come."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator

from codi_jax.io import processes

_LOOKS = 10  # per limit
_BEATS = 5.0  # seconds in which the processes learn what the others are at


class Watchdog:
    """Watches that nothing takes longer than a limit.

    Args:
      limit: seconds; 0 watches nothing.
    """

    def __init__(self, limit: float | int) -> None:
        self._limit = limit
        self._task: tuple[str, float] | None = None
        self._stopped = threading.Event()
        if limit:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Watches the block, which does what the noun says."""
        before, self._task = self._task, (what, time.monotonic())
        processes.doing(what)
        try:
            yield
        finally:
            self._task = before

    def close(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._limit / _LOOKS):
            task = self._task
            if task is not None and time.monotonic() - task[1] > self._limit:
                time.sleep(_BEATS)
                if self._task is task and not self._stopped.is_set():
                    self._bark(task[0])

    def _bark(self, what: str) -> None:
        faulthandler.dump_traceback(sys.stderr)
        where = processes.activities()
        others = f" ({where})" if processes.are_several() else ""
        processes.abort(
            f"error: {what} has taken more than {self._limit:g} s{others}: a device, a connection or a disk may hang. "
            "Resume with --resume_from_checkpoint latest, or raise --hang_timeout."
        )
