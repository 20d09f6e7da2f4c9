"""Progress on a terminal and in a log."""

import io
import sys

import pytest

from codi_jax.cli import progress
from codi_jax.cli.progress import Progress, progress_over


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
