import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codi_jax.io.atomic import staged_file, staged_files, staged_folder, write_json, write_text

KILLED_WHILE_SAVING = """
import os, signal, sys
import jax
from codi_jax.io import weights
from codi_jax.models.vae import AutoencoderKL, VAEConfig

config = VAEConfig.from_dict({"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1})
module = AutoencoderKL(config)
params = module.random_params(jax.random.key(0))
if sys.argv[2] == "kill":
    weights.write_json = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
weights.save_model(sys.argv[1], "vae", module, params)
"""


def test_a_killed_export_leaves_nothing_after_the_next_one(tmp_path):
    def save(how: str) -> int:
        command = [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path, how]
        return subprocess.run(command, check=False, env=os.environ).returncode

    assert save("kill") == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".vae.partial-")
    assert save("whole") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_what_is_left_of_the_same_target_is_removed(tmp_path):
    for name in (".unet.partial-1", ".unet_target.partial-1", ".u[n]et.partial-1", "unet", ".unet"):
        (tmp_path / name).mkdir()
    (tmp_path / ".unet.partial-2").write_text("half")
    with staged_folder(tmp_path / "unet") as stage:
        assert stage.parent == tmp_path
        left = {".unet_target.partial-1", ".u[n]et.partial-1", "unet", ".unet"}
        assert names(tmp_path) == {*left, stage.name}
    assert names(tmp_path) == left
    write_text(tmp_path / "u[n]et", "whole")
    assert names(tmp_path) == {".unet_target.partial-1", "u[n]et", "unet", ".unet"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_files_appear_together_or_not_at_all(tmp_path, error):
    targets = [tmp_path / "new" / "a.png", tmp_path / "new" / "b.png"]
    (tmp_path / "new").mkdir()
    targets[0].write_text("old")

    def fail() -> None:
        with staged_files(targets) as stages:
            stages[0].write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (names(tmp_path / "new"), targets[0].read_text()) == ({"a.png"}, "old")
    with staged_files(targets) as stages:
        for stage in stages:
            assert stage.suffix == ".png"
            stage.write_text("whole")
            assert targets[0].read_text() == "old"
    assert [target.read_text() for target in targets] == ["whole", "whole"]
    assert names(tmp_path / "new") == {"a.png", "b.png"}


def test_a_file_takes_missing_folders_along(tmp_path):
    write_json(tmp_path / "a" / "b" / "config.json", {"z": 1, "a": 2}, sort_keys=True)
    assert (tmp_path / "a" / "b" / "config.json").read_bytes() == b'{\n  "a": 2,\n  "z": 1\n}\n'
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a" / "text", "\udcff")
    write_text(tmp_path / "text", "\udcff", errors="backslashreplace")
    assert (tmp_path / "text").read_bytes() == b"\\udcff"
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "never"):
        pass  # nothing was written
    assert names(tmp_path) == {"a", "text"}


def test_a_folder_keeps_its_other_files_or_is_replaced(tmp_path):
    def write(**options: Any) -> None:
        with staged_folder(tmp_path / "out", **options) as stage:
            (stage / "config.json").write_text("new")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "config.json").write_text("old")
    write(last="config.json")
    assert names(tmp_path / "out") == {"notes.txt", "config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    write(keep_others=False)
    assert names(tmp_path / "out") == {"config.json"}
    assert names(tmp_path) == {"out"}


def test_a_failed_folder_leaves_no_parents(tmp_path):
    def fail() -> None:
        with staged_folder(tmp_path / "a" / "b") as stage:
            (stage / "half").write_text("")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert names(tmp_path) == set()


def test_what_is_imported_to_write_a_file_is_little():
    program = "import sys, codi_jax.io.atomic, codi_jax.io.json_files; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"huggingface_hub", "jax", "numpy", "datasets"} & {module.partition(".")[0] for module in loaded}
