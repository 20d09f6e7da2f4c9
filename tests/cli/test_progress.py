"""Progress on a terminal and in a log."""

import io
import sys
import threading
import time

import pytest

from codi_jax.cli import progress
from codi_jax.cli.progress import Progress, heartbeat, progress_over


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the module sees, to be changed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with Progress("drawing", 100) as shown:
        for _ in range(25):
            clock[0] += 1.0
            shown.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "drawing: 20 of 100 images, 0:00:40 left",
        "drawing: 40 of 100 images, 0:00:30 left",
    ]
    with Progress("reading", None, "rows") as shown:
        clock[0] += 10
        shown.advance(7)
    assert capsys.readouterr().err == "reading: 7 rows\n"


def test_items_are_given_as_they_are(capsys: pytest.CaptureFixture) -> None:
    assert list(progress_over("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no lines beside it."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(progress_over(range(3), "slowly", 3, "steps")) == [0, 1, 2]
    assert "slowly:" in shown.getvalue()
    assert "/3 [" in shown.getvalue()
    assert "left" not in shown.getvalue()


def test_work_without_a_known_end_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.2)
    with heartbeat("compiling"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["compiling: 0 s so far"] * 2
    with pytest.raises(ValueError, match="inside"), heartbeat("failing"):
        raise ValueError("inside")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_of_several_processes_only_the_first_shows_it(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_is_silent", False)  # and again after the test
    progress.silence()
    before = threading.active_count()
    with Progress("drawing", 100) as shown, heartbeat("compiling"):
        assert threading.active_count() == before
        clock[0] += 20
        shown.advance(2)
    assert capsys.readouterr().err == ""
