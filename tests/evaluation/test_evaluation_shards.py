"""An evaluation that is interrupted goes on, and makes the images that it would have made."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from folders import SIZE, saved_pipeline
from PIL import Image
from several import end_of, free_address, start

from codi_jax.evaluation.shards import Shards, files_of, shards_of

ROOT = Path(__file__).resolve().parents[2]


def test_shards_are_made_once_and_read_in_order(tmp_path: Path) -> None:
    shards, made = Shards(tmp_path, 5, 2), []
    for numbers in shards.numbers():
        for _ in range(2):
            shards.ensure(numbers, lambda numbers=numbers: made.append(numbers) or {"x": np.arange(5)[numbers]})
    assert made == [range(2), range(2, 4), range(4, 5)]
    assert shards.read()["x"].tolist() == [0, 1, 2, 3, 4]
    whole = (tmp_path / "00001.npz").read_bytes()
    (tmp_path / "00001.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"there is no .*00001\.npz: do all processes share --output_dir"):
        shards.read()
    shards.ensure(range(2, 4), lambda: {"x": np.array([7, 8])})
    assert shards.read()["x"].tolist() == [0, 1, 7, 8, 4]


def test_processes_share_the_shards() -> None:
    shards = Shards(Path(), 7, 2)
    shares = [shards.numbers(process, 3) for process in range(3)]
    assert shares == [[range(2), range(6, 7)], [range(2, 4)], [range(4, 6)]]


def test_another_model_has_other_shards(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a").write_text("1")
    first = shards_of(tmp_path, "name", {"files": files_of(str(model))}, 5, 2)
    assert shards_of(tmp_path, "name", {"files": files_of(str(model))}, 5, 2) == first
    os.utime(model / "a", ns=(1, 1))
    assert shards_of(tmp_path, "name", {"files": files_of(str(model))}, 5, 2) != first
    assert files_of("owner/name") != files_of("owner/other")


def _evaluation(folder: Path, model: Path) -> list[str]:
    """A command that evaluates a model on 12 captions in shards of 2; the output folder follows."""
    (folder / "captions.txt").write_text("\n".join(f"picture {i}" for i in range(12)))
    (folder / "real").mkdir()
    for i in range(3):
        Image.fromarray(np.full((SIZE, SIZE, 3), 90 * i, np.uint8)).save(folder / "real" / f"{i}.png")
    command = ["-m", "codi_jax.evaluate", "--models", f"a={model}", "--data", "captions.txt"]
    command += ["--reference", "real", "--metrics", "fid_lite", "kid_lite", "--steps", "2", "--seeds", "0", "1"]
    return [*command, "--batch_size", "2", "--shard_size", "2", "--save_images", "--num_shown", "3", "--output_dir"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_killed_evaluation_goes_on(devices: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Captions alone, killed after its second shard; then the table and the images are those of an undisturbed run."""
    command = [
        sys.executable,
        *_evaluation(tmp_path, saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": devices}
    process = subprocess.Popen([*command, "killed"], cwd=tmp_path, env=environment)
    while not [*tmp_path.glob("killed/shards/*/00001.npz")]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/shards/*/*.npz")}
    assert 2 <= len(kept) < 12
    for folder in ("killed", "whole"):
        subprocess.run([*command, folder], cwd=tmp_path, env=environment, check=True)
    assert all(path.stat().st_mtime_ns == date for path, date in kept.items())
    killed, whole = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    for result, other in zip(killed["results"], whole["results"], strict=True):
        assert {**result, "seconds": 0} == {**other, "seconds": 0}
    assert set(whole["results"][0]) >= {"fid_lite", "kid_lite"}
    tars = [sorted(tmp_path.glob(f"{name}/shards/*/*.tar")) for name in ("killed", "whole")]
    assert len(tars[0]) == len(tars[1]) == 12
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
    with tarfile.open(tars[1][5]) as tar:
        assert tar.getnames() == ["000010.png", "000010.txt", "000011.png", "000011.txt"]
        text = tar.extractfile("000011.txt")
        picture = tar.extractfile("000011.png")
        assert text is not None
        assert picture is not None
        assert text.read() == b"picture 11"
        assert Image.open(io.BytesIO(picture.read())).size == (SIZE, SIZE)


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An evaluation in this folder, all but the name of its output."""
    command = _evaluation(tmp_path, saved_pipeline("text-to-image", tmp_path_factory.mktemp("models")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return command


@pytest.mark.slow
def test_two_processes_evaluate_together(tmp_path: Path, command: list[str]) -> None:
    """Each makes half of the shards, one writes the report, and its numbers are those of a single process."""
    subprocess.run([sys.executable, *command, "one"], env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, check=True)
    address = free_address()
    started = [start([*command, "two"], index, address) for index in range(2)]
    texts = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert ["fid_lite" in out or "report.html" in out for out, _ in texts] == [True, False]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["results"] for name in ("one", "two"))
    assert [{**each, "seconds": 0} for each in two] == [{**each, "seconds": 0} for each in one]
    tars = [sorted(tmp_path.glob(f"{name}/shards/*/*.tar")) for name in ("one", "two")]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
    assert len(tars[1]) == 12


@pytest.mark.slow
def test_processes_with_other_files_are_told(tmp_path: Path, command: list[str]) -> None:
    address = free_address()
    started = [start([*command, "two", "--guidance_scale", str(index)], index, address) for index in (1, 0)]
    for status, said in end_of(started, timeout=300):
        assert status == 1
        assert "differ in their models, data or flags" in said
