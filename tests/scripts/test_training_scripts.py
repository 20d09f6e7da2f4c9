"""The training scripts, run as a user runs them, on models of a few channels and data sets of a few pictures."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import tyro
from folders import SIZE, refuse_weights
from picture_folders import write_folder
from PIL import Image
from published import TINY_VAE
from script_runs import (
    PICTURES,
    SHARED,
    Inputs,
    as_command,
    assert_frozen,
    assert_reports,
    assert_trained,
    cached_in,
    flags_of,
    meta,
    picture_of,
    prepare,
    run,
    weights_of,
)
from transformers import CLIPTextModel

from codi_jax.cli import command_line
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import default_sampler
from codi_jax.pipeline.saving import save_schedule
from codi_jax.training.checkpoint import CheckpointError
from training_scripts import train_autoencoder_flax as autoencoder
from training_scripts import train_bk_sdm_flax as bk_sdm
from training_scripts import train_codi_flax as codi
from training_scripts import train_controlnet_flax as controlnet
from training_scripts import train_text_to_image_flax as text_to_image

ON_MODELS = [codi, controlnet, text_to_image]


def test_cached_latents_give_nearly_the_same_loss(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = {}
    for cache in (False, True):
        flags = cached_in(tmp_path, {"cache_latents": cache})
        prepared = prepare(text_to_image, inputs, tmp_path / str(cache), monkeypatch, **flags)
        batch = next(prepared.loader)
        prepared.loader.close()
        loss = jax.jit(lambda *given, step=prepared.step: step(*given)[1]["loss"])  # and nothing else is compiled
        losses[cache] = float(loss(prepared.state, prepared.frozen, batch))
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
    again = {**flags, "prediction_type": "epsilon", "resume_from_checkpoint": "latest", "max_train_steps": 3}
    with pytest.raises(CheckpointError, match='made with prediction_type = "v_prediction", but this run has "epsilon"'):
        run(text_to_image, inputs, tmp_path, **again)


@pytest.mark.parametrize("script", [text_to_image, controlnet, bk_sdm], ids=lambda script: script.__name__)
def test_a_student_that_is_trained_at_all_times_is_a_student_no_more(
    script: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its grid goes with the training of its UNet; a ControlNet leaves the UNet, and how it is sampled, as they are."""
    model = shutil.copytree(inputs.model, tmp_path / "model")
    save_schedule(NoiseSchedule.from_pretrained(model).sampled(SamplingSpec.codi(20)), model)
    flags = {"prepare_unet": False} if script is bk_sdm else {}
    prepared = prepare(script, Inputs(model, inputs.data), tmp_path / "run", monkeypatch, **flags)
    prepared.export(prepared.state, tmp_path / "trained")
    trained = NoiseSchedule.from_pretrained(tmp_path / "trained")
    wanted = (20, "codi") if script is controlnet else (None, "ddim")
    assert (trained.to_config().get("distill_learning_steps"), default_sampler(trained)) == wanted
    assert NoiseSchedule.from_pretrained(model).sampling.grid_steps == 20


@pytest.mark.slow
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
    other = tmp_path / "other" / "config.json"
    other.parent.mkdir()
    other.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 2.0}))
    resumed = {**flags, "model_config_name_or_path": str(other), "resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match=r"was made with vae = .*, but this run has"):
        run(autoencoder, images, out, cache_dir=str(tmp_path / "cache"), max_train_steps=3, **resumed)


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
    "checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7 is not a checkpoint"),
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


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
):
    flags, message = BAD[case]
    refuse_weights(monkeypatch)
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
    "condition": (with_other_conditions, "they do not align; give both the same aspect ratio"),
    "caption": (lambda folder: meta(folder, lambda row: row.update(text=3)), "line 1 has 3 under 'text', which is no"),
}


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("case", SPOILT)
def test_data_that_is_no_good_is_refused(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    spoil, message = SPOILT[case]
    data = Path(shutil.copytree(inputs.data, tmp_path / "data"))
    spoil(data)
    refuse_weights(monkeypatch)
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
    refuse_weights(monkeypatch)
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


@pytest.mark.parametrize("script", [controlnet, text_to_image])
def test_the_other_scripts_take_the_shared_flags(script: Any):
    args = tyro.cli(script.Args, args=SHARED.split(), use_underscores=True)
    assert (args.lr_scheduler, args.max_grad_norm, args.validation_prompt) == ("constant_with_warmup", 2, ("a", "b"))


@pytest.mark.parametrize("script", [*ON_MODELS, autoencoder])
def test_every_flag_has_help(script: Any, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        tyro.cli(script.Args, args=["--help"], use_underscores=True)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name}" in shown or f"--no_{field.name}" in shown, field.name
