"""The documentation is true: links lead somewhere, commands parse, flags exist, the README's Python runs.

Everything here reads files only, without the network.
"""

import ast
import contextlib
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documented import CODE, DOCS, README, ROOT, SCRIPT_FOLDERS, blocks, commands, module_of, planned, prose

from codi_jax.cli import command_line
from codi_jax.cli.help_text import flags_of

PAGES = [
    README,
    ROOT / "BENCHMARKS.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "assets/README.md",
    *DOCS,
]
MANUAL = [page for page in PAGES if page.name not in ("CHANGELOG.md", "CONTRIBUTING.md")]

_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_FLAG = re.compile(r"--[a-z][a-z0-9_]*")
_FOLDERS = ("codi_jax", "training_scripts", "dataset_tools", "benchmarks", "assets", "tests", "docs")
# Flags of XLA and of launchers, and the ones that all command lines have.
_FOREIGN_FLAGS = {"--help", "--config", "--xla_force_host_platform_device_count"}
_FOREIGN_FLAGS |= {"--zone", "--worker", "--command"}  # gcloud
_FOREIGN_FLAGS |= {"--nodes", "--ntasks", "--gpus", "--cpus", "--host", "--map"}  # srun and mpirun, up to the first "-"


def identify(page: Path) -> str:
    return str(page.relative_to(ROOT))


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=identify)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page; of equal ones the first."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def resolves(name: str) -> bool:
    """Whether ``package.module`` or ``package.module.name`` can be imported."""
    with contextlib.suppress(ImportError):
        return bool(importlib.import_module(name))
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


@functools.cache
def known_flags() -> frozenset[str]:
    """All flags of all scripts; of benchmarks and the Makefile, from their source."""
    scripts = [f"{folder}.{path.stem}" for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("[a-z]*.py")]
    commands = (*scripts, "codi_jax.generate", "codi_jax.evaluate", "codi_jax.plan", "codi_jax.app")
    fields = [name for each in commands for flag in flags_of(importlib.import_module(each).Args) for name in flag.names]
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.append(f"--{node.target.id}")
            elif (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
            ):
                fields += [
                    arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                ]
    return frozenset(fields) | _FOREIGN_FLAGS


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


@each(DOCS)
def test_every_page_can_be_found(page: Path) -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    is_reference = page.parent.name == "api"  # which only the site can show
    assert page.name == "README.md" or is_reference or f"({page.relative_to(ROOT / 'docs')})" in index


@each(PAGES)
def test_no_line_reads_as_another_block(page: Path) -> None:
    """The site takes ``#4`` at the start of a line for a heading, and a list right behind a paragraph for its text."""
    text = prose(page)
    assert not re.findall(r"^#{1,6}[^#\s].*", text, re.MULTILINE)
    assert not re.findall(r"^(?![-*\d>|#\s]).+\n(?:[-*]|\d+\.) .*", text, re.MULTILINE)


@each(PAGES)
def test_links_resolve(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each(MANUAL)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "runs/lcm").mkdir(parents=True)
    (tmp_path / "runs/lcm/config.yaml").write_text("pretrained_model_name_or_path: m\ntrain_data_dir: data\n")
    for words in [part for each in commands(page) for part in planned(each)]:
        module, arguments = module_of(words)
        if "--help" in arguments:
            continue
        try:
            args = command_line.parse(importlib.import_module(module).Args, arguments)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)} is not understood")
        Path(str(getattr(args, "train_data_dir", None) or ".")).mkdir(parents=True, exist_ok=True)
        if getattr(args, "plan", None) is None:  # a plan needs no data
            args.check()


@each([*MANUAL, ROOT / "CONTRIBUTING.md"])
def test_paths_targets_and_modules_exist(page: Path) -> None:
    code = "\n".join([*blocks(page, "bash"), *CODE.findall(prose(page))])
    for path in re.findall(rf"(?<![\w/.])((?:{'|'.join(_FOLDERS)})/[\w/.-]*\w)(?![\w/.<])", code):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", code, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for name in re.findall(r"\bcodi_jax(?:\.\w+)+", code):
        assert resolves(name), name


@each(MANUAL)
def test_flags_exist(page: Path) -> None:
    code = "\n".join([*blocks(page, "bash"), *CODE.findall(prose(page))])
    assert set(_FLAG.findall(code)) <= known_flags()


@each(MANUAL)
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("codi_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for code in blocks(README, "python"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "monster.png").exists()
    assert (tmp_path / "my-model/model_index.json").exists()
