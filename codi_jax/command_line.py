"""Command lines: flags from a dataclass, and errors as one sentence."""

import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro

Args = TypeVar("Args")


_SHOWN = 10  # warnings from one place: a million captions may each have something wrong
_SAVE_MEMORY = ("train_batch_size", "gradient_checkpointing", "fsdp")


def run(
    args_class: type[Args], function: Callable[[Args], Any], prog: str | None = None, *, save_memory: str | None = None
) -> None:
    """Parses the command line and calls the function; an error that the user can mend ends the process with a line.

    Args:
      args_class: a dataclass; the docstrings of its fields are the help.
      function: of the arguments.
      prog: the program's name in the help.
      save_memory: what to try when the device has not enough memory; ``None`` names the flags of training.
    """
    warnings.showwarning = _warning_printer()
    try:
        args = tyro.cli(args_class, prog=prog, use_underscores=True, config=(tyro.conf.DisallowNone,))
        function(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: the device has not enough memory: try {save_memory or _other_values(args_class)}.")


def _warning_printer() -> Callable[..., None]:
    seen: Counter[tuple[str, int]] = Counter()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        seen[filename, lineno] += 1
        if seen[filename, lineno] <= _SHOWN:
            print(f"warning: {message}", file=sys.stderr)
        elif seen[filename, lineno] == _SHOWN + 1:
            print("warning: there are more warnings of this kind; they are not shown.", file=sys.stderr)

    return show


def _other_values(args_class: type) -> str:
    names = {field.name for field in dataclasses.fields(args_class)}
    return "other values of " + ", ".join(f"--{flag}" for flag in _SAVE_MEMORY if flag in names)
