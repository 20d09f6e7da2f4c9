"""The rooms of the design: who may import what, and that everything public is documented.

Reads the source and imports none of it.
"""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "codi_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MATHS = ("schedule", "sampling", "losses", "methods")
# What maths may know of codi_jax. Whatever reads, writes or drives a run knows maths, never the reverse.
KNOWN_TO_MATHS = {*MATHS, "models", "lora", "optim", "sharding", "flags"}
# Top-level modules that are about files, the network, processes or a terminal.
IO_MODULES = {
    "cv2", "datasets", "diffusers", "glob", "grain", "gradio", "huggingface_hub", "io", "json", "logging", "msgpack",
    "orbax", "os", "pathlib", "pickle", "PIL", "requests", "safetensors", "shutil", "socket", "subprocess", "sys",
    "tempfile", "tensorboardX", "tqdm", "transformers", "tyro", "urllib", "wandb",
}  # fmt: skip


def module_name(path: Path) -> str:
    """`codi_jax/models/unet.py` -> `codi_jax.models.unet`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def rooms(names: set[str]) -> set[str]:
    """The rooms of codi_jax, its modules and folders, that the names reach into."""
    return {name.split(".")[1] for name in names if name.startswith("codi_jax.")}


def undocumented(source: str) -> list[str]:
    """The public functions and classes at the top level, and the module itself, that have no docstring."""
    tree = ast.parse(source)
    definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    missing = [n.name for n in definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
    return missing if ast.get_docstring(tree) else ["the module", *missing]


def violations(name: str, imports: set[str]) -> list[str]:
    """What is wrong with these imports in the module of this dotted name; empty where nothing is."""
    top = {i.split(".")[0] for i in imports}
    room = "".join(rooms({name}))
    found = []
    if "torch" in top:
        found.append("imports torch: it is an oracle for tests, never a run-time dependency")
    if "flax" in top and room not in ("models", "lora"):
        found.append("imports flax: only codi_jax/models and codi_jax/lora.py do")
    if outside := top & {"tests", "training_scripts", "dataset_tools", "benchmarks"}:
        found.append(f"imports {sorted(outside)}: imports point from scripts to the package")
    if room == "models" and (wrong := rooms(imports) - {"models"}):
        found.append(f"imports {sorted(wrong)}: models know nothing of the rest of codi_jax")
    if room in MATHS and (wrong := top & IO_MODULES - ({"json", "pathlib"} if room == "schedule" else set())):
        found.append(f"imports {sorted(wrong)}: maths does no input or output")
    if room in MATHS and (wrong := rooms(imports) - KNOWN_TO_MATHS):
        found.append(f"imports {sorted(wrong)}: these rooms use maths, it knows none of them")
    if room == "train" and "methods" in rooms(imports):
        found.append("imports codi_jax.methods: the loop is handed a method, it knows none")
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


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codi_jax.data", "def f():\n    import torch"),
        ("codi_jax.optim", "from flax import linen"),
        ("codi_jax.plan", "import training_scripts.train_codi_flax"),
        ("codi_jax.models.unet", "from codi_jax import schedule"),
        ("codi_jax.models.unet", "from codi_jax.schedule import NoiseSchedule"),
        ("codi_jax.losses", "import json"),
        ("codi_jax.methods.codi", "from pathlib import Path"),
        ("codi_jax.methods.codi", "from codi_jax import train"),
        ("codi_jax.sampling", "import codi_jax.pipeline"),
        ("codi_jax.train", "from codi_jax.methods import lcm"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str):
    assert len(violations(module, imported_modules(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codi_jax.models.unet", "import flax.linen as nn\nfrom codi_jax.models import layers"),
        ("codi_jax.lora", "import flax"),
        ("codi_jax.schedule", "import json\nfrom pathlib import Path"),
        ("codi_jax.methods.codi", "import optax\nfrom codi_jax import losses, sampling, schedule"),
        ("codi_jax.weights", "import json\nfrom codi_jax.models.unet import UNet2DCondition"),
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
