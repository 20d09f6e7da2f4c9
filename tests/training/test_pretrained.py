"""What training scripts start from, and the folder that they write."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE, make_pipeline, make_tokenizer
from picture_folders import write_folder

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models import sharding
from codi_jax.pipeline import model as pipelines
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop, pretrained
from codi_jax.training.pretrained import (
    PretrainedFlags,
    load_batches,
    load_pretrained,
    modules_of,
    null_text_of,
    open_training_data,
    save_trained,
    trainable,
    with_controlnet,
)
from codi_jax.training.validation import ValidationFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(PretrainedFlags, loop.LoopFlags):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_pipeline("controlnet", folder).save_pretrained(folder / "model")
    return folder / "model"


def flags_of(model: Path, **flags: Any) -> Flags:
    return Flags(pretrained_model_name_or_path=str(model), **{"resolution": SIZE, **flags})


def load(model: Path, **flags: Any) -> tuple[Flags, DiffusionPipeline]:
    given = flags_of(model, **flags)
    return given, load_pretrained(given, sharding.make_mesh())


def dtypes(tree: Any) -> set[Any]:
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), ours, theirs)


@pytest.fixture(scope="module")
def exact(model: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(model)


def test_training_in_half_precision_starts_from_and_saves_the_whole_numbers(
    model: Path, exact: DiffusionPipeline, tmp_path: Path
):
    """The student starts from the file's float32, not from the teacher's bfloat16; frozen parts stay as they were."""
    flags, pipeline = load(model, mixed_precision="bf16", save_dtype="bfloat16")
    assert dtypes(pipeline.params["unet"]) == {jnp.dtype(jnp.bfloat16)}
    unet = trainable(pipeline, "unet", sharding.make_mesh())
    assert_same(unet, exact.params["unet"])
    save_trained(flags, pipeline, tmp_path, {"unet": (pipeline.modules["unet"], unet)})
    saved = DiffusionPipeline.from_pretrained(tmp_path)
    for name in ("vae", "text_encoder", "controlnet"):
        assert_same(saved.params[name], exact.params[name])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), exact.params["unet"])
    assert_same(saved.params["unet"], rounded)


def test_in_full_precision_nothing_is_read_twice(model: Path):
    _, pipeline = load(model)
    assert trainable(pipeline, "unet", sharding.make_mesh()) is pipeline.params["unet"]


def test_weights_are_loaded_to_the_devices_that_keep_them(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Straight from the file: one device alone may not have the memory for all."""
    placed: list[np.ndarray] = []
    monkeypatch.setattr(sharding, "place", lambda mesh: lambda _, array: [placed.append(array), jnp.array(array)][1])
    _, pipeline = load(model, mixed_precision="bf16")
    everything = [pipeline.params, trainable(pipeline, "unet", sharding.make_mesh())]
    assert len(placed) == len(jax.tree.leaves(everything))
    assert not any(isinstance(array, jax.Array) for array in placed)


def test_what_is_read_again_is_of_the_same_revision(model: Path, monkeypatch: pytest.MonkeyPatch):
    """The ControlNet's is its own, not the model's."""
    flags = flags_of(model, mixed_precision="bf16", revision="one")
    pipeline = load_pretrained(flags, sharding.make_mesh(), model, "two")
    asked: list[Any] = []
    real = pretrained.load_model
    monkeypatch.setattr(pretrained, "load_model", lambda **given: [asked.append(given["revision"]), real(**given)][1])
    for name in ("unet", "controlnet"):
        assert dtypes(trainable(pipeline, name, sharding.make_mesh())) == {jnp.dtype(jnp.float32)}
    assert asked == ["one", "two"]


def test_a_controlnet_can_be_taken_away(model: Path, tmp_path: Path):
    flags, pipeline = load(model)
    without = with_controlnet(pipeline, None)
    assert "controlnet" in pipeline.modules
    assert "controlnet" not in without.modules
    save_trained(flags, without, tmp_path, {})
    assert not (tmp_path / "controlnet").exists()
    assert with_controlnet(without, pipeline.modules["controlnet"]).modules == pipeline.modules


@pytest.mark.parametrize("program", ["generate", "encode"])
def test_programs_are_traced_on_the_mesh_of_their_parameters(
    model: Path, monkeypatch: pytest.MonkeyPatch, program: str
):
    """Or a kernel that XLA cannot split would not know among which devices to split itself."""
    _, pipeline = load(model)
    traced: list[Any] = []

    def trace(*_: Any, **__: Any) -> Any:
        traced.append(jax.sharding.get_abstract_mesh().axis_names)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "_jitted_generate", SimpleNamespace(lower=trace))
    monkeypatch.setattr(pretrained, "posterior", trace)
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: pipeline(["a house"], control_image=picture, steps=1),
        "encode": lambda: pretrained.encoders_of(pipeline, True).images(picture[None]),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[program]()
    assert traced == [("data", "fsdp")]


def test_only_what_is_trained_recomputes_activations(model: Path):
    flags, pipeline = load(model, gradient_checkpointing=True)
    modules = modules_of(pipeline, ("unet",), flags)
    assert modules.unet.remat
    assert not modules.controlnet.remat
    flags = dataclasses.replace(flags, gradient_checkpointing=False)
    assert modules_of(pipeline, ("unet",), flags).unet == pipeline.modules["unet"]


def test_every_unet_scans_its_layers(model: Path):
    flags, pipeline = load(model, scan_layers=True)
    modules = modules_of(pipeline, ("unet",), flags)
    assert modules.unet.scan_layers
    assert modules.controlnet.scan_layers


def test_resolutions_that_the_networks_take(model: Path):
    """Latents of 9 pixels cannot be halved, though the VAE could make them."""
    with pytest.raises(ValueError, match=r"--resolution 36 is not possible: .* takes multiples of 8"):
        load(model, resolution=36)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownFlags(Flags, ValidationFlags):
    validation_sampling_steps: int | tuple[int, ...] = 50


def test_pictures_that_cannot_be_made_are_found_before_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not at the first validation, after hours of training."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(pipelines, "load_model", refuse)
    folder = shutil.copytree(model, tmp_path / "model")

    def refused(steps: int | tuple[int, ...]) -> str:
        shown = ShownFlags(pretrained_model_name_or_path=str(folder), resolution=SIZE, validation_sampling_steps=steps)
        with pytest.raises(ValueError, match="sampl") as caught:
            load_pretrained(shown, sharding.make_mesh())
        return str(caught.value)

    assert refused(1001).startswith("--validation_sampling_steps 1001: steps = 1001: choose 1 to 1000")
    path = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(path.read_text())
    # A teacher that is a student itself is shown in as many steps as it takes, and not refused for not taking 50.
    shown = ShownFlags(pretrained_model_name_or_path=str(folder), resolution=SIZE, validation_sampling_steps=(1, 2))
    for schedule, steps in (
        (NoiseSchedule.from_config(plain), 50),
        (NoiseSchedule.from_config(plain).with_distillation_grid(4), 4),
        (NoiseSchedule.from_config(plain).with_generator_timesteps([399]), 1),
    ):
        path.write_text(json.dumps(schedule.to_config()))
        assert pretrained.steps_of_teacher(schedule) == steps
        with pytest.raises(AssertionError):  # nothing was refused before weights are read
            load_pretrained(shown, sharding.make_mesh())
    path.write_text(json.dumps({**plain, "_class_name": "HeunDiscreteScheduler"}))
    assert "There is no sampler for HeunDiscreteScheduler" in refused((1, 2))
    with pytest.raises(AssertionError):  # where no pictures are made, it is of no matter
        load(folder)


@pytest.mark.parametrize("read", [load, lambda folder: pretrained.pretrained_unet(flags_of(folder))])
def test_a_model_of_another_pipeline_is_named(tmp_path: Path, read: Callable[[Path], Any]):
    """Not the parts that it lacks, which its own scripts do not need."""
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    with pytest.raises(ValueError, match=r"describes a FluxPipeline without unet .*; supported are text-to-image"):
        read(tmp_path)


def test_another_tokenizer(model: Path, tmp_path: Path):
    make_tokenizer(tmp_path / "other")
    _, pipeline = load(model, tokenizer_name=str(tmp_path / "other"))
    assert pipeline.tokenizer_files["tokenizer"][0].parent == tmp_path / "other"
    ids = pipeline.tokenize(["a", ""])["text_encoder"]
    assert ids.shape == (2, pipeline.modules["text_encoder"].config.max_position_embeddings)
    assert null_text_of(pipeline)["null_context"].shape[-1] == pipeline.modules["text_encoder"].config.hidden_size


def test_batches_divide_into_devices_and_passes(model: Path, tmp_path: Path):
    data = write_folder(tmp_path / "data", 8)
    flags, pipeline = load(model, train_data_dir=str(data), train_batch_size=2, gradient_accumulation_steps=3)
    loader = load_batches(flags, pipeline, open_training_data(flags))
    try:
        batch = next(loader)
    finally:
        loader.close()
    assert batch["pixels"].shape == (6, SIZE, SIZE, 3)
    assert batch["input_ids"].keys() == {"text_encoder"}
    flags = dataclasses.replace(flags, train_batch_size=4)
    with pytest.raises(ValueError, match="8 samples, fewer than one batch of 12 takes"):
        load_batches(flags, pipeline, open_training_data(flags))
