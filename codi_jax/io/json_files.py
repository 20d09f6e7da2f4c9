"""Reads JSON objects from files, with one-sentence errors that say what to do."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from codi_jax.cli.messages import first_line


class JsonError(ValueError):
    """A file or a text is not a JSON object."""


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, in UTF-8 with or without a byte order mark.

    Args:
      path: the file.
      remedy: what to do about a damaged file, which ends the sentence: "download it again".

    Raises:
      JsonError: naming the file, if it is not a JSON object.
      OSError: if it cannot be read; `FileNotFoundError` if it does not exist.
    """
    return parse_object(path.read_bytes(), str(path), remedy)


def parse_object(text: bytes | str, where: str, remedy: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
      text: the contents of a file, or a line of it.
      where: the name of the file, for messages.
      remedy: see `read_object`.
      allow_nan: whether a value may be NaN.

    Raises:
      JsonError: if the text is not UTF-8, not valid JSON, nested too deeply, contains NaN, or is not an object.
    """
    constant = float if allow_nan else _constant
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        contents = json.loads(decoded, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise JsonError(f"{where} is not valid JSON (not UTF-8: {first_line(error)}): {remedy}.") from None
    except RecursionError:
        raise JsonError(f"{where} is not valid JSON (nested too deeply): {remedy}.") from None
    except ValueError as error:
        raise JsonError(f"{where} is not valid JSON ({first_line(error)}): {remedy}.") from None
    if not isinstance(contents, dict):
        raise JsonError(f"{where} holds a JSON {type(contents).__name__} instead of an object: {remedy}.")
    return contents


def parse_lines(lines: Iterable[bytes], where: str, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of lines, and the number of each line; blank ones are skipped. See `parse_object`.

    A table may have NaN in unused columns.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_object(line, f"{where}, line {number}", remedy, allow_nan=True)


def _constant(name: str) -> float:
    """Infinity means "no limit" in saved flags; NaN has no meaning, and never compares equal."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)
