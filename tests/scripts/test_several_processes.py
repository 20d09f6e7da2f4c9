"""The scripts in several processes on this machine: their number does not matter, nor that one of them is killed."""

import itertools
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import SIZE, make_pipeline
from oracle import make_torch
from picture_folders import write_edits, write_folder
from published import TINY_UNETS
from script_runs import PICTURES, Inputs, as_command, flags_of, picture_of, weights_of
from several import end_of, start_all

from codi_jax.training.checkpoint import list_checkpoints
from training_scripts import (
    train_bk_sdm_flax,
    train_codi_flax,
    train_controlnet_flax,
    train_disback_flax,
    train_instruct_pix2pix_flax,
    train_lcm_distil_instruct_pix2pix_sdxl,
    train_lcm_flax,
    train_tcd_flax,
    train_tcd_instruct_pix2pix_flax,
    train_text_to_image_flax,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Networks of a few channels are split as large ones are.
CHILD = """
import importlib, sys
from codi_jax.cli import command_line
from codi_jax.models import sharding

sharding.MIN_SHARDED_SIZE = 256
script = importlib.import_module(sys.argv.pop(1))
command_line.run(script.Args, script.main)
"""
PATH = {"num_nodes": 1, "degradation_interval": 1, "interval": 1, "logging_steps": 1}
# By method: the script, its model, what it trains, and flags of its own.
SCRIPTS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "codi": (train_codi_flax, "text-to-image", "controlnet", {"validation_sampling_steps": (1,)}),
    "controlnet": (train_controlnet_flax, "text-to-image", "controlnet", {}),
    "lcm": (train_lcm_flax, "text-to-image", "unet", {}),
    "lcm-lora": (train_lcm_flax, "text-to-image", "", {"use_lora": True, "lora_rank": 4}),
    "tcd": (train_tcd_flax, "text-to-image", "unet", {}),
    "tcd-editor": (train_tcd_instruct_pix2pix_flax, "instruct-pix2pix", "unet", {}),
    "editor": (train_lcm_distil_instruct_pix2pix_sdxl, "instruct-pix2pix", "unet", {}),
    "bk-sdm": (train_bk_sdm_flax, "four-blocks", "unet", {"distill_level": "bk_small", "use_ema": True}),
    "disback": (train_disback_flax, "text-to-image", "unet", PATH),
    "text-to-image": (train_text_to_image_flax, "text-to-image", "unet", {}),
    "instruct-pix2pix": (train_instruct_pix2pix_flax, "text-to-image", "unet", {}),
}
EDITS = ("editor", "tcd-editor", "instruct-pix2pix")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("given")
    for family in ("text-to-image", "instruct-pix2pix"):
        make_pipeline(family, folder).save_pretrained(folder / family)
    large = make_pipeline("text-to-image", folder)
    large.register_modules(unet=make_torch("unet", TINY_UNETS["four-blocks"], 3))
    large.save_pretrained(folder / "four-blocks")
    write_folder(folder / "data", PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    write_edits(folder / "edits", PICTURES, (SIZE, SIZE))
    return folder


def command_of(given: Path, name: str, output_dir: Path, **changes: Any) -> list[str]:
    """Three steps, with latents cached."""
    script, model, _, flags = SCRIPTS[name]
    data = given / ("edits" if name in EDITS else "data")
    cached = {} if name == "disback" else {"cache_latents": True, "cache_latents_dir": f"{output_dir}-latents"}
    inputs = Inputs(given / model, data)
    wanted = {"train_batch_size": 1, "max_train_steps": 3, "peer_timeout": 5, **cached, **flags, **changes}
    args = flags_of(script, inputs, output_dir, **wanted)
    return ["-c", CHILD, script.__name__, *as_command(args)]


def start(code: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """Some processes, which have that many devices together."""
    given = {"JAX_NUM_CPU_DEVICES": str(devices // count), "PYTHONPATH": str(ROOT)}
    return start_all(code, count, CODI_JAX_JOIN_TIMEOUT="60", **given)  # for one that is killed before it joins


def finish(command: list[str], count: int, devices: int) -> None:
    ends = end_of(start(command, count, devices), timeout=1200)
    assert all(status == 0 for status, _ in ends), ends


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(name: str, folder: Path) -> dict[str, np.ndarray]:
    return weights_of(folder / SCRIPTS[name][2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_are_as_one(given: Path, tmp_path: Path, name: str) -> None:
    """Of one device each, against one with two: data, cached latents, steps and what is written, bit for bit."""
    for count in (1, 2):
        finish(command_of(given, name, tmp_path / str(count)), count, 2)
    one, two = (tmp_path / str(count) for count in (1, 2))
    assert losses_of(two) == losses_of(one)
    ours, theirs = trained(name, two), trained(name, one)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    # The sampler is not the same program: what falls between two levels of gray may be rounded to either.
    assert np.abs(picture_of(two).astype(int) - picture_of(one)).max() <= 1


@pytest.mark.parametrize("name", ["codi", "disback", "text-to-image"])
def test_four_processes_that_share_the_parameters(given: Path, tmp_path: Path, name: str) -> None:
    """Sums of four are taken in another order between processes."""
    for count in (1, 4):
        finish(command_of(given, name, tmp_path / str(count), fsdp=4), count, 4)
    one, four = (tmp_path / str(count) for count in (1, 4))
    np.testing.assert_allclose(losses_of(four), losses_of(one), rtol=1e-5)
    ours, theirs = trained(name, four), trained(name, one)
    for key, value in ours.items():
        # A step changes each by 1e-3.
        assert np.abs(value - theirs[key]).mean() < 1e-6, key


def test_a_run_goes_on_with_fewer_and_more_processes(given: Path, tmp_path: Path) -> None:
    """Four, one, two, which have four devices together and split the parameters among them."""
    name = "text-to-image"
    flags = {"checkpointing_steps": 2, "fsdp": 4, "lr_scheduler": "constant"}
    finish(command_of(given, name, tmp_path / "whole", max_train_steps=6, **flags), 4, 4)
    for count, steps in ((4, 2), (1, 4), (2, 6)):
        resumed = {"resume_from_checkpoint": "latest", "max_train_steps": steps}
        finish(command_of(given, name, tmp_path / "moved", **flags, **resumed), count, 4)
    np.testing.assert_allclose(losses_of(tmp_path / "moved"), losses_of(tmp_path / "whole"), rtol=1e-5)
    ours, theirs = trained(name, tmp_path / "moved"), trained(name, tmp_path / "whole")
    for key, value in ours.items():
        assert np.abs(value - theirs[key]).mean() < 1e-5, key


def test_processes_are_killed_at_random(given: Path, tmp_path: Path) -> None:
    """Ten times, one of the two, at any moment: the other one ends by itself, and in the end nothing is different."""
    name, rng, steps = "text-to-image", np.random.default_rng(0), 60
    flags = {"max_train_steps": steps, "checkpointing_steps": 5, "lr_scheduler": "constant"}
    finish(command_of(given, name, tmp_path / "whole", **flags), 2, 2)
    output_dir = tmp_path / "killed"
    command = command_of(given, name, output_dir, resume_from_checkpoint="latest", **flags)
    for number in range(10):
        reached = max(list_checkpoints(output_dir), default=0)
        # Every third one before its first step, the others some steps later; all of them together end the run.
        wanted = None if number % 3 == 0 else reached + int(rng.integers(1, 9))
        started = start(command, 2, 2)
        wait_for(output_dir, wanted, rng.uniform(2, 15))
        victim = int(rng.integers(2))
        started[victim].send_signal(signal.SIGKILL)
        ends = end_of(started, timeout=150)
        assert ends[victim][0] == -signal.SIGKILL
        assert ends[1 - victim][0] != 0, ends[1 - victim][1]
    finish(command, 2, 2)
    assert losses_of(output_dir) == losses_of(tmp_path / "whole")
    ours, theirs = trained(name, output_dir), trained(name, tmp_path / "whole")
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def wait_for(output_dir: Path, step: int | None, seconds: float) -> None:
    """Until a run has reported a step, or for some seconds."""
    if step is None:
        time.sleep(seconds)
        return
    for _ in itertools.takewhile(lambda waited: waited < 3000, itertools.count()):
        file = output_dir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")
