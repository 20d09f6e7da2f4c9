"""Atomic writes: data is written under a hidden name next to its target and renamed when complete.

After an error or an interrupt, nothing is left. After a kill, a hidden ``.<name>.partial-*`` is left, which the next
attempt to write the same target removes.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` when the block ends, or is removed after an error.

    It has the extension of ``target``, for libraries that choose a format by it. Missing parent folders are created.
    """
    with staged_files([target]) as (stage,):
        yield stage


@contextlib.contextmanager
def staged_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write to, which become ``targets`` together when the block ends, or are removed after an error.

    Every file is complete before the first one is moved. All of them must have been written.
    """
    for folder in {target.parent for target in targets}:
        folder.mkdir(parents=True, exist_ok=True)
    stages = [_partial_path(target) for target in targets]
    try:
        yield stages
        for stage, target in zip(stages, targets, strict=True):
            stage.replace(target)
    finally:
        for stage in stages:
            stage.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: Path, *, last: str | None = None, keep_others: bool = True) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``target`` when the block ends, or is removed after an error.

    Args:
      target: the folder; missing parents are created, and removed again after an error.
      last: the name of the file that is moved last into an existing folder, for readers that look for it first.
      keep_others: whether an existing folder keeps its other files, or is replaced completely.
    """
    target = target.resolve()
    created = [parent for parent in target.parents if not parent.exists()]
    stage = _partial_path(target)
    try:
        stage.mkdir(parents=True)
        yield stage
        if not keep_others and target.exists():
            shutil.rmtree(target)
        _publish(stage, target, last)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_bytes(target: Path, data: bytes) -> None:
    """Writes a file, and waits until it is on disk."""
    with staged_file(target) as stage, stage.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(target: Path, text: str, errors: str = "strict") -> None:
    """Writes a text file as UTF-8; ``errors`` as for `str.encode`."""
    write_bytes(target, text.encode("utf-8", errors))


def write_json(target: Path, contents: Mapping[str, Any], *, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Writes a JSON object and a line break."""
    write_text(target, json.dumps(contents, indent=indent, sort_keys=sort_keys) + "\n")


def _partial_path(target: Path) -> Path:
    """A new hidden path next to ``target``; removes leftovers of killed attempts at the same target."""
    prefix = f".{target.name}.partial-"
    for left in target.parent.glob(f"{_escaped(prefix)}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return target.with_name(f"{prefix}{secrets.token_hex(4)}{target.suffix}")


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _publish(stage: Path, target: Path, last: str | None) -> None:
    if not target.exists():
        stage.rename(target)
        return
    for path in sorted(stage.iterdir(), key=lambda path: (path.name == last, path.name)):
        os.replace(path, target / path.name)  # noqa: PTH105
    stage.rmdir()
