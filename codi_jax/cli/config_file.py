"""Flags in a YAML file, in place of a long command line; every run writes its own."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from codi_jax.cli.help_text import Flag, flags_of
from codi_jax.cli.messages import first_line

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""What the value of a switch may be."""
_NOTHING = ("null", "~")


def dump(flags: Mapping[str, Any]) -> str:
    """Flags, by name and as JSON values, as the text of a file for ``--config``; those that are None are left out."""
    set_ones = {name: value for name, value in flags.items() if value is not None}
    return yaml.safe_dump(set_ones, sort_keys=False, allow_unicode=True, width=10_000)


def load(path: Path) -> dict[str, Any]:
    """The flags in a file.

    Raises:
      ValueError: if it is no YAML, or no mapping.
      OSError: if it cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not a file of flags ({first_line(error)}).") from None


def parse(text: str) -> dict[str, Any]:
    """The flags in a text, with texts or lists of texts as values, to be read as those of a command line.

    YAML itself would read 1e-4 as a text, and a date as a date.

    Raises:
      ValueError: if it is no mapping.
      yaml.YAMLError: if it is no YAML.
    """
    contents = yaml.load(text, yaml.BaseLoader)
    if not isinstance(contents, dict):
        raise ValueError("it must have one flag a line, such as resolution: 512")
    return contents


def with_files(args_class: type, words: Sequence[str]) -> list[str]:
    """A command line that begins with the flags of its ``--config`` files, so that it has the last word itself.

    Of several files, later ones have the last word.

    Raises:
      ValueError: if a file has a flag that there is not, naming the nearest one, or a value that no flag can have.
      OSError: if a file cannot be read.
    """
    rest, paths = _apart(words)
    if not paths:
        return rest
    flags = flags_of(args_class)
    # Not the names that switch something off: with "true", they would say the opposite.
    names = {flag.field: flag.names if flag.values else flag.names[:-1] for flag in flags}
    by_name = {name.lstrip("-"): flag for flag in flags for name in (flag.field, *names[flag.field])}
    values: dict[str, list[str]] = {}
    for path in paths:
        for name, value in load(path).items():
            flag = by_name.get(str(name).replace("-", "_"))
            if flag is None:
                near = difflib.get_close_matches(str(name), by_name, 1)
                hint = f": did you mean {near[0]}?" if near else "."
                raise ValueError(f"{path}: there is no flag {name}{hint}")
            values[flag.field] = _words(flag, value, path)
    # Of a flag that is there twice, the parser takes the last one.
    return [*itertools.chain.from_iterable(values.values()), *rest]


def _apart(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The words without ``--config``, and its files."""
    rest, paths, following = [], [], iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
        elif equals or (value := next(following, "")):
            paths.append(Path(value).expanduser())
        else:
            raise ValueError("--config needs a file: give a YAML file with flags.")
    return rest, paths


def _words(flag: Flag, value: Any, path: Path) -> list[str]:
    """A flag of a file as words of a command line."""
    takes_several = " " in flag.values
    several: list[Any] = value if isinstance(value, list) and takes_several else [value]
    is_possible = all(isinstance(each, str) for each in several)
    if is_possible and not flag.values:
        is_possible = value.lower() in (*TRUTH, *_NOTHING, "")
    if not is_possible:
        what = "texts or numbers, [a, b]" if takes_several else "one text or number" if flag.values else "true or false"
        raise ValueError(f"{path}: {flag.field} must be {what}.")
    if value in _NOTHING or (value == "" and flag.values != "TEXT"):
        return []
    if "NUMBER" in flag.values:
        several = [each.removeprefix(".") if each in (".inf", ".nan") else each for each in several]  # as YAML has them
    return [f"--{flag.field}", *several] if takes_several else [f"--{flag.field}={several[0]}"]
