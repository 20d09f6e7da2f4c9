"""``python3 -m codi_jax.plan`` and ``generate --plan``, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import saved_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "codi_jax.plan", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_one_command_for_two_targets(model: Path, tmp_path: Path):
    of = ("codi_jax.generate", "--model", str(model), "--prompt", "a", "--steps", "2", "--num_images", "4")
    done = run(tmp_path, "cpu", "cpu:2", "--output", "plans.json", "--", *of)
    assert done.returncode == 0, done.stderr
    head, _, first, second, wrote = done.stdout.strip().splitlines()
    assert head.startswith("| target | devices ")
    assert [cell.strip() for cell in first.split("|")[1:4]] == ["cpu", "1 × this CPU", "4"]
    assert [cell.strip() for cell in second.split("|")[1:4]] == ["cpu:2", "2 × this CPU", "2"]
    assert wrote == "wrote plans.json"
    one, two = json.loads((tmp_path / "plans.json").read_text())["plans"]
    assert one["program"]["flops"] == two["program"]["flops"]
    assert two["bytes_per_device"]["temporaries"] < one["bytes_per_device"]["temporaries"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cpu",), "error: there is nothing to plan: python3 -m codi_jax.plan TARGET [TARGET ...] -- COMMAND."),
        (("--", "codi_jax.generate"), "error: there is nothing to plan"),
        (("v9:2x2", "--", "codi_jax.generate", "--model", "x", "--prompt", "a"), "error: there is no plan for v9:2x2"),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], message: str, tmp_path: Path):
    done = run(tmp_path, *words)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert not [*tmp_path.iterdir()]
