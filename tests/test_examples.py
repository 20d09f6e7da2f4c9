"""The notebooks in examples/: each runs from the first cell to the last, with fewer steps; and shows what it made."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# The numbers that only take time.
SHORTER = {"max_train_steps": 2, "train_batch_size": 2, "lr_warmup_steps": 1, "logging_steps": 1, "UPDATES ": " 200"}
# Jupyter shows pictures; here there is none.
DISPLAY = "from PIL import Image\ndef display(picture):\n    assert isinstance(picture, Image.Image)\n"


def code(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook: Path, tmp_path: Path) -> None:
    program = "\n\n".join(code(notebook))
    for name, value in SHORTER.items():
        program = re.sub(rf"\b{name}=( ?)\d+", f"{name}={value}", program)
    program = re.sub(r"steps=(8|50)\b", "steps=2", program)
    (tmp_path / "examples").mkdir()
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython/__init__.py").touch()
    (tmp_path / "IPython/display.py").write_text(DISPLAY)
    for name in ("assets", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "examples", env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    if "run(" in program:
        (made,) = (tmp_path / "outputs").iterdir()
        assert (made / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_pictures_and_no_machine(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)
    assert len(text) < 1e6


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        for link in re.findall(r"\]\((\.\.[^)#]*)", "".join(cell["source"])):
            assert (notebook.parent / link).exists(), link
