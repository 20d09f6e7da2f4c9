"""The training scripts, run as a user runs them, on models of a few channels and data sets of a few pictures."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import tyro
from folders import SIZE, make_pipeline
from picture_folders import write_folder
from PIL import Image
from published import TINY_VAE
from safetensors.numpy import load_file
from transformers import CLIPTextModel

from codi_jax.cli import command_line
from codi_jax.diffusion.sampling import default_sampler
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.pipeline import model as pipeline
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop
from codi_jax.training.checkpoint import CheckpointError, list_checkpoints
from training_scripts import train_autoencoder_flax as autoencoder
from training_scripts import train_bk_sdm_flax as bk_sdm
from training_scripts import train_codi_flax as codi
from training_scripts import train_controlnet_flax as controlnet
from training_scripts import train_text_to_image_flax as text_to_image
from training_scripts.train_codi_flax import Args as CodiArgs

PICTURES = 6
ON_MODELS = [codi, controlnet, text_to_image]


class Inputs(NamedTuple):
    """What runs start from."""

    model: Path
    data: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    make_pipeline("text-to-image", folder).save_pretrained(folder / "model")
    data = write_folder(folder / "data", PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    return Inputs(folder / "model", data)


def flags_of(script: Any, inputs: Inputs, output_dir: Path, **flags: Any) -> Any:
    """Arguments of a run of two steps, that validates at its end."""
    sampling = {codi: (1, 2), autoencoder: None}.get(script, 2)
    given = {
        "pretrained_model_name_or_path": str(inputs.model), "train_data_dir": str(inputs.data), "resolution": SIZE,
        "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
        "num_validation_images": 2, "validation_steps": 0, "validation_sampling_steps": sampling,
        "output_dir": str(output_dir), "lr_warmup_steps": 0,
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in {**given, **flags}.items() if name in names or name in flags})


def run(script: Any, inputs: Inputs, output_dir: Path, **flags: Any) -> Path:
    script.main(flags_of(script, inputs, output_dir, **flags))
    return output_dir


class Prepared(NamedTuple):
    """What a script hands to the training loop."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    loader: Any
    validate: Callable[..., Any]
    export: Callable[..., Any]

    def traced(self) -> tuple[Any, Any]:
        """Shapes and dtypes of a step's results: as good as compiling it, as far as mistakes in programs go."""
        batch = next(self.loader)
        self.loader.close()
        return jax.eval_shape(self.step, self.state, self.frozen, batch)


def prepare(script: Any, inputs: Inputs, output_dir: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Prepared:
    """Runs a script up to its first step."""
    handed: list[Prepared] = []

    def take(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **others: Any) -> None:
        handed.append(Prepared(step, state, frozen, loader, others["validate"], others["export"]))

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", take)
        run(script, inputs, output_dir, **flags)
    return handed[0]


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a training step nor a pipeline."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was to be refused before anything is compiled")

    monkeypatch.setattr(loop, "_compile", refuse)
    monkeypatch.setattr(DiffusionPipeline, "_run", refuse)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = weights_of(ours), weights_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)


def assert_frozen(folder: Path, model: Path, *names: str) -> None:
    """Parts of a folder have the very numbers of the model's."""
    for name in names:
        if name == "text_encoder":
            ours, theirs = (CLIPTextModel.from_pretrained(each / name).state_dict() for each in (folder, model))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(value, theirs[key]) for key, value in ours.items())
        else:
            assert_same_weights(folder / name, model / name)


def assert_trained(folder: Path, model: Path, *names: str) -> None:
    for name in names:
        ours, theirs = weights_of(folder / name), weights_of(model / name)
        assert ours.keys() == theirs.keys()
        changed = [key for key, value in ours.items() if not np.array_equal(value, theirs[key])]
        assert len(changed) > 0.9 * len(ours)


def assert_reports(folder: Path, steps: int, picture: str = "samples") -> None:
    """Metrics, arguments and pictures of a run that logs every step and validates at its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    assert list_checkpoints(folder)[-1] == steps
    assert [path.name for path in (folder / "validation").iterdir()] == [f"{picture}-{steps}.png"]
    arguments = (folder / "args.json").read_text()
    assert json.loads(arguments)["output_dir"] == str(folder)
    assert "hub_token" not in arguments


def picture_of(folder: Path) -> np.ndarray:
    (path,) = (folder / "validation").iterdir()
    return np.asarray(Image.open(path))


def condition() -> np.ndarray:
    return np.linspace(0, 255, SIZE * SIZE * 3).astype(np.uint8).reshape(SIZE, SIZE, 3)


def generate(pipeline: DiffusionPipeline, **options: Any) -> np.ndarray:
    control = condition() if "controlnet" in pipeline.modules else None
    return pipeline("a cat", control_image=control, height=SIZE, width=SIZE, steps=2, **options)


# ---- CoDi


@pytest.fixture(scope="module")
def codi_run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codi") / "whole"
    return run(codi, inputs, folder, max_train_steps=4, checkpointing_steps=2, hub_token="hf_secret")


def test_codi_writes_a_student_that_diffusers_loads(inputs: Inputs, codi_run: Path):
    assert_reports(codi_run, 4)
    assert "hf_secret" not in (codi_run / "args.json").read_text()
    loaded = diffusers.DiffusionPipeline.from_pretrained(codi_run)
    assert type(loaded) is diffusers.StableDiffusionControlNetPipeline
    loaded.set_progress_bar_config(disable=True)
    made = loaded("a cat", image=Image.fromarray(condition()), num_inference_steps=1, output_type="np").images
    assert made.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(made).all()
    assert_frozen(codi_run, inputs.model, "unet", "vae", "text_encoder")
    outputs = [key for key in weights_of(codi_run / "controlnet") if key.startswith("controlnet_mid_block.")]
    assert all(weights_of(codi_run / "controlnet")[key].any() for key in outputs)


def test_a_student_says_how_it_is_to_be_sampled(codi_run: Path):
    config = json.loads((codi_run / "scheduler" / "scheduler_config.json").read_text())
    assert config["distill_learning_steps"] == 50
    student = DiffusionPipeline.from_pretrained(codi_run)
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
    monkeypatch.setattr(DiffusionPipeline, "_run", lambda self, program, given: picture_stub(given))
    half = codi_run / "checkpoint-2"
    run(codi, inputs, tmp_path, max_train_steps=4, resume_from_checkpoint=str(half), validation_steps=0)
    assert_same_weights(tmp_path / "controlnet", codi_run / "controlnet")
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (tmp_path, codi_run)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1][2:]]


def test_before_training_the_student_is_the_teacher(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepare(codi, inputs, tmp_path, monkeypatch)
    prepared.export(prepared.state, tmp_path)
    student, teacher = (DiffusionPipeline.from_pretrained(each) for each in (tmp_path, inputs.model))
    outputs = {
        name: leaf
        for name, leaf in student.params["controlnet"].items()
        if name.startswith(("controlnet_down", "controlnet_mid"))
    }
    assert outputs
    assert not any(leaf.any() for leaf in jax.tree.leaves(outputs))
    # Their files name different times for the same number of steps: that is the grid, and no change of the network.
    teacher.schedule = student.schedule
    np.testing.assert_array_equal(generate(student), generate(teacher))


def test_teacher_and_student_are_shown_in_the_size_that_is_trained(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The teacher takes no condition image to have its size from, and its UNet names another one."""
    sizes = []
    monkeypatch.setattr(
        DiffusionPipeline, "_run", lambda self, program, given: sizes.append(given["z"].shape) or picture_stub(given)
    )
    prepared = prepare(codi, inputs, tmp_path, monkeypatch, resolution=16, validation_sampling_steps=(1,))
    prepared.validate(prepared.state, 0)
    assert sizes == [(2, 4, 4, 4)] * 2


def test_the_student_is_shown_at_the_steps_that_its_grid_has(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []
    monkeypatch.setattr(
        codi, "generate_with", lambda *_, steps, **__: made.append(steps) or np.zeros((2, SIZE, SIZE, 3), np.uint8)
    )
    flags = {"distill_learning_steps": 4, "validation_sampling_steps": (1, 2, 4, 8)}
    prepared = prepare(codi, inputs, tmp_path, monkeypatch, **flags)
    prepared.validate(prepared.state, 0)
    assert made == [50, 1, 2, 4]


def picture_stub(given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    batch, height, width, _ = given["z"].shape
    return np.zeros((batch, 4 * height, 4 * width, 3), np.uint8), np.ones(batch, bool)


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


def cached_in(tmp_path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    return {**flags, "cache_latents_dir": str(tmp_path / "latents")} if flags.get("cache_latents") else flags


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


def test_cached_latents_give_nearly_the_same_loss(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = {}
    for cache in (False, True):
        flags = cached_in(tmp_path, {"cache_latents": cache})
        prepared = prepare(text_to_image, inputs, tmp_path / str(cache), monkeypatch, **flags)
        batch = next(prepared.loader)
        prepared.loader.close()
        _, metrics = jax.jit(prepared.step)(prepared.state, prepared.frozen, batch)
        losses[cache] = float(metrics["loss"])
    assert losses[True] != losses[False], "float16 ought to show"
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


# ---- ControlNet, text to image, autoencoder


def test_controlnet(inputs: Inputs, tmp_path: Path):
    out = run(controlnet, inputs, tmp_path, use_ema=True, ema_decay=0.5, save_dtype="float16")
    assert_reports(out, 2)
    loaded = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(loaded) is diffusers.StableDiffusionControlNetPipeline
    assert_frozen(out, inputs.model, "unet", "vae", "text_encoder")
    trained = weights_of(out / "controlnet")
    assert all(value.dtype == np.float16 for value in trained.values())
    assert trained["controlnet_mid_block.weight"].any()
    assert picture_of(out).shape[0] == 3 * SIZE


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
        patched.setattr(DiffusionPipeline, "_run", lambda self, program, given: picture_stub(given))
        prepared.validate(prepared.state, 0)
    prepared.export(prepared.state, tmp_path / "unconditional")
    assert not (tmp_path / "unconditional" / "controlnet").exists()


def test_text_to_image(inputs: Inputs, tmp_path: Path):
    flags = {"train_text_encoder": True, "prediction_type": "v_prediction", "noise_offset": 0.05, "snr_gamma": 5.0}
    out = run(text_to_image, inputs, tmp_path, **flags)
    assert_reports(out, 2)
    loaded = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert_frozen(out, inputs.model, "vae")
    assert_trained(out, inputs.model, "unet")
    ours, theirs = (CLIPTextModel.from_pretrained(each / "text_encoder").state_dict() for each in (out, inputs.model))
    assert sum(not np.array_equal(value, theirs[key]) for key, value in ours.items()) > 0.9 * len(ours)
    assert picture_of(out).shape[0] == 2 * SIZE


@pytest.mark.parametrize("script", [text_to_image, controlnet, bk_sdm], ids=lambda script: script.__name__)
def test_a_student_that_is_trained_at_all_times_is_a_student_no_more(
    script: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its grid goes with the training of its UNet; a ControlNet leaves the UNet, and how it is sampled, as they are."""
    model = shutil.copytree(inputs.model, tmp_path / "model")
    NoiseSchedule.from_pretrained(model).with_distillation_grid(20).save_pretrained(model)
    flags = {"prepare_unet": False} if script is bk_sdm else {}
    prepared = prepare(script, Inputs(model, inputs.data), tmp_path / "run", monkeypatch, **flags)
    prepared.export(prepared.state, tmp_path / "trained")
    trained = NoiseSchedule.from_pretrained(tmp_path / "trained")
    wanted = (20, "codi") if script is controlnet else (None, "ddim")
    assert (trained.distill_learning_steps, default_sampler(trained)) == wanted
    assert NoiseSchedule.from_pretrained(model).distill_learning_steps == 20


def test_from_scratch_needs_no_weights(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = Path(shutil.copytree(inputs.model, tmp_path / "model"))
    for name in ("unet", "text_encoder"):
        for file in (model / name).glob("*.safetensors"):
            file.unlink()
    flags = {"from_scratch": ("unet", "text_encoder"), "train_text_encoder": True, "mixed_precision": "bf16"}
    prepared = prepare(text_to_image, inputs._replace(model=model), tmp_path / "out", monkeypatch, **flags)
    state, _ = prepared.traced()
    assert state.params.keys() == {"unet", "text_encoder"}
    prepared.export(prepared.state, tmp_path / "out")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")) is diffusers.StableDiffusionPipeline


@pytest.mark.usefixtures("nothing_compiles")
def test_a_text_encoder_from_scratch_is_to_be_trained(inputs: Inputs, tmp_path: Path):
    """The folder would be saved with the one that it was not trained with."""
    with pytest.raises(ValueError, match=r"--from_scratch text_encoder needs --train_text_encoder"):
        run(text_to_image, inputs, tmp_path, from_scratch=("text_encoder",))


def test_autoencoder(inputs: Inputs, tmp_path: Path):
    """On a folder of images, without a word about them."""
    images = inputs._replace(data=inputs.data / "images")
    config = inputs.model / "vae" / "config.json"
    flags = {"pretrained_model_name_or_path": None, "model_config_name_or_path": str(config), "use_ema": True}
    out = run(autoencoder, images, tmp_path / "out", cache_dir=str(tmp_path / "cache"), **flags)
    assert_reports(out, 2, "reconstruction")
    loaded = diffusers.AutoencoderKL.from_pretrained(out / "vae")
    assert loaded.config.block_out_channels == TINY_VAE["block_out_channels"]
    assert loaded.config.scaling_factor != 0.18215
    assert picture_of(out).shape == (2 * SIZE, picture_of(out).shape[1], 3)


def test_an_autoencoder_is_trained_on(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a whole model, or from its autoencoder alone."""
    for number, source in enumerate([inputs.model, inputs.model / "vae"]):
        flags = {"pretrained_model_name_or_path": str(source)}
        prepared = prepare(autoencoder, inputs, tmp_path / str(number), monkeypatch, **flags)
        prepared.traced()
        assert jax.tree.leaves(prepared.state.params)[0].dtype == np.float32


@pytest.mark.parametrize("flags", [{}, {"pretrained_model_name_or_path": "x", "model_config_name_or_path": "y"}])
def test_an_autoencoder_starts_from_one_thing(inputs: Inputs, tmp_path: Path, flags: dict[str, str]):
    given = {"pretrained_model_name_or_path": None, **flags}
    with pytest.raises(ValueError, match="give either --pretrained_model_name_or_path or --model_config_name_or_path"):
        run(autoencoder, inputs, tmp_path, **given)


# ---- Refused in a sentence, before anything is compiled


def meta(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes every line of a data set's list."""
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "column": ({"conditioning_image_column": "edges"}, r"has no column 'edges'.*image, text, conditioning_image"),
    "no data": ({"train_data_dir": None}, "no data to train on: give --dataset_name or --train_data_dir"),
    "two data sets": ({"dataset_name": "x"}, "--dataset_name and --train_data_dir exclude each other"),
    "resolution": ({"resolution": 36}, r"--resolution 36 is not possible: .* takes multiples of 8"),
    "devices": ({"fsdp": 3}, "--fsdp 3 does not divide the 1 devices"),
    "too little data": ({"train_batch_size": 7}, "6 samples, fewer than one batch of 7 takes"),
    "no condition image": ({"validation_prompt": ("a",)}, "--validation_prompt needs --validation_image here"),
    "condition image": ({"validation_prompt": ("a",), "validation_image": ("no.png",)}, r"no\.png"),
    "model": ({"pretrained_model_name_or_path": "/nowhere"}, "/nowhere"),
    "controlnet": ({"controlnet_model_name_or_path": "/nowhere"}, "/nowhere"),
    "checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7 is no checkpoint"),
    "grid": ({"distill_learning_steps": 3000}, "distill_learning_steps"),
    "steps of validation": (
        {"distill_learning_steps": 4, "validation_sampling_steps": (8,)},
        "--validation_sampling_steps",
    ),
    "no step of validation": ({"validation_sampling_steps": (0, 1)}, "--validation_sampling_steps"),
    "validation data": ({"validation_data_dir": "/nowhere"}, r"/nowhere: check --validation_data_dir"),
    "data": ({"train_data_dir": "/nowhere"}, r"there is no folder /nowhere: check --train_data_dir"),
    "accumulation": (
        {"gradient_accumulation_steps": 0},
        "--gradient_accumulation_steps 0 is not possible: it must be at least 1",
    ),
    "learning rate": ({"learning_rate": -1.0}, "--learning_rate -1.0 is not possible: it must be at least 0"),
    "no samples": ({"max_train_samples": 0}, "--max_train_samples 0 is not possible: it must be at least 1"),
    "caption": ({"caption_column": "words"}, r"has no column 'words': set --caption_column to one of image, text"),
    "image": ({"image_column": "picture"}, r"has no column 'picture': set --image_column to one of image, text"),
}


def as_command(args: Any) -> list[str]:
    """The command line of arguments that are not the defaults."""
    command = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or value == field.default:
            continue
        words = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        command += [f"--{field.name}"] if value is True else [f"--{field.name}", *words]
    return command


def refuse_to_load(*_: Any, **__: Any) -> None:
    raise AssertionError("this was to be refused before weights are loaded")


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
):
    flags, message = BAD[case]
    monkeypatch.setattr(pipeline, "load_model", refuse_to_load)
    args = flags_of(codi, inputs, tmp_path / "out", **flags)
    monkeypatch.setattr("sys.argv", ["train_codi_flax.py", *as_command(args)])
    with pytest.raises(SystemExit) as ended:
        command_line.run(codi.Args, codi.main)
    assert re.match(f"error: .*{message}", str(ended.value.code)), ended.value.code
    assert "\n" not in str(ended.value.code)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_compiles")
def test_an_output_folder_that_cannot_be_written(inputs: Inputs, tmp_path: Path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"--output_dir .*out cannot be written \(File exists\): choose another"):
        run(codi, inputs, tmp_path / "out")


def empty(folder: Path) -> None:
    (folder / "meta.jsonl").write_text("")


def without_images(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.unlink()


def without_anything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def with_other_conditions(folder: Path) -> None:
    for file in (folder / "processed_images").iterdir():
        Image.new("RGB", (2 * SIZE, SIZE)).save(file)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (empty, r"meta.jsonl is empty: it needs one JSON object for each image"),
    "nothing": (without_anything, r"holds no data set: it has no meta.jsonl or metadata.jsonl.* \(it holds nothing\)"),
    "unreadable": (without_images, r"20 images in a row could not be read; the last was row \d of .*No such file"),
    "condition": (with_other_conditions, "one cannot be laid over the other; give both the same aspect ratio"),
    "caption": (lambda folder: meta(folder, lambda row: row.update(text=3)), "line 1 has 3 under 'text', which is no"),
}


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("case", SPOILT)
def test_data_that_is_no_good_is_refused(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    spoil, message = SPOILT[case]
    data = Path(shutil.copytree(inputs.data, tmp_path / "data"))
    spoil(data)
    monkeypatch.setattr(pipeline, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match=message) as error:
        run(codi, inputs._replace(data=data), tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("script", [codi, controlnet, text_to_image, autoencoder])
def test_training_data_is_looked_at_before_the_model_is_loaded(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
):
    """Also where validation has data of its own."""
    data = write_folder(tmp_path / "data", PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    meta(data, lambda row: row.update(picture=row.pop("image")))
    monkeypatch.setattr(pipeline, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match=r"data/meta\.jsonl has no column 'image': set --image_column to one of"):
        run(script, inputs._replace(data=data), tmp_path / "out", validation_data_dir=str(inputs.data))


@pytest.mark.usefixtures("nothing_compiles")
def test_what_the_autoencoder_cannot_be(inputs: Inputs, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--resolution 34 is not possible: the autoencoder .* takes multiples of 4"):
        run(autoencoder, inputs, tmp_path / "out", resolution=34)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"unet is a UNet2DCondition, not an autoencoder"):
        run(autoencoder, inputs, tmp_path / "out", pretrained_model_name_or_path=str(inputs.model / "unet"))


@pytest.mark.usefixtures("nothing_compiles")
def test_text_to_image_takes_data_without_conditions_and_the_others_do_not(inputs: Inputs, tmp_path: Path):
    data = write_folder(tmp_path / "data", PICTURES, size=(SIZE, SIZE))
    for script in (codi, controlnet):
        with pytest.raises(ValueError, match="set --conditioning_image_column to one of image, text"):
            run(script, inputs._replace(data=data), tmp_path / script.__name__)
    with pytest.raises(AssertionError, match="before anything is compiled"):
        run(text_to_image, inputs._replace(data=data), tmp_path / "t2i")


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


# ---- Several processes


# Networks of a few channels are split as large ones are.
CHILD = """
import sys
from codi_jax.cli import command_line
from codi_jax.models import sharding
from training_scripts import train_codi_flax, train_text_to_image_flax

sharding.MIN_SHARDED_SIZE = 256
script = {"codi": train_codi_flax, "text_to_image": train_text_to_image_flax}[sys.argv.pop(1)]
command_line.run(script.Args, script.main)
"""


def children(count: int, name: str, args: Any) -> None:
    """Runs a script in some processes, which have two devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = {"JAX_NUM_CPU_DEVICES": str(2 // count), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    given["PYTHONPATH"] = str(Path(codi.__file__).parent.parent)
    if count > 1:
        given |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-c", CHILD, name, *as_command(args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environments = [os.environ | given | {"JAX_PROCESS_ID": str(i)} for i in range(count)]
    started = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
    texts = [process.communicate(timeout=1200)[0] for process in started]
    assert all(process.returncode == 0 for process in started), texts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_to_image", "codi"])
def test_processes_do_not_matter(inputs: Inputs, tmp_path: Path, name: str):
    """Two of one device each, with the parameters split between them, against one of two devices: data, cached latents,
    steps, pictures and the model that is written. Sums are taken in other orders, which is what tolerances are for."""
    script, part = {"codi": (codi, "controlnet"), "text_to_image": (text_to_image, "unet")}[name]
    sampling = {"codi": (1,), "text_to_image": 2}[name]
    for count in (1, 2):
        flags = {"cache_latents": True, "cache_latents_dir": str(tmp_path / f"latents-{count}"), "fsdp": 2}
        flags |= {"train_batch_size": 1, "max_train_steps": 3, "validation_sampling_steps": sampling}
        children(count, name, flags_of(script, inputs, tmp_path / str(count), **flags))
        assert_reports(tmp_path / str(count), 3)
    one, two = (tmp_path / count for count in "12")
    losses = [[json.loads(line)["loss"] for line in (each / "metrics.jsonl").open()] for each in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    ours, theirs = weights_of(two / part), weights_of(one / part)
    assert ours.keys() == theirs.keys()
    different = [np.abs(value - theirs[key]).mean() for key, value in ours.items()]
    assert max(different) < 1e-5, "a step changes each of them by 1e-3"
    pictures = [picture_of(each).astype(int) for each in (one, two)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


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


# Flags and values of the scripts that came before.
SHARED = """
--pretrained_model_name_or_path m --revision r --variant fp16 --tokenizer_name t --from_pt --output_dir o --cache_dir c
--seed 1 --resolution 64 --center_crop --random_flip --train_batch_size 2 --num_train_epochs 3 --max_train_steps 4
--gradient_accumulation_steps 2 --gradient_checkpointing --learning_rate 0.1 --scale_lr
--lr_scheduler constant_with_warmup --lr_warmup_steps 5 --use_8bit_adam --adam_beta1 0.8 --adam_beta2 0.99
--adam_weight_decay 0.1 --adam_epsilon 1e-6 --max_grad_norm 2 --mixed_precision bf16 --allow_tf32
--enable_xformers_memory_efficient_attention --dataset_name d --dataset_config_name x --train_data_dir e
--load_from_disk --streaming --image_column i --caption_column j --conditioning_image_column k --max_train_samples 9
--proportion_empty_prompts 0.5 --dataloader_num_workers 3 --checkpointing_steps 7 --checkpoints_total_limit 2
--resume_from_checkpoint latest --logging_dir l --logging_steps 8 --report_to none --tracker_project_name p
--wandb_entity w --validation_prompt a b --validation_image v --validation_steps 6 --num_validation_images 5
--profile_steps 1 --profile_validation --profile_memory --ccache z --debug --push_to_hub --hub_token h
--hub_model_id me/x --local_rank 0
"""
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


@pytest.mark.parametrize("script", [controlnet, text_to_image])
def test_the_other_scripts_take_the_shared_flags(script: Any):
    args = tyro.cli(script.Args, args=SHARED.split(), use_underscores=True)
    assert (args.lr_scheduler, args.max_grad_norm, args.validation_prompt) == ("constant_with_warmup", 2, ("a", "b"))


@pytest.mark.parametrize("value", ["vprediction", "xprediction", "nprediction", "v_prediction", "x_prediction"])
def test_spellings_of_the_sample(value: str):
    args = parse(["--pretrained_model_name_or_path", "m", "--onestepode_sample_eps", value])
    assert args.onestepode_sample_eps == value


@pytest.mark.parametrize("script", [*ON_MODELS, autoencoder])
def test_every_flag_has_help(script: Any, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        tyro.cli(script.Args, args=["--help"], use_underscores=True)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name}" in shown or f"--no_{field.name}" in shown, field.name
