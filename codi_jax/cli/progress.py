"""Progress that is seen: a bar on a terminal, and a line every so often where the output goes to a file."""

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_EVERY = 10.0  # seconds between two lines in a file
_is_silent = False


def silence() -> None:
    """From here on, this process shows no progress: another one does the same work, and shows it."""
    global _is_silent  # noqa: PLW0603
    _is_silent = True


class Progress:
    """Shows how much of some work is done, and how long the rest will take.

    Examples:
      >>> with Progress("encoding images", len(images)) as progress:
      ...     for image in images:
      ...         progress.advance()

    Args:
      what: the work.
      total: how much there is; ``None`` if that is not known.
      unit: of what.
    """

    def __init__(self, what: str, total: int | None, unit: str = "images") -> None:
        self._what, self._total, self._unit = what, total, unit
        has_bar = sys.stderr.isatty() and not _is_silent
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=not has_bar)
        self._done, self._began, self._told = 0, time.monotonic(), time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts what has been done since."""
        self._done += count
        if not self._bar.disable:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= _EVERY and not _is_silent:
            self._told = now
            sys.stderr.write(f"{self._line(now - self._began)}\n")
            sys.stderr.flush()

    def _line(self, seconds: float) -> str:
        if self._total is None:
            return f"{self._what}: {self._done} {self._unit}"
        left = datetime.timedelta(seconds=round(seconds * max(self._total - self._done, 0) / max(self._done, 1)))
        return f"{self._what}: {self._done} of {self._total} {self._unit}, {left} left"


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Says every ten seconds that some work goes on whose end cannot be foreseen, such as a compilation.

    Examples:
      >>> with heartbeat("compiling the step"):
      ...     program = lowered.compile()

    Args:
      what: the work.
    """
    if _is_silent:
        yield
        return
    ended = threading.Event()

    def tell() -> None:
        began = time.monotonic()
        while not ended.wait(_EVERY):
            tqdm.write(f"{what}: {time.monotonic() - began:.0f} s so far", file=sys.stderr)

    teller = threading.Thread(target=tell, name="heartbeat", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def progress_over(items: Iterable[Item], what: str, total: int | None, unit: str = "images") -> Iterator[Item]:
    """The items, counted when the next one is asked for; see `Progress`."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
