"""What the documentation shows: its pages, their code, and the commands in it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from codi_jax.cli import commands as command_names

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CODE = re.compile(r"`([^`\n]+)`")
SCRIPT_FOLDERS = ("training_scripts", "dataset_tools")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Not parsed here; of benchmarks the flags are looked up.
_OTHERS = re.compile(r"python3 (benchmarks/|-m pip )|codi-jax (completion\b|#|$| )")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of a page in this language."""
    return [code for kind, code in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of a page, in fenced code and inline; not those that end in "…"."""
    for code in blocks(page, "bash"):
        yield from commands_of(code)
    yield from commands_of("\n".join(CODE.findall(prose(page))))


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of every command in lines of the shell."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith(("python3 ", "codi-jax ")) and not _OTHERS.match(line) and not line.endswith("…"):
            yield shlex.split(line, comments=True)


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and the command's arguments."""
    if words[0] == "codi-jax":
        command, rest = command_names.find(words[1:])
        words = ["python3", *command.as_arguments, *rest]
    if words[1] == "-m":
        return words[2], words[3:]
    path = Path(words[1]).resolve()
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(words[1])
    assert path.parts[0] in SCRIPT_FOLDERS, words
    return ".".join(path.with_suffix("").parts), words[2:]


def planned(words: list[str]) -> list[list[str]]:
    """A command, and the one that it plans, if any, which follows behind ``--``."""
    if "--" not in words:
        return [words]
    behind = words.index("--")
    return [words[:behind], ["python3", *words[behind + 1 :], "--plan", words[3]]]
