"""The scripts of InstructPix2Pix and of LCM, run as a user runs them, and diffusers with what they write."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tyro
from folders import FAMILIES, SIZE, refuse_weights, saved_pipeline
from picture_folders import numbered, write_folder
from PIL import Image
from safetensors import safe_open
from script_runs import (
    Inputs,
    as_command,
    assert_frozen,
    assert_reports,
    assert_same_weights,
    card_of,
    flags_of,
    prepare,
    run,
    weights_of,
)

from codi_jax.cli import command_line
from codi_jax.methods import lcm as lcm_method
from codi_jax.methods.baking import bake_guidance
from codi_jax.pipeline.model import Model
from training_scripts import train_instruct_pix2pix_flax as edit
from training_scripts import train_lcm_distil_instruct_pix2pix_sdxl as lcm_edit
from training_scripts import train_lcm_flax as lcm

OF_DATA = {"image_column": "image", "caption_column": "text", "conditioning_image_column": "conditioning_image"}
OF_LCM = {"validation_sampling_steps": (1, 2), "unet_time_cond_proj_dim": 16, "w_min": 1.0, "w_max": 4.0}
# A large learning rate, so that the guidance that starts with no effect gets one in two steps.
OF_STUDENTS = {**OF_DATA, **OF_LCM, "conditioning_dropout_prob": 0.1, "checkpointing_steps": 1, "learning_rate": 0.03}
EDITORS = ["instruct-pix2pix", pytest.param("sdxl-instruct-pix2pix", marks=pytest.mark.slow)]
Models = Callable[[str], Inputs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    data = write_folder(folder / "data", 6, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    return lambda family: Inputs(saved_pipeline(family, folder), data)


@pytest.fixture(scope="module")
def students(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a student of each family, distilled once."""
    folder = tmp_path_factory.mktemp("students")

    def of(family: str) -> Path:
        if not (folder / family).exists():
            run(lcm_edit, models(family), folder / family, **OF_STUDENTS)
        return folder / family

    return of


def source() -> Image.Image:
    return numbered(120, (SIZE, SIZE))


@pytest.mark.slow
def test_an_editor_is_made_of_a_text_to_image_model(models: Models, tmp_path: Path) -> None:
    inputs = models("text-to-image")
    out = run(edit, inputs, tmp_path / "run", conditioning_dropout_prob=0.1, use_ema=True, **OF_DATA)
    assert_reports(out, 2)
    assert_frozen(out, inputs.model, "vae", "text_encoder")
    loaded = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(loaded) is diffusers.StableDiffusionInstructPix2PixPipeline
    kernel = weights_of(out / "unet")["conv_in.weight"]
    assert kernel.shape[1] == 8
    assert np.abs(kernel[:, 4:]).max() > 0, "what the image enters by was not trained"
    loaded.set_progress_bar_config(disable=True)
    made = loaded("x", image=source(), num_inference_steps=2, output_type="np").images
    assert np.isfinite(made).all()


def test_an_editor_starts_as_the_model_it_is_made_of(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New input channels are zeros: whatever the source image, the prediction is that of the model without."""
    inputs = models("text-to-image")
    prepared = prepare(edit, inputs, tmp_path / "run", monkeypatch, **OF_DATA)
    kernel = np.asarray(prepared.state.params["unet"]["conv_in"]["kernel"])
    before = weights_of(inputs.model / "unet")["conv_in.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel[:, :, :4], before)
    assert not kernel[:, :, 4:].any()


@pytest.mark.parametrize("family", EDITORS)
def test_lcm_writes_a_student_and_its_average(models: Models, students: Callable[[str], Path], family: str) -> None:
    out, inputs = students(family), models(family)
    assert_reports(out, 2)
    assert_frozen(out, inputs.model, "vae", "text_encoder")
    names = {path.name for path in out.iterdir()}
    promised = {"unet", "unet_target", "text_encoder", "tokenizer", "vae", "scheduler", "checkpoint-2", "logs"}
    is_sdxl = FAMILIES[family][2]
    assert promised | ({"text_encoder_2", "tokenizer_2"} if is_sdxl else set()) <= names | {"logs"}
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    student, target = weights_of(out / "unet"), weights_of(out / "unet_target")
    assert student.keys() == target.keys() == {*weights_of(inputs.model / "unet"), "time_embedding.cond_proj.weight"}
    assert any(not np.array_equal(student[name], target[name]) for name in student)
    loaded = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(loaded) is FAMILIES[family][0]
    assert loaded.unet.config.time_cond_proj_dim == 16
    unet = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet_target")
    assert unet.config.in_channels == 8


@pytest.mark.parametrize("family", EDITORS)
def test_a_baked_student_is_right_in_the_stock_pipeline(models: Models, tmp_path: Path, family: str) -> None:
    teacher = Model.from_pretrained(models(family).model)
    flags = lcm_method.LcmFlags(unet_time_cond_proj_dim=16)
    unet = lcm_method.configure(teacher.networks, flags).student.unet
    student = lcm_method.init_student(unet, teacher.params["unet"])
    projection = student["time_embedding"]["cond_proj"]
    projection["kernel"] = jax.random.normal(jax.random.key(0), projection["kernel"].shape)
    ours = teacher.with_network("unet", unet, student)
    ours = ours.replace(schedule=lcm_method.sampling(teacher.schedule, flags))
    ours.with_network("unet", *bake_guidance(unet, student, 3.5)).save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is FAMILIES[family][0]
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    size = {"height": SIZE, "width": SIZE} if FAMILIES[family][2] else {}
    wanted = theirs(
        "a dog", image=source(), num_inference_steps=1, guidance_scale=1.0, image_guidance_scale=1.0, latents=latents,
        output_type="np", **size,
    ).images  # fmt: skip
    given = {"steps": 1, "latents": noise}
    made = ours("a dog", source(), guidance_scale=3.5, **given)
    assert np.abs(made - 255 * wanted).max() <= 2
    assert np.abs(made.astype(float) - ours("a dog", source(), guidance_scale=1.0, **given)).max() > 2


def test_a_finished_run_is_exported_anew_with_its_guidance_baked_in(
    models: Models, students: Callable[[str], Path], tmp_path: Path
) -> None:
    out = students("instruct-pix2pix")
    resumed = {"resume_from_checkpoint": str(out / "checkpoint-2"), "bake_guidance_scale": 3.5}
    baked = run(lcm_edit, models("instruct-pix2pix"), tmp_path / "baked", **OF_STUDENTS, **resumed)
    for name in ("unet", "unet_target"):
        unbaked, ours = weights_of(out / name), weights_of(baked / name)
        assert unbaked.keys() - ours.keys() == {"time_embedding.cond_proj.weight"}
        changed = {key for key in ours if not np.array_equal(ours[key], unbaked[key])}
        assert changed == {"time_embedding.linear_1.bias"}


@pytest.mark.slow
def test_a_student_of_two_guidances_takes_both(models: Models, tmp_path: Path) -> None:
    flags = {"w_image_min": 0.0, "w_image_max": 1.0, **OF_DATA, **OF_LCM, "learning_rate": 0.05}
    out = run(lcm_edit, models("instruct-pix2pix"), tmp_path / "run", **flags)
    student = Model.from_pretrained(out)
    assert student.networks.unet.config.embeds_image_guidance
    pairs = [(2.0, 1.0), (4.0, 1.0), (2.0, 2.0)]
    made = [
        student("a dog", source(), steps=1, guidance_scale=text, image_guidance_scale=image).astype(int)
        for text, image in pairs
    ]
    assert np.abs(made[0] - made[1]).max() > 0
    assert np.abs(made[0] - made[2]).max() > 0
    assert diffusers.DiffusionPipeline.from_pretrained(out).unet.config.time_cond_proj_dim == 32


@pytest.mark.slow
def test_a_lora_loads_in_diffusers(models: Models, tmp_path: Path) -> None:
    inputs = models("text-to-image")
    # The layers of the student itself are not scanned, which a LoRA could not find.
    flags = {"use_lora": True, "scan_layers": True, "lora_rank": 3, "lora_alpha": 6.0, "learning_rate": 0.05}
    out = run(lcm, inputs, tmp_path / "run", **OF_LCM, **flags)
    theirs = diffusers.DiffusionPipeline.from_pretrained(inputs.model)
    theirs.load_lora_weights(out)
    theirs.fuse_lora()
    theirs.scheduler = diffusers.LCMScheduler.from_config(
        json.loads((out / "scheduler/scheduler_config.json").read_text())
    )
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    wanted = theirs("a dog", num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="np").images
    ours = Model.from_pretrained(inputs.model, lora=out)
    given = {"steps": 1, "sampler": "lcm", "guidance_scale": 1.0, "latents": noise}
    made = ours("a dog", **given)
    assert np.abs(made - 255 * wanted).max() <= 2
    plain = Model.from_pretrained(inputs.model)("a dog", **given)
    assert np.abs(made.astype(float) - plain).max() > 2
    _, code, command = card_of(out)
    by_card: dict[str, Any] = {}
    exec(code.replace(f'"{inputs.model.name}"', f'"{inputs.model}"'), by_card)
    assert type(by_card["pipeline"].scheduler) is diffusers.LCMScheduler
    assert by_card["image"].size == (SIZE, SIZE)
    assert command[command.index("--lora") + 1] == str(out)


@pytest.mark.parametrize("use_lora", [False, True], ids=["whole", "lora"])
def test_the_grid_that_a_student_is_trained_on_is_the_one_it_is_sampled_on(
    use_lora: bool, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"num_ddim_timesteps": 20, "timestep_scaling_factor": 5.0, "use_lora": use_lora, "lora_rank": 3}
    of_lora = {"lora_alpha": 6.0} if use_lora else {}
    prepared = prepare(lcm, models("text-to-image"), tmp_path / "run", monkeypatch, **OF_LCM, **flags, **of_lora)
    assert prepared.step.keywords["setup"].flags.num_ddim_timesteps == 20
    assert prepared.frozen.schedule.sampling.timestep_scaling == 5
    prepared.export(prepared.state, tmp_path / "student")
    theirs = diffusers.LCMScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    theirs.set_timesteps(20)
    np.testing.assert_array_equal(theirs.timesteps, np.arange(999, 0, -50))
    assert theirs.config.timestep_scaling == 5
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 21"):
        theirs.set_timesteps(21)
    if use_lora:
        (file,) = (tmp_path / "student").glob("*.safetensors")
        with safe_open(file, "np") as opened:
            assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 6


@pytest.mark.slow
def test_a_text_to_image_student_and_another_autoencoder(models: Models, tmp_path: Path) -> None:
    inputs = models("text-to-image")
    vae = diffusers.AutoencoderKL.from_pretrained(inputs.model, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.25
    vae.save_pretrained(tmp_path / "vae")
    flags = {"pretrained_vae_model_name_or_path": str(tmp_path / "vae"), "vae_precision": "fp32", "loss_type": "huber"}
    out = run(lcm, inputs, tmp_path / "run", **OF_LCM, **flags)
    assert type(diffusers.DiffusionPipeline.from_pretrained(out)) is diffusers.LatentConsistencyModelPipeline
    by_card: dict[str, Any] = {}
    exec(card_of(out)[1], by_card)
    assert by_card["image"].size == (SIZE, SIZE)
    assert_same_weights(out / "vae", tmp_path / "vae")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(models: Models, students: Callable[[str], Path], tmp_path: Path) -> None:
    out = students("instruct-pix2pix")
    resumed = {"resume_from_checkpoint": str(out / "checkpoint-1")}
    again = run(lcm_edit, models("instruct-pix2pix"), tmp_path / "run", **OF_STUDENTS, **resumed)
    for name in ("unet", "unet_target"):
        assert_same_weights(again / name, out / name)


@pytest.mark.parametrize(
    ("script", "family", "flags"),
    [
        pytest.param(lcm_edit, "instruct-pix2pix", OF_LCM, marks=pytest.mark.slow),
        (edit, "text-to-image", {}),  # which becomes an editor, and reads the images before edits
    ],
)
def test_cached_latents_train_the_same(
    script: Any, family: str, flags: dict[str, Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, losses = models(family), []
    for cached in (False, True):
        given = {"cache_latents": cached, "cache_dir": str(tmp_path / "cache"), **OF_DATA, **flags}
        prepared = prepare(script, inputs, tmp_path / f"run-{cached}", monkeypatch, **given)
        assert ("vae" in prepared.frozen.params) != cached
        batch = jax.tree.map(jnp.asarray, next(prepared.loader))
        assert ("conditioning_moments" in batch) == cached
        assert ("conditioning" in batch) != cached
        _, metrics = prepared.step(prepared.state, prepared.frozen, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(*losses, rtol=2e-2)


BAD: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "teacher": (lcm_edit, "text-to-image", OF_DATA, r"its UNet has 4 input channels, but an InstructPix2Pix"),
    "editor": (lcm, "instruct-pix2pix", {}, "distill it with train_lcm_distil_instruct_pix2pix_sdxl.py"),
    "distilled": (lcm, "lcm", {}, "so it has been distilled already"),
    "weights": (lcm_edit, "instruct-pix2pix", {**OF_DATA, "w_min": 9.0}, "--w_min 9.0 is not possible"),
    "column": (lcm_edit, "instruct-pix2pix", {}, r"has no column 'edited_image': set --image_column"),
    "image": (
        lcm_edit,
        "instruct-pix2pix",
        {**OF_DATA, "validation_prompt": ("a",), "validation_image": ("nowhere.png",)},
        r"nowhere\.png",
    ),
    "dropout": (edit, "text-to-image", {**OF_DATA, "conditioning_dropout_prob": 0.5}, "--conditioning_dropout_prob"),
    "two guidances": (lcm, "text-to-image", {"w_image_min": 0.0, "w_image_max": 1.0}, "--w_image_min is for Instruct"),
    "baked": (
        lcm,
        "text-to-image",
        {"bake_guidance_scale": 2.0, "bake_image_guidance_scale": 2.0},
        "--bake_image_guidance_scale 2.0 is not possible",
    ),
    "target": (lcm, "text-to-image", {"use_lora": True, "lora_target_modules": ("to_z",)}, "target_modules: to_z"),
}  # fmt: skip


def test_a_grid_or_a_vae_that_is_not_there_is_refused_before_weights_are_loaded(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_weights(monkeypatch)
    of_model = models("text-to-image")
    with pytest.raises(ValueError, match="A distillation grid of 5000 steps is impossible"):
        lcm.main(flags_of(lcm, of_model, tmp_path / "one", **OF_LCM, num_ddim_timesteps=5000))
    with pytest.raises(ValueError, match="There is no folder /nowhere"):
        lcm.main(flags_of(lcm, of_model, tmp_path / "two", **OF_LCM, pretrained_vae_model_name_or_path="/nowhere"))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    script, family, flags, message = BAD[case]
    given = {**({} if script is edit else OF_LCM), **flags}
    args = flags_of(script, models(family), tmp_path / "out", **given)
    monkeypatch.setattr("sys.argv", ["script.py", *as_command(args)])
    with pytest.raises(SystemExit) as ended:
        command_line.run(script.Args, script.main)
    assert re.match(f"error: .*{message}", str(ended.value.code)), ended.value.code
    assert "\n" not in str(ended.value.code)


def test_a_pair_of_two_sizes_is_refused(models: Models, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 6, size=(SIZE, SIZE), condition_size=(SIZE, 2 * SIZE))
    inputs = models("instruct-pix2pix")._replace(data=data)
    with pytest.raises(ValueError, match="does not fit"):
        run(lcm_edit, inputs, tmp_path / "run", **OF_DATA, **OF_LCM)


BASIC = """
  --pretrained_teacher_model="diffusers/sdxl-instructpix2pix" --dataset_name="your/instruct-pix2pix-dataset"
  --output_dir="./output/lcm-sdxl-instruct" --resolution=768 --train_batch_size=4 --gradient_accumulation_steps=4
  --learning_rate=1e-4 --max_train_steps=10000 --validation_steps=500 --checkpointing_steps=500
  --mixed_precision="fp16" --seed=42
"""
ADVANCED = """
  --pretrained_teacher_model="diffusers/sdxl-instructpix2pix" --dataset_name="your/instruct-pix2pix-dataset"
  --output_dir="./output/lcm-sdxl-instruct" --resolution=768 --train_batch_size=2 --gradient_accumulation_steps=8
  --learning_rate=5e-5 --max_train_steps=20000 --num_ddim_timesteps=50 --w_min=3.0 --w_max=15.0 --ema_decay=0.95
  --loss_type="huber" --huber_c=0.001 --mixed_precision="bf16" --gradient_checkpointing
  --enable_xformers_memory_efficient_attention --use_8bit_adam --validation_steps=250
  --val_image_url_or_path="path/to/val_image.jpg" --validation_prompt="make it sunset" --num_validation_images=4
  --checkpointing_steps=500 --checkpoints_total_limit=3 --push_to_hub --hub_model_id="your-username/lcm-sdxl-instruct"
  --report_to="wandb"
"""
OTHERS = """
  --pretrained_teacher_model=m --train_data_dir=d --original_image_column=a --edit_prompt_column=b
  --edited_image_column=c --pretrained_vae_model_name_or_path=v --vae_precision=bf16 --unet_time_cond_proj_dim=128
  --teacher_revision=r --timestep_scaling_factor=5 --cast_teacher_unet --allow_tf32 --dataset_config_name=default
"""


def parse(words: str) -> lcm_edit.Args:
    return tyro.cli(lcm_edit.Args, args=shlex.split(words), use_underscores=True, config=(tyro.conf.DisallowNone,))


def test_the_command_lines_that_users_know() -> None:
    basic, advanced, others = map(parse, (BASIC, ADVANCED, OTHERS))
    assert (basic.w_min, basic.w_max, basic.num_ddim_timesteps, basic.ema_decay) == (3.0, 15.0, 50, 0.95)
    assert (basic.loss_type, basic.huber_c, basic.unet_time_cond_proj_dim) == ("l2", 0.001, 256)
    assert basic.pretrained_model_name_or_path == "diffusers/sdxl-instructpix2pix"
    assert (advanced.loss_type, advanced.use_8bit_adam, advanced.report_to) == ("huber", True, "wandb")
    assert advanced.validation_image == ("path/to/val_image.jpg",)
    assert advanced.validation_prompt == ("make it sunset",)
    columns = (others.conditioning_image_column, others.caption_column, others.image_column)
    assert columns == ("a", "b", "c")
    assert (others.revision, others.vae_precision, others.timestep_scaling_factor) == ("r", "bf16", 5.0)
