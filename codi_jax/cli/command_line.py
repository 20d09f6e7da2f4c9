"""Command lines: flags from a dataclass, and errors as one sentence."""

import dataclasses
import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import jax
import tyro

from codi_jax.cli import config_file, help_text
from codi_jax.cli.flags import Flags, Scope
from codi_jax.io import processes

Args = TypeVar("Args")

# Of transformers, which would say at every start that it cannot find PyTorch; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HIDDEN = "***"
_SHOWN = 10  # warnings from one place: each of a million captions may have a problem
_SAVE_MEMORY = ("train_batch_size", "gradient_checkpointing", "fsdp")


def run(
    args_class: type[Args], function: Callable[[Args], Any], prog: str | None = None, *, save_memory: str | None = None
) -> None:
    """Parses the command line and calls the function; an error that the user can fix ends the process with one line.

    Args:
      args_class: a dataclass; the docstrings of its fields are the help.
      function: called with the arguments.
      prog: the program's name in the help.
      save_memory: what to try if the device runs out of memory. Default: the training flags that save memory.
    """
    warnings.showwarning = _warning_printer()
    try:
        args = parse(args_class, sys.argv[1:], prog)
        _hide_secrets(args_class)
        function(args)
    except (Exception, KeyboardInterrupt) as error:
        explanation = _explained(error, save_memory or _other_values(args_class))
        if explanation is None:
            raise
        processes.end(explanation)


def _explained(error: BaseException, save_memory: str) -> str | None:
    """One sentence about an error that the user can fix; ``None`` for any other error, whose traceback is needed."""
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return f"error: {error}"
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"error: the device has run out of memory: try {save_memory}."
    return None


def _hide_secrets(args_class: type) -> None:
    """Removes secrets from `sys.argv`, which trackers such as Weights & Biases record and publish."""
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


def parse(args_class: type[Args], words: Sequence[str], prog: str | None = None) -> Args:
    """Parses a command line. A boolean flag may be written ``--flag``, ``--no_flag`` or ``--flag False``.

    ``--config FILE`` reads flags from a file, and ``--help`` prints the flags that matter, ``--help all`` all of them.

    Args:
      args_class: a dataclass, see `run`.
      words: the command line without the program.
      prog: the program's name in the help.

    Raises:
      SystemExit: after an error message, or after ``--help``.
      ValueError: if a file of ``--config`` or a topic of ``--help`` is not possible.
      OSError: if a file of ``--config`` cannot be read.
    """
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word in ("-h", "--help"):
            topic = "" if following.startswith("-") else following
            _show(help_text.show(args_class, _program(prog), topic))
            raise SystemExit(0)
    switches = {name for name, kind in get_type_hints(args_class).items() if kind is bool}
    plain = list(_without_truth_values(config_file.with_files(args_class, words), switches))
    return tyro.cli(args_class, args=plain, prog=_program(prog), use_underscores=True, config=(tyro.conf.DisallowNone,))


def _program(given: str | None) -> str:
    """The program's name: as `codi_jax.cli.commands` calls it, or else as given, or as typed."""
    return os.environ.get("CODI_JAX_PROGRAM") or given or f"python3 {sys.argv[0]}"


def _show(text: str) -> None:
    """Prints a text that may be longer than what its reader, such as ``head``, takes."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends


def _without_truth_values(words: Sequence[str], switches: set[str]) -> Iterable[str]:
    """``--flag True`` as ``--flag`` and ``--flag False`` as ``--no_flag``, the only forms of switches in tyro."""
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in switches:
            yield word
            continue
        if not equals and rest and rest[-1].lower() in config_file.TRUTH:
            value = rest.pop()
        truth = config_file.TRUTH.get(value.lower(), True if not equals else None)
        yield word if truth is None else f"--{name}" if truth else f"--no_{name}"


def _warning_printer() -> Callable[..., None]:
    seen: Counter[tuple[str, int]] = Counter()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        seen[filename, lineno] += 1
        if seen[filename, lineno] <= _SHOWN:
            print(f"warning: {message}", file=sys.stderr)
        elif seen[filename, lineno] == _SHOWN + 1:
            print("warning: further warnings of this kind are not shown.", file=sys.stderr)

    return show


def _other_values(args_class: type) -> str:
    names = {field.name for field in dataclasses.fields(args_class)}
    return "other values of " + ", ".join(f"--{flag}" for flag in _SAVE_MEMORY if flag in names)
