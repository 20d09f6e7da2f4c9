"""``codi-jax``: every script and tool as one command, from a checkout and from a wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_commands import OF, ROOT

from codi_jax.cli import commands

COMMANDS = list(commands.commands())


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codi_jax", *words], capture_output=True, text=True, check=False, **options
    )


def test_there_is_a_command_for_everything() -> None:
    scripts = {path for folder in ("training_scripts", "dataset_tools") for path in (ROOT / folder).glob("[a-z]*.py")}
    assert {command.path for command in COMMANDS} == scripts | {
        ROOT / "codi_jax" / f"{name}.py" for name in ("generate", "evaluate", "plan", "app")
    }
    assert len({command.words for command in COMMANDS}) == len(COMMANDS)


def test_the_overview_says_what_each_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ran = run()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == run("--help").stdout
    lines = ran.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for command in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {' '.join(command.words)}  "))
        assert re.search(r" {2}[A-Z].{20,}", line)
    assert "train codi" not in run("data").stdout
    assert "data avatars" in run("data", "--help").stdout


@pytest.mark.parametrize("words", [("train", "codi"), ("data", "laion"), ("generate",)])
def test_a_command_is_called_by_its_name(words: tuple[str, ...]) -> None:
    shown = run(*words, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: codi-jax {' '.join(words)} [--config FILE]")
    wrong = run(*words, "--weather", "fine")
    assert wrong.returncode == 2
    assert f"codi-jax {' '.join(words)} --help" in wrong.stderr


def test_flags_and_errors_are_the_scripts(tmp_path: Path) -> None:
    data = ("--train_data_dir", str(tmp_path / "data"), "--max_train_samples")
    assert run("data", "avatars", *data, "2", "--resolution", "32").returncode == 0
    assert len((tmp_path / "data" / "meta.jsonl").read_text().splitlines()) == 2
    refused = run("data", "avatars", *data, "0")
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --max_train_samples 0 is not possible: it must be at least 1.\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "codi-jax has no command 'trian': did you mean train?"),
        (("train", "kodi", "--help"), "codi-jax train has no command 'kodi': did you mean codi?"),
        (("data", "--x"), "codi-jax data has no command '--x': use one of avatars, emoji, coyo, laion, edits, "),
        (("completion",), "codi-jax completion needs the name of a shell: one of bash, zsh, tcsh."),
        (("completion", "fish"), "codi-jax completion needs the name of a shell"),
    ],
)
def test_what_there_is_not(words: tuple[str, ...], message: str) -> None:
    ran = run(*words)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"error: {message}")
    assert ran.stderr.count("\n") == 1


def test_a_plan_of_a_command() -> None:
    assert commands.find(["train", "codi", "--seed", "1"])[0].as_arguments == [
        str(ROOT / "training_scripts/train_codi_flax.py")
    ]
    assert commands.find(["generate", "--seed", "1"])[0].as_arguments == ["-m", "codi_jax.generate"]
    assert commands.find(["generate", "train"])[1] == ["train"]


COMPLETES = """
source "$1"; shift
function=$(complete -p codi-jax | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); $function; echo "${COMPREPLY[@]}"
"""


def test_tab_completes_commands_flags_and_values(tmp_path: Path) -> None:
    made = run("completion", "bash")
    assert (made.returncode, made.stderr) == (0, "")
    (tmp_path / "completion").write_text(made.stdout)

    def completed(*words: str) -> list[str]:
        arguments = ["bash", "-c", COMPLETES, "bash", str(tmp_path / "completion"), "codi-jax", *words]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()

    assert completed("tr") == ["train"]
    assert completed("train", "c") == ["codi", "controlnet"]
    assert completed("train", "codi", "--learning_r") == ["--learning_rate"]
    assert completed("train", "codi", "--task", "") == ["column", "edit", "canny", "super_resolution", "inpainting"]
    assert completed("generate", "--wei") == ["--weighted_prompts"]


@pytest.mark.slow
def test_a_wheel_is_whole(tmp_path: Path) -> None:
    """Outside of the checkout it runs what it contains, and contains what runs."""
    subprocess.run([sys.executable, "-m", "uv", "build", "-q", "--wheel", "--out-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "codi_jax").rglob("*") if path.suffix in (".py", ".html")
    }
    folders = ("training_scripts", "dataset_tools")
    sources |= {f"codi_jax/{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert sources <= names
    assert {name.split("/")[0] for name in names} == {"codi_jax", wheel.name.split("-py3")[0] + ".dist-info"}
    place = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}}
    for name in ("train", "data"):
        assert run(name, **place).stdout == run(name).stdout
    script = run("train", "codi", "--weather", **place)
    assert "codi-jax train codi --help" in script.stderr
    where = "import codi_jax.cli.commands as c; print(c.find(['data', 'emoji'])[0].path)"
    shown = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=True, **place).stdout
    assert shown.strip() == str(tmp_path / "installed/codi_jax/dataset_tools/emoji.py")


def test_all_commands_are_among_those_that_are_tried() -> None:
    """By the tests of malformed flags."""
    assert {command.path.stem for command in COMMANDS} - {"plan"} == set(OF)
