"""A plan's step is the step of the run: the same trees, shapes and dtypes, from the same command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from folders import SIZE, make_pipeline, refuse_weights
from picture_folders import write_folder
from script_runs import PICTURES, Inputs, flags_of, prepare

from codi_jax.models import sharding
from codi_jax.training import loop, planned
from codi_jax.training import run as runner
from training_scripts import (
    train_autoencoder_flax as autoencoder,
)
from training_scripts import (
    train_bk_sdm_flax as bk_sdm,
)
from training_scripts import (
    train_codi_flax as codi,
)
from training_scripts import (
    train_controlnet_flax as controlnet,
)
from training_scripts import (
    train_disback_flax as disback,
)
from training_scripts import (
    train_instruct_pix2pix_flax as instruct_pix2pix,
)
from training_scripts import (
    train_lcm_distil_instruct_pix2pix_sdxl as lcm_edit,
)
from training_scripts import (
    train_lcm_flax as lcm,
)
from training_scripts import (
    train_tcd_flax as tcd,
)
from training_scripts import (
    train_tcd_instruct_pix2pix_flax as tcd_edit,
)
from training_scripts import (
    train_text_to_image_flax as text_to_image,
)

ROOT = Path(__file__).resolve().parents[2]
LEVELS = """
mine:
  resolutions: [{down: [0], up: [0, 1]}, {down: [0], up: [0, 1]}]
  mid: drop
"""
FEW = {"validation_sampling_steps": (2,)}
TWO_GUIDANCES = {"w_image_min": 0.0, "w_image_max": 1.0}
EDIT = {"conditioning_image_column": "conditioning_image", "caption_column": "text", "image_column": "image"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    folder = tmp_path_factory.mktemp("inputs")
    data = write_folder(folder / "data", PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    families = ("text-to-image", "instruct-pix2pix", "sdxl", "sdxl-instruct-pix2pix")
    for family in families:
        make_pipeline(family, folder / f"{family}-parts").save_pretrained(folder / family)
    return {family: Inputs(folder / family, data) for family in families}


def plan_of(script: Any, inputs: Inputs, folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Any:
    """What a script hands to the planner, as the step without weights."""
    handed: list[Any] = []

    def take(method: Any, args: Any, open_model: Any, *, has_text: bool) -> None:
        handed.append((method, planned.with_blank_data(args, folder), open_model, has_text))

    with monkeypatch.context() as patched:
        patched.setattr(planned, "plan", take)
        patched.setattr(runner, "report", lambda made, file: sys.exit(0))
        with pytest.raises(SystemExit):
            script.main(flags_of(script, inputs, folder / "run", plan="cpu", **flags))
        refuse_weights(patched)
        return planned.abstract_step(*handed[0], sharding.make_mesh(flags.get("fsdp", 1)))


def shapes(tree: Any) -> Any:
    """What a program sees of each array."""
    tree = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "sharding") else jnp.asarray(leaf), tree)
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.mark.parametrize(
    ("script", "family", "flags"),
    [
        (codi, "text-to-image", {"task": "canny"}),
        (codi, "text-to-image", {"cache_latents": True, "mixed_precision": "bf16", "train": "unet"}),
        (codi, "sdxl", {"cache_latents": True, "use_8bit_adam": True}),
        (controlnet, "text-to-image", {"gradient_accumulation_steps": 2}),
        (text_to_image, "text-to-image", {"train_text_encoder": True, "use_ema": True, "mixed_precision": "fp16"}),
        (text_to_image, "text-to-image", {"from_scratch": ("unet",), "cache_latents": True}),
        (instruct_pix2pix, "instruct-pix2pix", EDIT),
        (instruct_pix2pix, "text-to-image", {**EDIT, "cache_latents": True}),
        (lcm, "text-to-image", {"use_lora": True, "lora_rank": 4, **FEW}),
        (lcm, "sdxl", {"mixed_precision": "bf16", **FEW}),
        (lcm_edit, "sdxl-instruct-pix2pix", {**EDIT, "cache_latents": True, **TWO_GUIDANCES, **FEW}),
        (tcd, "text-to-image", FEW),
        (tcd_edit, "instruct-pix2pix", {**EDIT, "cache_latents": True, **FEW}),
        (bk_sdm, "text-to-image", {"distill_level": "mine", "distill_table": "levels.yaml", "mixed_precision": "bf16"}),
        (disback, "text-to-image", {"stage": "degradation", "num_nodes": 2, "degradation_interval": 1}),
        (disback, "text-to-image", {"stage": "backtracking", "path": "none", "gen_cls_loss": True,
                                    "cls_on_clean_image": True}),
        (disback, "sdxl", {"stage": "backtracking", "path": "none", "generator_lora": True, "lora_rank": 4}),
        (autoencoder, "text-to-image", {"use_ema": True}),
    ],
)  # fmt: skip
def test_the_step_is_that_of_the_run(
    script: Any, family: str, flags: dict[str, Any], models: dict[str, Inputs], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    inputs = models[family]
    (tmp_path / "plan").mkdir()
    if "distill_table" in flags:
        (tmp_path / "levels.yaml").write_text(LEVELS)
        flags = {**flags, "distill_table": tmp_path / "levels.yaml"}
    ours = plan_of(script, inputs, tmp_path / "plan", monkeypatch, **flags)
    real = prepare(script, inputs, tmp_path / "run", monkeypatch, cache_dir=str(tmp_path / "cache"), **flags)
    batch = next(real.loader)
    real.loader.close()
    frozen = real.frozen.at(0) if hasattr(real.frozen, "at") else real.frozen
    for planned_tree, real_tree in ((ours.state, real.state), (ours.frozen, frozen), (ours.batch, batch)):
        assert shapes(planned_tree) == shapes(real_tree)


def test_memory_is_that_of_the_runs_program(models: dict[str, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The loop's own program, compiled for a run, takes what the plan says, to the byte."""
    programs: list[Any] = []
    compile_for = loop.compile_for

    def keep(platform: str, lowered: Any) -> Any:
        programs.append(compile_for(platform, lowered))
        return programs[-1]

    inputs = models["text-to-image"]
    flags = {"use_ema": True, "cache_latents": True, "plan_output": tmp_path / "plan.json"}
    monkeypatch.setattr(runner, "report", lambda made, file: made_plans.append(made) or sys.exit(0))
    made_plans: list[Any] = []
    with pytest.raises(SystemExit):
        text_to_image.main(flags_of(text_to_image, inputs, tmp_path / "plan", plan="cpu", **flags))
    monkeypatch.setattr(loop, "compile_for", keep)
    text_to_image.main(
        flags_of(text_to_image, inputs, tmp_path / "run", cache_dir=str(tmp_path / "cache"), max_train_steps=1, **flags)
    )
    memory = programs[0].memory_analysis()
    (plan,) = made_plans
    assert plan.program.temporary == (
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    # The encoders, whose outputs are cached, are not on the device: it holds what the program reads, and no more.
    assert not {"frozen vae", "frozen text_encoder"} & plan.kinds.keys()
    assert plan.program.given == pytest.approx(memory.argument_size_in_bytes, rel=0.01)
    assert plan.program.census.convolutions > 0
    assert plan.fits


def command(inputs: Inputs, *flags: str) -> list[str]:
    script = str(ROOT / "training_scripts" / "train_text_to_image_flax.py")
    return [sys.executable, script, "--pretrained_model_name_or_path", str(inputs.model), "--resolution", str(SIZE),
            "--max_train_steps", "100", *flags]  # fmt: skip


def test_the_command_line_without_data_or_weights(models: dict[str, Inputs], tmp_path: Path):
    """Eight devices that are not there; configurations and vocabulary alone; nothing but the plan is written."""
    bare = tmp_path / "bare"
    for file in models["text-to-image"].model.rglob("*"):
        if file.is_file() and file.suffix not in (".safetensors", ".bin"):
            (bare / file.relative_to(models["text-to-image"].model)).parent.mkdir(parents=True, exist_ok=True)
            (bare / file.relative_to(models["text-to-image"].model)).write_bytes(file.read_bytes())
    inputs = Inputs(bare, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        command(inputs, "--plan", "cpu:8", "--fsdp", "4", "--train_batch_size", "1"),
        cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 8 × this CPU, 1 samples per device" in done.stdout
    assert "fits" in done.stdout
    assert "all-reduce" in done.stdout
    assert [str(path.relative_to(work)) for path in work.rglob("*")] == ["outputs", "outputs/plan.json"]
    values = json.loads((work / "outputs" / "plan.json").read_text())
    assert values["devices"] == 8
    assert values["samples_per_step"] == 8
    assert values["program"]["census"]["collectives"]["all-reduce"]["bytes"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plan", "v9:2x2"), "there is no target v9:2x2: choose among cpu"),
        (
            ("--plan", "cpu:8", "--fsdp", "3"),
            "--fsdp 3 does not divide the 8 devices there are: choose from 1, 2, 4, 8",
        ),
        (("--plan", "cpu", "--train_batch_size", "0"), "--train_batch_size 0 is not possible"),
    ],
)
def test_bad_input_is_one_sentence(flags: tuple[str, ...], message: str, models: dict[str, Inputs], tmp_path: Path):
    done = subprocess.run(
        command(models["text-to-image"], *flags), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}"), done.stderr
