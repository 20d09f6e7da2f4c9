"""The rooms of the design: who may import what, and that everything public is documented.

Reads the source, and imports it only to see what an import brings along.
"""

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import codi_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "codi_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a module may import what is in its own layer and below. A name stands for all modules in it, but
# for those that are named themselves.
LAYERS = (
    "codi_jax.cli",  # groups of flags: declarations, and checks of single values
    "codi_jax.models",
    "codi_jax.diffusion",
    "codi_jax.io",
    "codi_jax.planning",
    "codi_jax.data",
    "codi_jax.pipeline",
    "codi_jax.training",
    "codi_jax.methods",
    "codi_jax.training.jobs",  # what some runs do in another way than most
    "codi_jax.evaluation",
    "codi_jax.data.preparation",
    "codi_jax.cli.command_line codi_jax.cli.commands",
    "codi_jax.app codi_jax.generate codi_jax.evaluate codi_jax.plan codi_jax.__main__",
    "codi_jax",  # the interface, imported when it is used
)
# Mathematics: functions of arrays, which reach nothing that reads, writes or drives a run, by any path of imports.
PURE = (
    "codi_jax.models", "codi_jax.diffusion", "codi_jax.methods", "codi_jax.training.optim",
    "codi_jax.pipeline.conditions", "codi_jax.pipeline.prediction", "codi_jax.pipeline.generation",
)  # fmt: skip
# Top-level modules that are about files, the network, processes or a terminal.
IO_MODULES = {
    "cv2", "datasets", "diffusers", "glob", "grain", "gradio", "huggingface_hub", "io", "json", "logging", "msgpack",
    "orbax", "os", "pathlib", "pickle", "PIL", "requests", "safetensors", "shutil", "socket", "subprocess", "sys",
    "tempfile", "tensorboardX", "tqdm", "transformers", "tyro", "urllib", "wandb",
}  # fmt: skip
# A schedule is a file of diffusers, and a group of flags checks that its folder can be written.
MAY_KNOW_FILES = ("codi_jax.diffusion.schedule", "codi_jax.diffusion.scheduler_config", "codi_jax.cli")
SLOW_TO_IMPORT = ("huggingface_hub", "transformers", "datasets", "orbax", "diffusers", "grain", "tensorboardX", "tyro")


def module_name(path: Path) -> str:
    """`codi_jax/models/unet.py` -> `codi_jax.models.unet`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(source: str) -> set[str]:
    """Every dotted name that is imported anywhere in the source, in functions too.

    `from a import b` gives both `a` and `a.b`, since `b` may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}: write the full name"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@functools.cache
def imports_of(name: str) -> frozenset[str]:
    return frozenset(imported_modules(MODULES[name].read_text()))


def reached(imports: set[str]) -> set[str]:
    """The modules of codi_jax that these imports load, by any path, with the packages that they are in."""
    found: set[str] = set()
    waiting = [name for name in imports if name in MODULES]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [n for n in imports_of(name) if n in MODULES]
    return found


def is_in(name: str, rooms: tuple[str, ...] | list[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def layer(name: str) -> int:
    """The layer of a module: that of the longest name in `LAYERS` that it is in."""
    fitting = [(len(room), i) for i, rooms in enumerate(LAYERS) for room in rooms.split() if is_in(name, [room])]
    return max(fitting)[1]


def undocumented(source: str) -> list[str]:
    """The public functions and classes at the top level, and the module itself, that have no docstring."""
    tree = ast.parse(source)
    definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    missing = [n.name for n in definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
    return missing if ast.get_docstring(tree) else ["the module", *missing]


def violations(name: str, imports: set[str]) -> list[str]:
    """What is wrong with these imports in the module of this dotted name; empty where nothing is."""
    top = {i.split(".")[0] for i in imports}
    found = []
    if "torch" in top:
        found.append("imports torch: it is an oracle for tests, never a run-time dependency")
    if "flax" in top and not is_in(name, ["codi_jax.models"]):
        found.append("imports flax: only codi_jax/models does")
    if outside := top & {"tests", "training_scripts", "dataset_tools", "benchmarks"}:
        found.append(f"imports {sorted(outside)}: imports point from scripts to the package")
    ours = {i for i in imports if i in MODULES}
    if upward := sorted(i for i in ours if layer(i) > layer(name)):
        found.append(f"imports {upward}: imports point downward")
    if is_in(name, PURE):
        files = set() if is_in(name, MAY_KNOW_FILES) else top & IO_MODULES
        for other in sorted(reached(ours) - {name}):
            if is_in(other, ["codi_jax.io", "codi_jax.data", "codi_jax.cli.command_line"]):
                files.add(other)
            elif not is_in(other, MAY_KNOW_FILES):
                files |= {i.split(".")[0] for i in imports_of(other)} & IO_MODULES
        if files:
            found.append(f"imports {sorted(files)}, itself or through others: mathematics does no input or output")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_stay_in_their_rooms(path: Path):
    found = violations(module_name(path), imported_modules(path.read_text()))
    assert not found, f"{path.relative_to(ROOT)} " + "; ".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_everything_public_is_documented(path: Path):
    missing = undocumented(path.read_text())
    assert not missing, f"{path.relative_to(ROOT)}: no docstring on {', '.join(missing)}"


def test_no_file_is_called_utils():
    named = [p.relative_to(ROOT) for p in SOURCES if p.stem in ("utils", "util", "helpers", "common", "misc")]
    assert not named, f"name {named} after what they hold"


def test_a_newcomer_sees_the_rooms_at_once():
    rooms = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
    commands = sorted(path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert len(rooms) <= 10, rooms
    assert len(commands) <= 5, commands
    assert all(f"{name}.py" in (ROOT / "docs" / "architecture.md").read_text() for name in commands)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_is_too_long_to_read(path: Path):
    assert len(path.read_text().splitlines()) <= 500, "ask what it is for, and make two of it"


@pytest.mark.parametrize("name", ["codi_jax.methods.codi", "codi_jax.diffusion.samplers", "codi_jax.models.unet"])
def test_mathematics_is_imported_alone(name: str):
    program = f"import sys, {name}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {module.split(".")[0] for module in loaded} & {*SLOW_TO_IMPORT}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codi_jax.data", "def f():\n    import torch"),
        ("codi_jax.training.optim", "from flax import linen"),
        ("codi_jax.evaluate", "import training_scripts.train_codi_flax"),
        ("codi_jax.models.unet", "from codi_jax.diffusion import losses"),
        ("codi_jax.models.unet", "from codi_jax.diffusion.schedule import NoiseSchedule"),
        ("codi_jax.diffusion.losses", "import json"),
        ("codi_jax.methods.codi", "from pathlib import Path"),
        ("codi_jax.methods.codi", "from codi_jax.training import loop"),
        ("codi_jax.pipeline.prediction", "from codi_jax.training import optim"),
        ("codi_jax.training.loop", "from codi_jax.methods import lcm"),
        ("codi_jax.data.load", "from codi_jax.data import preparation"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str):
    assert len(violations(module, imported_modules(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codi_jax.models.unet", "import flax.linen as nn\nfrom codi_jax.models import layers"),
        ("codi_jax.models.lora", "import flax"),
        ("codi_jax.diffusion.schedule", "import json\nfrom pathlib import Path"),
        ("codi_jax.methods.codi", "import optax\nfrom codi_jax.diffusion import losses, samplers, schedule"),
        ("codi_jax.io.weights", "import json\nfrom codi_jax.models.unet import UNet2DCondition"),
        ("codi_jax.data.preparation.edits", "from codi_jax.pipeline.model import DiffusionPipeline"),
    ],
)
def test_a_right_import_passes(module: str, source: str):
    assert violations(module, imported_modules(source)) == []


def test_the_shapes_of_signatures_are_checked():
    """The jaxtyping hook is on, in parallel workers too: without it a wrong shape in a signature goes unnoticed."""
    assert any("jaxtyping" in type(finder).__module__ for finder in sys.meta_path)


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"]


def test_the_makefile_installs_the_torch_of_the_test_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(r for r in project["optional-dependencies"]["test"] if r.startswith("torch"))
    assert f"TORCH  ?= {torch}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", codi_jax.__all__)
def test_the_interface_is_documented_by_example(name: str):
    assert "Examples:\n" in (getattr(codi_jax, name).__doc__ or "")


def test_the_interface_is_imported_when_it_is_used():
    program = "import sys, codi_jax; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {module.split(".")[0] for module in loaded} & {"jax", "flax", *SLOW_TO_IMPORT}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = codi_jax.nothing
    assert set(codi_jax.__all__) <= set(dir(codi_jax))


def test_a_machine_without_torch_is_told_of_nothing_that_is_missing():
    code = "import sys; sys.modules['torch'] = None; from codi_jax import Model; Model.from_pretrained"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout + done.stderr == ""


def test_imports_of_earlier_versions_work():
    program = (
        "from codi_jax.weights import load_model, save_model; from codi_jax.pipeline import DiffusionPipeline;"
        "import codi_jax; assert load_model is codi_jax.load_model and DiffusionPipeline is codi_jax.Model"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
