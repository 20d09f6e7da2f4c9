"""The script of CoDi, run as a user runs it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import tyro
from folders import SIZE
from PIL import Image
from script_runs import (
    SHARED,
    Inputs,
    assert_frozen,
    assert_reports,
    assert_same_weights,
    assert_trained,
    cached_in,
    card_of,
    condition,
    generate,
    picture_of,
    picture_stub,
    prepare,
    run,
    weights_of,
)

from codi_jax import generate as generate_command
from codi_jax.diffusion.timesteps import default_sampler
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.programs import Programs
from codi_jax.training import run as runner
from codi_jax.training.checkpoint import CheckpointError
from training_scripts import train_codi_flax as codi
from training_scripts import train_controlnet_flax as controlnet
from training_scripts.train_codi_flax import Args as CodiArgs


@pytest.fixture(scope="module")
def codi_run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codi") / "whole"
    return run(codi, inputs, folder, max_train_steps=4, checkpointing_steps=2, hub_token="hf_secret")


def test_codi_writes_a_student_that_diffusers_loads(inputs: Inputs, codi_run: Path):
    assert_reports(codi_run, 4)
    assert "hf_secret" not in (codi_run / "config.yaml").read_text()
    loaded = diffusers.DiffusionPipeline.from_pretrained(codi_run)
    assert type(loaded) is diffusers.StableDiffusionControlNetPipeline
    loaded.set_progress_bar_config(disable=True)
    made = loaded("a cat", image=Image.fromarray(condition()), num_inference_steps=1, output_type="np").images
    assert made.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(made).all()
    assert_frozen(codi_run, inputs.model, "unet", "vae", "text_encoder")
    outputs = [key for key in weights_of(codi_run / "controlnet") if key.startswith("controlnet_mid_block.")]
    assert all(weights_of(codi_run / "controlnet")[key].any() for key in outputs)


def test_the_card_says_what_it_is_and_how_to_use_it(codi_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    card, code, command = card_of(codi_run)
    assert card.data.to_dict()["library_name"] == "diffusers"
    assert {"codi_jax", "controlnet"} <= {*card.data.tags}
    assert "- `--max_train_steps 4`" in card.text
    assert re.search(r"The last step that was logged: step 4, .*loss [\d.e-]+", card.text)
    assert "hf_secret" not in card.text
    assert str(tmp_path.parent) not in card.text  # nor any other folder of this machine
    made: dict[str, Any] = {"control_image": Image.fromarray(condition())}
    exec(code, made)
    assert made["image"].size == (SIZE, SIZE)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(condition()).save("control.png")
    monkeypatch.setattr(sys, "argv", command[2:])
    generate_command.main()
    assert Image.open("out.png").size == (SIZE, SIZE)


def test_a_card_that_somebody_wrote_stays(inputs: Inputs, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    run(codi, inputs, tmp_path / "run")
    assert (tmp_path / "run" / "README.md").read_text().endswith("# Mine\n")


def test_a_student_says_how_it_is_to_be_sampled(codi_run: Path):
    config = json.loads((codi_run / "scheduler" / "scheduler_config.json").read_text())
    assert config["distill_learning_steps"] == 50
    student = Model.from_pretrained(codi_run)
    assert default_sampler(student.schedule) == "codi"
    assert student.times(1).tolist() == [student.schedule.num_train_timesteps - 1]
    assert len(np.unique(generate(student))) > 10


def test_the_picture_shows_condition_teacher_students_and_data(codi_run: Path):
    picture = picture_of(codi_run)
    assert picture.shape[0] == 5 * SIZE
    rows = picture[:, -2 * SIZE :].reshape(5, SIZE, 2 * SIZE, 3)
    # In this data set conditions are the pictures themselves.
    np.testing.assert_array_equal(rows[0], rows[4])
    assert all(row.std() > 5 for row in rows)
    assert not np.array_equal(rows[2], rows[3])


def test_a_resumed_run_of_codi_is_the_same_run(
    inputs: Inputs, codi_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Programs, "run", picture_stub)
    half = codi_run / "checkpoint-2"
    run(codi, inputs, tmp_path, max_train_steps=4, resume_from_checkpoint=str(half), validation_steps=0)
    assert_same_weights(tmp_path / "controlnet", codi_run / "controlnet")
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (tmp_path, codi_run)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1][2:]]


def test_before_training_the_student_is_the_teacher(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepare(codi, inputs, tmp_path, monkeypatch)
    prepared.export(prepared.state, tmp_path)
    student, teacher = (Model.from_pretrained(each) for each in (tmp_path, inputs.model))
    outputs = {
        name: leaf
        for name, leaf in student.params["controlnet"].items()
        if name.startswith(("controlnet_down", "controlnet_mid"))
    }
    assert outputs
    assert not any(leaf.any() for leaf in jax.tree.leaves(outputs))
    # Their files name different times for the same number of steps: that is the grid, and no change of the network.
    teacher = teacher.replace(schedule=student.schedule)
    np.testing.assert_array_equal(generate(student), generate(teacher))


def test_teacher_and_student_are_shown_in_the_size_that_is_trained(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The teacher takes no condition image to have its size from, and its UNet names another one."""
    sizes = []
    monkeypatch.setattr(Programs, "run", lambda *given: sizes.append(given[-1]["z"].shape) or picture_stub(*given))
    prepared = prepare(codi, inputs, tmp_path, monkeypatch, resolution=16, validation_sampling_steps=(1,))
    prepared.validate(prepared.state, 0)
    assert sizes == [(2, 4, 4, 4)] * 2


def test_the_student_is_shown_at_the_steps_that_its_grid_has(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And rows are named in the same way as those of other scripts."""
    made, rows = [], []
    monkeypatch.setattr(
        runner, "generate_with", lambda *_, steps, **__: made.append(steps) or np.zeros((2, SIZE, SIZE, 3), np.uint8)
    )
    monkeypatch.setattr(runner, "labeled_rows", lambda given: rows.extend(given) or np.zeros((4, 4, 3), np.uint8))
    flags = {"distill_learning_steps": 4, "validation_sampling_steps": (1, 2, 4, 8)}
    prepared = prepare(codi, inputs, tmp_path, monkeypatch, **flags)
    prepared.validate(prepared.state, 0)
    assert made == [50, 1, 2, 4]
    of_student = ["student, 1 step", "student, 2 steps", "student, 4 steps"]
    assert rows == ["condition", "teacher, 50 steps", *of_student, "data"]


# Every way to train, as far as tracing a step; the slow test below runs them.
CODI_VARIANTS: dict[str, dict[str, Any]] = {
    "unet": {"train": "unet"},
    "unconditional": {"distill_type": "unconditional", "cfg_aware_distill": True},
    "super_resolution": {"task": "super_resolution", "onestepode": "uncontrol", "onestepode_cfg": True},
    "inpainting": {"task": "inpainting", "gradient_checkpointing": True, "distill_loss": "consistency_epsilon"},
    "canny": {"task": "canny", "conditioning_image_column": "none", "onestepode_sample_eps": "epsilon"},
    "accumulation": {"gradient_accumulation_steps": 2, "use_8bit_adam": True, "snr_gamma": 5.0},
    "bf16": {"mixed_precision": "bf16", "cache_latents": True, "onestepode_control_params": "online"},
}


@pytest.mark.parametrize("variant", CODI_VARIANTS)
def test_variants_of_codi_can_be_traced(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str):
    flags = cached_in(tmp_path, CODI_VARIANTS[variant])
    prepared = prepare(codi, inputs, tmp_path / "out", monkeypatch, **flags)
    expected = {"unet": {"controlnet", "unet"}, "unconditional": {"unet"}}.get(variant, {"controlnet"})
    assert prepared.state.params.keys() == prepared.state.ema.keys() == expected
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(prepared.state.params))
    batch = next(prepared.loader)
    assert ("conditioning" in batch) == (variant != "unconditional")
    assert ("moments" in batch) == ("cache_latents" in flags)
    state, metrics = prepared.traced()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), prepared.state
    )
    assert {"loss", "consistency", "reconstruction"} <= metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize("variant", CODI_VARIANTS)
def test_variants_of_codi_run(inputs: Inputs, tmp_path: Path, variant: str):
    """The quicker test above traces them."""
    flags = cached_in(tmp_path, CODI_VARIANTS[variant])
    out = run(codi, inputs, tmp_path / "out", **flags)
    assert_reports(out, 2)
    assert_frozen(out, inputs.model, "vae", "text_encoder")
    if "unet" not in variant and variant != "unconditional":
        assert_frozen(out, inputs.model, "unet")
    else:
        assert_trained(out, inputs.model, "unet")
    made = "StableDiffusionPipeline" if variant == "unconditional" else "StableDiffusionControlNetPipeline"
    assert type(diffusers.DiffusionPipeline.from_pretrained(out)).__name__ == made


def test_a_controlnet_is_trained_on(inputs: Inputs, codi_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for script in (controlnet, codi):
        flags = {"controlnet_model_name_or_path": str(codi_run), "mixed_precision": "bf16"}
        prepared = prepare(script, inputs, tmp_path / script.__name__, monkeypatch, **flags)
        prepared.export(prepared.state, tmp_path / script.__name__)
        assert_same_weights(tmp_path / script.__name__ / "controlnet", codi_run / "controlnet")
        prepared.traced()
    flags = {"controlnet_model_name_or_path": str(codi_run), "distill_type": "unconditional"}
    prepared = prepare(codi, inputs, tmp_path / "unconditional", monkeypatch, **flags)
    with monkeypatch.context() as patched:
        patched.setattr(Programs, "run", picture_stub)
        prepared.validate(prepared.state, 0)
    prepared.export(prepared.state, tmp_path / "unconditional")
    assert not (tmp_path / "unconditional" / "controlnet").exists()


@pytest.mark.usefixtures("nothing_compiles")
def test_the_folder_of_another_run_is_refused(inputs: Inputs, codi_run: Path):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in codi_run.rglob("*") if path.name != ".lock"}

    before = times()
    with pytest.raises(CheckpointError, match="holds checkpoint-4 of an earlier run"):
        run(codi, inputs, codi_run, max_train_steps=8)
    with pytest.raises(CheckpointError, match=r"was made with distill_learning_steps = 50, but this run has 25"):
        run(codi, inputs, codi_run, max_train_steps=8, resume_from_checkpoint="latest", distill_learning_steps=25)
    with pytest.raises(CheckpointError, match=r"was made with"):
        run(controlnet, inputs, codi_run, max_train_steps=8, resume_from_checkpoint="latest")
    assert times() == before


# ---- Flags


def parse(words: list[str]) -> CodiArgs:
    return tyro.cli(CodiArgs, args=words, use_underscores=True, config=(tyro.conf.DisallowNone,))


@pytest.mark.parametrize("data", ["--dataset_name=jax-diffusers-event/canny_diffusiondb", "--train_data_dir=/data"])
def test_the_command_lines_that_users_of_codi_know(data: str):
    known = (
        f"--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --output_dir=/data/canny_model {data} "
        "--load_from_disk --cache_dir=cache --resolution=512 --learning_rate=1e-5 --train_batch_size=2 "
        "--revision=non-ema --from_pt --max_train_steps=500000 --checkpointing_steps=10000 "
        "--dataloader_num_workers=16 --distill_learning_steps 50 --onestepode control "
        "--onestepode_control_params target --onestepode_sample_eps v_prediction --distill_loss consistency_x"
    )
    args = parse(known.split())
    assert (args.dataset_name or args.train_data_dir) == data.partition("=")[2]
    assert (args.max_train_steps, args.checkpointing_steps, args.learning_rate) == (500000, 10000, 1e-5)
    assert args.load_from_disk
    assert args.from_pt
    assert (args.revision, args.cache_dir, args.dataloader_num_workers) == ("non-ema", "cache", 16)
    assert (args.onestepode, args.onestepode_control_params) == ("control", "target")
    assert (args.onestepode_sample_eps, args.distill_loss) == ("v_prediction", "consistency_x")
    columns = "--image_column original_image --caption_column prompt --conditioning_image transformed_image"
    other = parse([*known.split(), *columns.split()])
    assert (other.image_column, other.caption_column) == ("original_image", "prompt")
    assert other.conditioning_image_column == "transformed_image"


OF_CODI = """
--controlnet_model_name_or_path n --controlnet_revision q --controlnet_from_pt --snr_gamma 5
--distill_type unconditional --distill_guidance_min 3 --distill_guidance_max 12 --onestepode uncontrol --onestepode_cfg
--cfg_aware_distill --onestepode_control_params online --onestepode_sample_eps epsilon
--distill_loss consistency_epsilon --distill_learning_steps 25 --distill_timestep_scaling 5 --ema_decay 0.9
"""


def test_every_known_flag_sets_the_argument_of_its_name():
    args = parse((SHARED + OF_CODI).split())
    defaults = parse(["--pretrained_model_name_or_path", "other"])
    for name in re.findall(r"--(\w+)", SHARED + OF_CODI):
        assert getattr(args, name) != getattr(defaults, name), name


@pytest.mark.parametrize("value", ["vprediction", "xprediction", "nprediction", "v_prediction", "x_prediction"])
def test_spellings_of_the_sample(value: str):
    args = parse(["--pretrained_model_name_or_path", "m", "--onestepode_sample_eps", value])
    assert args.onestepode_sample_eps == value
