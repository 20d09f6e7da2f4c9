"""Errors as one sentence, on the command line."""

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import pytest

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags, Secret


@dataclass(frozen=True)
class Args:
    """Does something."""

    train_batch_size: int = 1
    """Examples in a step."""
    name: str | None = None
    """What to call it."""
    fast: bool = False
    """Be fast."""


@pytest.fixture(autouse=True)
def _the_user_shows_warnings_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Args]]:
    def call(*words: str, raises: Exception | None = None) -> list[Args]:
        seen = []

        def function(args: Args) -> None:
            seen.append(args)
            if raises is not None:
                raise raises

        monkeypatch.setattr("sys.argv", ["program", *words])
        command_line.run(Args, function)
        return seen

    return call


def test_flags_are_spelled_with_underscores_and_hyphens(run: Any) -> None:
    assert run("--train_batch_size", "3", "--fast") == [Args(3, None, True)]
    assert run("--train-batch-size=3") == [Args(3)]
    assert run() == [Args()]


@pytest.mark.parametrize(
    ("words", "fast"),
    [
        ("--fast", True), ("--fast True", True), ("--fast true", True), ("--fast=True", True), ("--fast 1", True),
        ("--no_fast", False), ("--fast False", False), ("--fast=False", False), ("--fast no", False),
        ("--fast False --train_batch_size 1", False), ("--train-batch-size 1 --fast --name True", True),
    ],
)  # fmt: skip
def test_a_switch_is_written_alone_or_with_its_value(run: Any, words: str, fast: bool) -> None:
    """The latter as users of argparse do."""
    (args,) = run(*words.split())
    assert args.fast is fast


def test_a_switch_takes_no_other_value(run: Any, capsys: pytest.CaptureFixture) -> None:
    for words in (["--fast", "perhaps"], ["--fast=perhaps"], ["--no_fast", "True"]):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
    assert "perhaps" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no."), FileNotFoundError("no."), FloatingPointError("no.")])
def test_errors_that_the_user_can_mend(run: Any, error: Exception) -> None:
    with pytest.raises(SystemExit) as ended:
        run(raises=error)
    assert ended.value.code == "error: no."


@pytest.mark.parametrize("error", [TypeError("no"), KeyError("no"), AssertionError("no")])
def test_mistakes_of_the_program_keep_their_traceback(run: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        run(raises=error)


def test_memory(run: Any) -> None:
    """Only flags that the program has are named."""
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    with pytest.raises(SystemExit) as ended:
        run(raises=error)
    assert ended.value.code == "error: the device has run out of memory: try other values of --train_batch_size."
    with pytest.raises(jax.errors.JaxRuntimeError):
        run(raises=jax.errors.JaxRuntimeError("INTERNAL: no"))


def test_unknown_flags_and_values(run: Any, capsys: pytest.CaptureFixture) -> None:
    for words in (["--batch", "3"], ["--train_batch_size", "three"]):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
        shown = re.sub(r"\W+", " ", capsys.readouterr().err)
        assert "train_batch_size" in shown


def test_a_text_that_may_be_left_out_is_not_the_word_none(run: Any) -> None:
    assert run("--name", "None") == [Args(name="None")]


def test_warnings_are_one_line(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("take care", UserWarning, "file.py", 1)
    assert capsys.readouterr().err == "warning: take care\n"


def test_of_many_warnings_of_a_kind_the_first_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(_: Args) -> None:
        for number in range(100):
            warnings.warn(f"caption {number} is too long.", stacklevel=1)
        warnings.warn("something else.", stacklevel=1)

    monkeypatch.setattr("sys.argv", ["program"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        command_line.run(Args, warn)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:10] == [f"warning: caption {number} is too long." for number in range(10)]
    assert lines[10:] == [
        "warning: further warnings of this kind are not shown.",
        "warning: something else.",
    ]


@dataclass(frozen=True)
class Uploads(Flags):
    """Has a secret."""

    hub_token: Secret[str | None] = None
    """Of the hub."""
    name: str = ""
    """Of the model."""


@pytest.mark.parametrize("words", [("--hub_token", "hf_x"), ("--hub_token=hf_x",), ("--hub-token", "hf_x")])
def test_secrets_are_taken_off_the_command_line_that_trackers_record(words, monkeypatch):
    seen = []

    def function(args: Uploads) -> None:
        seen.append((args.hub_token, args.name, list(sys.argv)))

    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "a=b", *words])
    command_line.run(Uploads, function)
    ((token, name, recorded),) = seen
    assert (token, name) == ("hf_x", "a=b")
    assert "hf_x" not in " ".join(recorded)
    assert recorded[:3] == ["train.py", "--name", "a=b"]
