"""The folder of a run: its arguments, and that it belongs to one run."""

import dataclasses
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from stand_in import Loader, run

from codi_jax.training import starting
from codi_jax.training.checkpoint import CheckpointError
from codi_jax.training.starting import LoopFlags


def test_an_occupied_folder_is_refused(tmp_path):
    run(tmp_path)
    arguments = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="holds checkpoint-10 of an earlier run"):
        run(tmp_path, seed=1)
    assert (tmp_path / "config.yaml").read_text() == arguments


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    run(tmp_path, checkpointing_steps=0)
    arguments = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="holds another run, with --train_batch_size 8 instead of 4: choose another"):
        run(tmp_path, checkpointing_steps=0, train_batch_size=4, resume_from_checkpoint="latest")
    assert (tmp_path / "config.yaml").read_text() == arguments
    run(tmp_path, checkpointing_steps=0, logging_steps=3)  # the same once more


def test_a_run_that_did_not_begin_leaves_its_folder_free(tmp_path):
    starting.start(LoopFlags(output_dir=str(tmp_path), train_batch_size=3))
    starting.start(LoopFlags(output_dir=str(tmp_path), train_batch_size=4))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train_batch_size"] == 4


def test_arguments_are_written_down_without_secrets(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Args(LoopFlags):
        betas: tuple[float, float] = (0.9, 0.999)

    args = starting.start(Args(output_dir=str(tmp_path / "{timestamp}"), hub_token="hf_secret", ccache=Path("~/x")))
    (folder,) = tmp_path.iterdir()
    assert args.output_dir == str(folder)
    assert args.betas == (0.9, 0.999)
    assert time.strptime(folder.name, "%Y-%m-%d_%H-%M-%S")
    text = (folder / "config.yaml").read_text()
    assert "hf_secret" not in text
    assert "hub_token" not in text
    written = yaml.safe_load(text)
    assert written["betas"] == [0.9, 0.999]
    assert written["output_dir"] == str(folder)
    assert written["ccache"] == "~/x"


HOLDS_THE_FOLDER = """
import sys, time
from pathlib import Path
from codi_jax.training import run_folder
run_folder.lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_run_has_ended(tmp_path):
    held = subprocess.Popen([sys.executable, "-c", HOLDS_THE_FOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "locked\n"
    loader = Loader(8)
    match = (
        rf"{tmp_path} is in use by another run \(process {held.pid} on {socket.gethostname()}, since 20.*--output_dir"
    )
    with pytest.raises(ValueError, match=match):
        run(tmp_path, loader=loader)
    assert loader.given == 0
    assert not (tmp_path / "config.yaml").exists()
    held.kill()  # however it ends, the folder is free
    held.wait()
    run(tmp_path, loader=loader)
    after = [sys.executable, "-c", HOLDS_THE_FOLDER.replace("60", "0"), tmp_path]
    assert subprocess.run(after, check=True, capture_output=True, text=True).stdout == "locked\n"


def test_damaged_arguments_are_named(tmp_path):
    run(tmp_path, checkpointing_steps=0)
    for damaged in ("", "seed: [", "[]"):
        (tmp_path / "config.yaml").write_text(damaged)
        with pytest.raises(ValueError, match=r"config.yaml .*arguments of an earlier run: choose another --output_dir"):
            run(tmp_path, checkpointing_steps=0)
