"""Command lines: flags from a dataclass, and errors as one sentence."""

import dataclasses
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro

from codi_jax import processes
from codi_jax.flags import Flags, Scope

Args = TypeVar("Args")

_HIDDEN = "***"
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
    args = tyro.cli(args_class, prog=prog, use_underscores=True, config=(tyro.conf.DisallowNone,))
    _hide_secrets(args_class)
    try:
        function(args)
    except (Exception, KeyboardInterrupt) as error:
        explanation = _explained(error, save_memory or _other_values(args_class))
        if explanation is None and not processes.are_several():
            raise
        processes.end(explanation or traceback.format_exc())


def _explained(error: BaseException, save_memory: str) -> str | None:
    """One sentence about an error that the user can fix; ``None`` for any other, whose traceback is of use."""
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return f"error: {error}"
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"error: the device has not enough memory: try {save_memory}."
    return None


def _hide_secrets(args_class: type) -> None:
    """Takes secrets out of `sys.argv`, which trackers such as Weights & Biases record and publish."""
    scopes = args_class.scopes() if issubclass(args_class, Flags) else {}
    secrets = {f"--{name}" for name, scope in scopes.items() if scope is Scope.SECRET}
    hides_next = False
    for index, argument in enumerate(sys.argv):
        flag, equals, _ = argument.replace("-", "_").replace("__", "--", 1).partition("=")
        if hides_next:
            sys.argv[index] = _HIDDEN
        elif flag in secrets and equals:
            sys.argv[index] = f"{argument.partition('=')[0]}={_HIDDEN}"
        hides_next = flag in secrets and not equals


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
