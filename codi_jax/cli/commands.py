"""``codi-jax``: all scripts and tools as one command, wherever the package is installed.

codi-jax train codi --help
codi-jax data avatars --train_data_dir data/avatars
codi-jax generate --model runs/student --prompt "a house"
codi-jax completion bash > ~/.local/share/bash-completion/completions/codi-jax
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from codi_jax.cli.help_text import completion_parser

_PROGRAM = "codi-jax"
_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = {"train": "training_scripts", "data": "dataset_tools"}
_SCRIPTS = {
    "train": {
        "codi": "train_codi_flax",
        "lcm": "train_lcm_flax",
        "lcm-instruct-pix2pix": "train_lcm_distil_instruct_pix2pix_sdxl",
        "tcd": "train_tcd_flax",
        "tcd-instruct-pix2pix": "train_tcd_instruct_pix2pix_flax",
        "bk-sdm": "train_bk_sdm_flax",
        "disback": "train_disback_flax",
        "fast-instruct-pix2pix": "adapt_instruct_pix2pix",
        "controlnet": "train_controlnet_flax",
        "instruct-pix2pix": "train_instruct_pix2pix_flax",
        "text-to-image": "train_text_to_image_flax",
        "autoencoder": "train_autoencoder_flax",
    },
    "data": {
        "avatars": "avatars",
        "emoji": "emoji",
        "coyo": "coyo_1m_dataset_preprocess",
        "laion": "laion_subset",
        "edits": "make_edit_dataset",
        "tokenizer": "train_tokenizer",
        "cache-latents": "cache_latents",
    },
}
_MODULES = ("generate", "evaluate", "plan", "app")
_COMPLETION = "completion"
_SHELLS = ("bash", "zsh", "tcsh")


class Command(NamedTuple):
    """One of the commands.

    Attributes:
      words: its name: ("train", "codi") or ("generate",).
      program: what Python runs: the path of a script, or the name of a module.
    """

    words: tuple[str, ...]
    program: str

    @property
    def as_arguments(self) -> list[str]:
        """What follows ``python3`` to run it."""
        return [self.program] if self.program.endswith(".py") else ["-m", self.program]

    @property
    def path(self) -> Path:
        """Its source."""
        return Path(self.program) if self.program.endswith(".py") else _PACKAGE / f"{self.words[0]}.py"


def commands() -> Iterator[Command]:
    """All commands."""
    for group, scripts in _SCRIPTS.items():
        for name, script in scripts.items():
            yield Command((group, name), str(_folder(_FOLDERS[group]) / f"{script}.py"))
    for name in _MODULES:
        yield Command((name,), f"codi_jax.{name}")


def find(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that a command line begins with, and the rest of it.

    Raises:
      ValueError: if there is no such command, naming the nearest one.
    """
    by_name = {command.words: command for command in commands()}
    for length in (2, 1):
        if (command := by_name.get(tuple(words[:length]))) is not None:
            return command, list(words[length:])
    group = words[0] if words[:1] and words[0] in _SCRIPTS else None
    possible = list(_SCRIPTS[group]) if group else [*_SCRIPTS, *_MODULES, _COMPLETION]
    given = next(iter(words[1:] if group else words), "")
    near = difflib.get_close_matches(given, possible, 1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(possible)}."
    raise ValueError(f"{' '.join([_PROGRAM, *([group] if group else [])])} has no command {given!r}: {hint}")


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_overview(commands()), end="")
    elif words[0] in _SCRIPTS and words[1:2] in ([], ["-h"], ["--help"]):
        print(_overview(command for command in commands() if command.words[0] == words[0]), end="")
    elif words[0] == _COMPLETION:
        print(_completion(words[1:]))
    else:
        _run(words)


def _run(words: Sequence[str]) -> None:
    try:
        command, rest = find(words)
    except ValueError as error:
        _end(str(error))
    os.environ["CODI_JAX_PROGRAM"] = " ".join([_PROGRAM, *command.words])
    if command.program.endswith(".py"):
        sys.argv = [command.program, *rest]
        runpy.run_path(command.program, run_name="__main__")
    else:
        sys.argv = [str(command.path), *rest]
        runpy.run_module(command.program, run_name="__main__", alter_sys=True)


def _folder(name: str) -> Path:
    """The folder of scripts: in the package that was installed, or beside it where it is developed."""
    return _PACKAGE / name if (_PACKAGE / name).is_dir() else _PACKAGE.parent / name


def _overview(shown: Iterator[Command]) -> str:
    """The commands, and the first sentence of what each says about itself."""
    width = shutil.get_terminal_size().columns
    lines = [f"usage: {_PROGRAM} COMMAND [--FLAG VALUE ...]", ""]
    for command in shown:
        text = ast.get_docstring(ast.parse(command.path.read_text(encoding="utf-8"))) or ""
        sentence = " ".join(text.partition("\n\n")[0].split())
        name = " ".join(command.words)
        sentence = sentence.rpartition("``: ")[2]
        line = f"  {name.ljust(28)} {sentence[:1].upper()}{sentence[1:]}"
        lines.append(line if len(line) <= width else f"{line[: width - 4].rpartition(' ')[0]} ...")
    return "\n".join([*lines, "", f"{_PROGRAM} COMMAND --help explains the flags of a command.", ""])


def _completion(words: Sequence[str]) -> str:
    """A script for a shell that completes commands and flags."""
    if len(words) != 1 or words[0] not in _SHELLS:
        _end(f"{_PROGRAM} {_COMPLETION} needs the name of a shell: one of {', '.join(_SHELLS)}.")
    import shtab

    parser = argparse.ArgumentParser(_PROGRAM, add_help=False)
    within: dict[tuple[str, ...], Any] = {(): parser.add_subparsers()}
    for command in commands():
        group, name = command.words[:-1], command.words[-1]
        if group not in within:
            within[group] = within[()].add_parser(group[0], help=group[0], add_help=False).add_subparsers()
        completion_parser(_args_class(command), within[group].add_parser(name, help=name, add_help=False))
    within[()].add_parser(_COMPLETION, help=_COMPLETION, add_help=False).add_argument("shell", choices=_SHELLS)
    return shtab.complete(parser, words[0])


def _args_class(command: Command) -> type:
    if not command.program.endswith(".py"):
        return importlib.import_module(command.program).Args
    spec = importlib.util.spec_from_file_location(command.path.stem, command.path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Args


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
