"""DisBack's script, run as a user runs it, on models of a few channels."""

import dataclasses
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
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
from folders import SIZE, saved_pipeline
from picture_folders import write_folder
from safetensors.numpy import load_file

from codi_jax.pipeline.model import Model
from codi_jax.training import loop, optim, teacher
from training_scripts import train_disback_flax as script

Models = Callable[[str], Path]
PROMPTS = ["a red cat", "b", "a dog", "cd", "e f g", "hhh"]
SCRIPT = Path(script.__file__)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write_folder(folder / "data", len(PROMPTS), size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    return folder


def flags_of(scratch: Path, output_dir: Path, family: str = "text-to-image", **changes: Any) -> dict[str, Any]:
    """A run of both stages: two nodes, then four steps, of which the last two have the teacher as their target."""
    flags = {
        "pretrained_model_name_or_path": str(saved_pipeline(family, scratch)), "output_dir": str(output_dir),
        "train_prompt_path": str(scratch / "prompts.txt"), "resolution": SIZE, "train_batch_size": 2,
        "num_nodes": 2, "degradation_interval": 1, "interval": 1, "dfake_gen_update_ratio": 2, "max_train_steps": 4,
        "learning_rate": 1e-3, "lr_warmup_steps": 0, "real_guidance_scale": 2.0, "logging_steps": 1,
        "report_to": "none", "num_validation_images": 1, "validation_steps": 0, "checkpointing_steps": 2,
    }  # fmt: skip
    if changes.get("train_data_dir"):
        flags["train_prompt_path"] = None
    return {**flags, **changes}


def run(scratch: Path, output_dir: Path, **changes: Any) -> Path:
    script.main(script.Args(**flags_of(scratch, output_dir, **changes)))
    return output_dir


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same(ours: Path, theirs: Path) -> None:
    wanted = weights_of(theirs)
    for name, value in weights_of(ours).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(scratch, tmp_path_factory.mktemp("runs") / "whole", export_steps=2)


def test_both_stages_leave_a_path_and_a_generator(whole: Path, scratch: Path):
    assert sorted(path.name for path in (whole / "path").iterdir()) == ["node_00", "node_01", "path.json"]
    teacher, result = weights_of(saved_pipeline("text-to-image", scratch) / "unet"), weights_of(whole / "unet")
    nodes = [weights_of(whole / "path" / name) for name in ("node_00", "node_01")]
    assert all(any(np.any(x[name] != teacher[name]) for name in teacher) for x in (*nodes, result))
    distances = [sum(np.abs(node[name] - teacher[name]).sum() for name in teacher) for node in nodes]
    assert 0 < distances[0] < distances[1]
    assert_same(whole / "vae", saved_pipeline("text-to-image", scratch) / "vae")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    of_generator = [line["generator_loss"] for line in lines]
    assert [value is None for value in of_generator] == [False, True, False, True]
    assert (whole / "step-2" / "model_index.json").is_file()
    assert next((whole / "validation").rglob("*.png"), None) or any(whole.rglob("*.png"))


def test_diffusers_samples_the_generator_in_one_step(whole: Path, caplog: pytest.LogCaptureFixture):
    """With LCMScheduler and timesteps=[399], as the paper's own model; we find the time in the folder."""
    ours = Model.from_pretrained(whole)
    assert ours.times(1).tolist() == ours.times().tolist() == [399]
    logging.getLogger("diffusers").addHandler(caplog.handler)
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(whole)
    assert not caplog.text
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert isinstance(theirs.scheduler, diffusers.LCMScheduler)
    theirs.set_progress_bar_config(disable=True)
    side = ours.networks.unet.config.sample_size
    noise = np.random.default_rng(0).standard_normal((2, side, side, 4)).astype("f4")
    wanted = theirs(
        PROMPTS[:2], latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), num_inference_steps=1,
        timesteps=[399], guidance_scale=0, height=SIZE, width=SIZE, output_type="np",
    ).images  # fmt: skip
    made = ours(PROMPTS[:2], latents=noise, height=SIZE, width=SIZE)  # steps, times and guidance from the folder
    assert made.std() > 5
    assert np.abs(made.astype(float) - 255 * wanted).max() <= 2


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_the_same(whole: Path, scratch: Path, tmp_path: Path):
    """In both stages: the node of the path that is due is due again. Optimizers, too, or the weights would differ."""
    stopped = shutil.copytree(whole, tmp_path / "whole")
    for name in ("checkpoint-4", "unet", "step-2", "degradation/checkpoint-2", "path"):
        shutil.rmtree(stopped / name)
    (stopped / "model_index.json").unlink()
    shutil.copytree(whole / "path" / "node_00", stopped / "path" / "node_00")  # stage 1 had come so far
    run(scratch, tmp_path / "first", stage="degradation", checkpointing_steps=1)
    shutil.copytree(tmp_path / "first" / "degradation" / "checkpoint-1", stopped / "degradation" / "checkpoint-1")
    script.main(script.Args(**flags_of(scratch, stopped, export_steps=2, resume_from_checkpoint="latest")))
    assert (stopped / "path" / "path.json").read_text() == (whole / "path" / "path.json").read_text()
    assert_same(stopped / "unet", whole / "unet")


@pytest.mark.parametrize("generator_lora", [False, True], ids=["unet", "lora"])
def test_the_target_walks_the_recorded_path_back_to_the_teacher(
    generator_lora: bool, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of three nodes: φ starts as the third, its target is the second, then the first, and at last the teacher."""

    def degrade(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **others: Any) -> None:
        loader.close()
        record = others["record"]
        for n in (1, 2, 3):
            unet = jax.tree.map(lambda x, n=n: x * (1 + n), state.params["unet"])
            record.write(dataclasses.replace(state, params={"unet": unet}), n * record.every)
        others["export"](state, Path(args.output_dir))

    targets: list[float] = []
    of_teacher: list[Any] = []
    load_model = teacher.load_model

    def load(**given: Any) -> Any:
        network, params = load_model(**given)
        if given["subfolder"] == "unet":
            of_teacher.extend(map(weakref.ref, jax.tree.leaves(params)))
        return network, params

    def backtrack(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **_: Any) -> None:
        loader.close()
        gc.collect()
        assert of_teacher
        assert any(leaf() is not None for leaf in of_teacher) == generator_lora, "it is in memory twice"
        assert factor(state.fake.params["unet"]) == 4
        targets.extend(factor(frozen.at(step).target) for step in (*range(12), 1000))
        assert factor(frozen.at(0).params["unet"] if generator_lora else state.generator.params["unet"]) == 1

    def factor(unet: Any) -> float:
        """How many times the teacher it is."""
        ratio = np.asarray(unet["conv_in"]["kernel"]).transpose(3, 2, 0, 1) / whole
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)
        return round(float(ratio.flat[0]), 4)

    whole = weights_of(saved_pipeline("text-to-image", scratch) / "unet")["conv_in.weight"]
    flags = {"generator_lora": generator_lora, "lora_rank": 2, "interval": 2, "max_train_steps": 20}
    monkeypatch.setattr(teacher, "load_model", load)
    for stage, instead in (("degradation", degrade), ("backtracking", backtrack)):
        monkeypatch.setattr(loop, "train", instead)
        run(scratch, tmp_path, stage=stage, num_nodes=3, **flags)
    # An update of the generator in steps 0, 2, 4, …; a node is the target of two.
    assert targets == [3] * 3 + [2] * 4 + [1] * 6


class EnoughError(Exception):
    """Where a test has seen enough of a run."""


def test_each_network_has_its_own_learning_rate(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And its own number of updates, by which it falls: 10 of the generator and 20 of the fake score."""
    handed: list[tuple[Any, Any]] = []

    def take(step: Any, state: Any, frozen: Any, loader: Any, *_: Any, **__: Any) -> None:
        loader.close()
        handed.append((step, state))
        raise EnoughError

    monkeypatch.setattr(loop, "train", take)
    rates = {"generator_lr": 1e-3, "guidance_lr": 4e-3, "lr_scheduler": "linear", "max_train_steps": 20}
    for flags in ({"stage": "backtracking", "path": "none"}, {"stage": "degradation", "num_nodes": 20}):
        with pytest.raises(EnoughError):
            run(scratch, tmp_path, **flags, **rates)
    (backtracking, state), (degradation, of_path) = handed
    optimizers = *backtracking.keywords["optimizer"], degradation.keywords["optimizer"]
    networks = state.generator, state.fake, of_path
    for network, optimizer, (rate, updates) in zip(networks, optimizers, [(1e-3, 10), (4e-3, 20), (4e-3, 20)]):
        assert optim.status(network)["learning_rate"] == np.float32(rate)
        params = {"unet": {"bias": jnp.zeros(3)}}
        opt_state, sizes = optimizer.init(params), []
        for _ in range(3):
            changes, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
            sizes.append(float(-changes["unet"]["bias"][0]))
        # Adam's steps by a constant gradient are as long as the rate.
        np.testing.assert_allclose(sizes, [rate * (1 - i / updates) for i in range(3)], rtol=1e-3)


def test_plain_distribution_matching_has_the_teacher_as_its_target(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = {"stage": "backtracking", "path": "none", "use_ema": True}
    prepared = prepare(scratch, tmp_path, monkeypatch, **flags)
    teacher = weights_of(saved_pipeline("text-to-image", scratch) / "unet")
    assert not isinstance(prepared["frozen"], loop.Moving)
    kernel = prepared["frozen"].target["conv_in"]["kernel"]  # the same at all steps
    np.testing.assert_array_equal(np.asarray(kernel).transpose(3, 2, 0, 1), teacher["conv_in.weight"])
    # What is written is the moving average.
    state = prepared["state"]
    average = jax.tree.map(lambda x: 2 * x, state.generator.ema)
    generator = dataclasses.replace(state.generator, ema=average)
    prepared["export"](dataclasses.replace(state, generator=generator), tmp_path / "exported")
    written = weights_of(tmp_path / "exported" / "unet")
    np.testing.assert_array_equal(written["conv_in.weight"], 2 * teacher["conv_in.weight"])


def prepare(scratch: Path, output_dir: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """What the script hands to the loop; the step is traced for it."""
    handed: dict[str, Any] = {}

    def take(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **others: Any) -> None:
        batch = next(loader)
        loader.close()
        trees = frozen.at(0) if isinstance(frozen, loop.Moving) else frozen
        handed.update(
            others, step=step, batch=batch, frozen=frozen, state=state, result=jax.eval_shape(step, state, trees, batch)
        )

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", take)
        run(scratch, output_dir, **changes)
    return handed


FAMILIES = {
    "sdxl": ("sdxl", {}, {"input_ids", "time_ids"}),
    "controlnet": ("controlnet", {"task": "canny", "controlnet_model_name_or_path": "controlnet"}, None),
    "edit": ("instruct-pix2pix", {"task": "edit"}, None),
    "lora": ("text-to-image", {"generator_lora": True, "lora_rank": 2}, {"input_ids"}),
    "gan": ("text-to-image", {"cls_on_clean_image": True, "gen_cls_loss": True, "diffusion_gan": True}, None),
    "several steps": (
        "text-to-image",
        {"denoising": True, "num_denoising_step": 4, "backward_simulation": True},
        {"input_ids"},
    ),
    "bf16, accumulation": (
        "text-to-image",
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"input_ids"},
    ),
    "fp16, 8-bit Adam": ("text-to-image", {"mixed_precision": "fp16", "use_8bit_adam": True}, {"input_ids"}),
}


QUICK = ("edit", "gan")  # of the others tracing takes as long


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_kind_of_generator(name: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Conditional ones and SDXL, too; images are read only where they are needed."""
    family, flags, batch = FAMILIES[name]
    flags = dict(flags)
    if "controlnet_model_name_or_path" in flags:
        flags["controlnet_model_name_or_path"] = str(saved_pipeline("controlnet", scratch) / "controlnet")
    if name == "gan":  # as the reference is called
        flags |= {"real_image_path": str(scratch / "data")}
    elif batch is None:
        flags["train_data_dir"] = str(scratch / "data")
    prepared = prepare(scratch, tmp_path, monkeypatch, family=family, stage="backtracking", path="none", **flags)
    if batch is None:
        assert "pixels" in prepared["batch"]
    else:
        assert prepared["batch"].keys() == batch
    new, metrics = prepared["result"]
    assert jax.tree.structure(new) == jax.tree.structure(prepared["state"])
    assert {"loss", "generator_loss"} <= metrics.keys()
    if name == "lora":
        assert new.generator.params.keys() == {"unet_lora"}
        prepared["export"](prepared["state"], tmp_path / "exported")
        unet = saved_pipeline(family, scratch) / "unet"
        assert_same(tmp_path / "exported" / "unet", unet)  # a new LoRA changes nothing
        assert (tmp_path / "exported" / "pytorch_lora_weights.safetensors").is_file()
    if name == "gan":
        assert "head" in new.fake.params
        assert "classification" in metrics


# ---- Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "backtracking"}, "holds no finished path .no path.json.: record one with --stage degradation"),
        ({"conditioning_timestep": 1000}, "--conditioning_timestep 1000 is off the model's schedule"),
        ({"path": "none"}, "give --stage backtracking with it"),
        ({"gen_cls_loss": True}, "--gen_cls_loss is of no use without --cls_on_clean_image"),
        ({"cls_on_clean_image": True}, "--train_prompt_path has no images"),
        ({"lora_dropout": 0.1}, "--lora_dropout 0.1 is not possible: it must be 0"),
        ({"num_denoising_step": 4}, "--num_denoising_step is for generators of several steps: give --denoising, too"),
        ({"interval": 0}, "--interval 0 is not possible"),
        ({"min_step_percent": 0.99}, "--min_step_percent 0.99 is not possible: it must be at most"),
        ({"family": "lcm"}, "the teacher takes its guidance as an input .*, so it has been distilled already"),
        ({"family": "inpainting"}, "the task 'inpaint'"),
        ({"family": "instruct-pix2pix"}, "give --task edit"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    changes: dict[str, Any], message: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("this was to be refused before training"))
    with pytest.raises(ValueError, match=message) as error:
        run(scratch, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)


@pytest.fixture
def empty(scratch: Path, tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path / "empty.txt"


def test_an_empty_prompt_file_is_refused(scratch: Path, tmp_path: Path, empty: Path):
    with pytest.raises(ValueError, match=r"empty\.txt is empty: write one prompt per line"):
        run(scratch, tmp_path / "run", train_prompt_path=str(empty))


def test_a_path_of_another_model_and_a_run_that_is_too_short_are_refused(
    whole: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("this was to be refused before training"))
    flags = {"stage": "backtracking", "path": str(whole / "path")}
    other = shutil.copytree(saved_pipeline("text-to-image", scratch), tmp_path / "other")
    shutil.rmtree(other / "unet")
    model = Model.from_pretrained(saved_pipeline("text-to-image", scratch))
    model.with_params({"unet": jax.tree.map(lambda x: 1.01 * x, model.params["unet"])}).save_pretrained(other)
    with pytest.raises(ValueError, match="was recorded for another model"):
        run(scratch, tmp_path / "a", **flags, pretrained_model_name_or_path=str(other))
    with pytest.raises(ValueError, match=r"timesteps = \[399\], and this run has \[299\]"):
        run(scratch, tmp_path / "b", **flags, conditioning_timestep=299)
    with pytest.raises(ValueError, match="--max_train_steps 4 ends before the target is the teacher"):
        run(scratch, tmp_path / "c", **flags, interval=5)


def test_flags_of_the_reference_are_accepted():
    line = (
        "--model_id m --train_iters 7 --batch_size 3 --generator_lr 1e-6 --guidance_lr 2e-6 --min_step_percent 0.02 "
        "--max_step_percent 0.98 --real_guidance_scale 8 --fake_guidance_scale 1.0 --dfake_gen_update_ratio 5 "
        "--conditioning_timestep 399 --cls_on_clean_image --gen_cls_loss --gen_cls_loss_weight 5e-3 "
        "--guidance_cls_loss_weight 1e-2 --diffusion_gan --diffusion_gan_max_timestep 1000 --gan_alone --denoising "
        "--denoising_timestep 1000 --num_denoising_step 4 --denoising_loss_weight 1 --dm_loss_weight 1 "
        "--backward_simulation --generator_lora --lora_rank 64 --lora_alpha 8 --lora_dropout 0 --real_image_path r "
        "--train_prompt_path p --trajectory_dir t --interval 1000 --warmup_step 500 --max_grad_norm 10 --fsdp 1 --sdxl "
        "--output_path o --log_path l --log_iters 50 --wandb_iters 20 --wandb_name n --wandb_entity e --log_loss "
        "--use_fp16 --grid_size 1 --latent_resolution 128 --initialie_generator --start_target_num 24600 --cache_dir c"
    )
    args = tyro.cli(script.Args, args=line.split(), use_underscores=True)
    assert (args.pretrained_model_name_or_path, args.max_train_steps, args.train_batch_size) == ("m", 7, 3)
    assert (args.path, args.real_image_path, args.lr_warmup_steps) == ("t", "r", 500)
    assert (args.output_dir, args.logging_dir, args.checkpointing_steps, args.logging_steps) == ("o", "l", 50, 20)
    assert args.generator_lora
    args.check()


def test_the_generator_may_start_elsewhere(scratch: Path, tmp_path: Path, whole: Path):
    """In both stages: the path leads to its score, and it is what stage 2 trains. Its file is as DMD2's, of PyTorch."""
    start = weights_of(whole / "unet")
    scaled = {name: torch.from_numpy(1.5 * value) for name, value in start.items()}
    (tmp_path / "dmd2").mkdir()
    torch.save(scaled, tmp_path / "dmd2" / "pytorch_model.bin")
    flags = {"generator_ckpt_path": str(tmp_path / "dmd2")}
    run(scratch, tmp_path / "run", **flags, generator_lr=0.0)
    result = weights_of(tmp_path / "run" / "unet")
    for name, value in scaled.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)  # a learning rate of 0 leaves it where it was
    ours, theirs = (weights_of(folder / "path" / "node_00") for folder in (tmp_path / "run", whole))
    assert any(np.any(ours[name] != theirs[name]) for name in ours)  # φ has seen other samples
    with pytest.raises(ValueError, match="was recorded with generator = "):
        run(scratch, tmp_path / "b", stage="backtracking", path=str(tmp_path / "run" / "path"))
    with pytest.raises(ValueError, match="--generator_lora starts as the teacher"):
        run(scratch, tmp_path / "c", **flags, generator_lora=True)
    with pytest.raises(ValueError, match=r"has no weights, none of diffusion_pytorch_model\.safetensors, "):
        run(scratch, tmp_path / "d", generator_ckpt_path=str(tmp_path))


@pytest.mark.slow
def test_devices_split_both_networks(scratch: Path, tmp_path: Path, whole: Path):
    """The same run on two devices with --fsdp 2, through both stages, ends where one device ends."""
    flags = {**flags_of(scratch, tmp_path / "two"), "train_batch_size": 1, "fsdp": 2}
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(SCRIPT.parent.parent)}
    ran = subprocess.run([sys.executable, SCRIPT, *line], check=False, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    ours, theirs = weights_of(tmp_path / "two" / "unet"), weights_of(whole / "unet")
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-3, err_msg=name)
