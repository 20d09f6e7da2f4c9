"""Models in one file: what diffusers reads of ours, what we read of it, and what is no model."""

import collections
import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from folders import TEXT, make_pipeline
from oracle import make_torch
from published import TINY_SD21

from codi_jax.io.single_file import recognize
from codi_jax.io.state_dict import to_state_dict
from codi_jax.io.weights import load_model
from codi_jax.models.config import WeightsError
from codi_jax.models.original_names import unet_originals, vae_originals
from codi_jax.models.published import UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.model import Model

FAMILIES = ("sd-1.x", "sd-2.x", "instruct-pix2pix", "inpainting", "sdxl")


def make(family: str, scratch: Path) -> Any:
    if family == "sd-1.x":
        return make_pipeline("text-to-image", scratch)
    if family != "sd-2.x":
        return make_pipeline(family, scratch)
    pipeline = make_pipeline("text-to-image", scratch)
    text = {**TEXT, "hidden_act": "gelu"}
    pipeline.register_modules(
        unet=make_torch("unet", {**TINY_SD21, "layers_per_block": 1}, 3),
        text_encoder=make_torch("text_encoder", text, 2),
    )
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make(family, scratch / "parts").save_pretrained(scratch / family)
    return {family: scratch / family for family in FAMILIES}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models in one file, by our writer."""
    scratch = tmp_path_factory.mktemp("files")
    for family, folder in folders.items():
        Model.from_pretrained(folder).save_single_file(scratch / f"{family}.safetensors", metadata={"author": "me"})
    return {family: scratch / f"{family}.safetensors" for family in folders}


def parts_of(family: str) -> Iterator[str]:
    yield from ("unet", "vae", "text_encoder")
    if family == "sdxl":
        yield "text_encoder_2"


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(tensor), err_msg=name, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converts_what_we_write(family: str, folders: dict[str, Path], files: dict[str, Path]):
    """Its own conversion, network by network, gives the very tensors of the folder."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    checkpoint = safetensors.torch.load_file(files[family])
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), dict(pipeline.unet.config))
    assert_same(unet, pipeline.unet.state_dict())
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), dict(pipeline.vae.config))
    assert_same(vae, pipeline.vae.state_dict())
    theirs = {name.removeprefix("text_model."): t for name, t in tensors_of(pipeline.text_encoder).items()}
    if family == "sd-2.x":
        text = single_file_utils.convert_open_clip_checkpoint(pipeline.text_encoder, dict(checkpoint))
    else:
        text = single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint))
    assert_same({name.removeprefix("text_model."): tensor for name, tensor in text.items()}, theirs)
    if family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        second = single_file_utils.convert_open_clip_checkpoint(pipeline.text_encoder_2, dict(checkpoint), prefix)
        assert_same(second, tensors_of(pipeline.text_encoder_2))


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_is_in_the_file(family: str, folders: dict[str, Path], files: dict[str, Path]):
    ours = Model.from_pretrained(files[family], config=folders[family])
    theirs = Model.from_pretrained(folders[family])
    assert ours.networks == theirs.networks
    assert ours.params.keys() == theirs.params.keys() == set(parts_of(family))
    for name, params in theirs.params.items():
        assert_same(dict(to_state_dict(ours.params[name])), dict(to_state_dict(params)))
    again = load_model(**ours.sources["unet"])[1]
    assert_same(dict(to_state_dict(again)), dict(to_state_dict(theirs.params["unet"])))


@pytest.mark.parametrize("family", ["sd-1.x", "sdxl"])
def test_checkpoints_of_pytorch(family: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    """As trainers leave them: halves, averages, schedules and counters besides the model."""
    checkpoint = {name: tensor.half() for name, tensor in safetensors.torch.load_file(files[family]).items()}
    extra = {"betas": torch.ones(3), "model_ema.decay": torch.ones(()), "global_step": torch.tensor(7)}
    prefix = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
    extra[f"{prefix}.transformer.text_model.embeddings.position_ids"] = torch.arange(4)[None]
    torch.save({"state_dict": {**checkpoint, **extra}, "global_step": 7}, tmp_path / "model.ckpt")
    ours = Model.from_pretrained(tmp_path / "model.ckpt", config=folders[family])
    theirs = Model.from_pretrained(folders[family])
    for name, params in theirs.params.items():
        halves = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), params)
        assert_same(dict(to_state_dict(ours.params[name])), dict(to_state_dict(halves)))


class ModelCheckpoint:
    """As PyTorch Lightning's: the checkpoints of Stable Diffusion 1.x have the class as a key."""


@pytest.mark.parametrize("protocol", [2, 4])
def test_checkpoints_of_lightning(
    protocol: int, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ModelCheckpoint, "__module__", module.__name__)
    module.ModelCheckpoint = ModelCheckpoint
    callback = ModelCheckpoint()
    callback.best = torch.tensor(0.5)
    content = {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2",
        "state_dict": safetensors.torch.load_file(files["sd-1.x"]),
        "callbacks": {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": np.float64(0.1), "best": callback}},
        "optimizer_states": [{"state": {0: {"step": 7}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None]}],
        "hyper_parameters": collections.defaultdict(list, names=["a"]),
    }  # fmt: skip
    torch.save(content, tmp_path / "model.ckpt", pickle_protocol=protocol)
    ours = Model.from_pretrained(tmp_path / "model.ckpt", config=folders["sd-1.x"])
    theirs = Model.from_pretrained(folders["sd-1.x"])
    for name, params in theirs.params.items():
        assert_same(dict(to_state_dict(ours.params[name])), dict(to_state_dict(params)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_files_of_few_bits(dtype: torch.dtype, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    few = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(files["sd-1.x"]).items()}
    safetensors.torch.save_file(few, tmp_path / "few.safetensors")
    full = {name: tensor.float() for name, tensor in few.items()}
    safetensors.torch.save_file(full, tmp_path / "full.safetensors")
    ours, wanted = (
        Model.from_pretrained(tmp_path / f"{name}.safetensors", config=folders["sd-1.x"]) for name in ("few", "full")
    )
    for name, params in wanted.params.items():
        assert_same(dict(to_state_dict(ours.params[name])), dict(to_state_dict(params)))


def test_text_encoders_of_early_files(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    """Without the level "text_model"."""
    checkpoint = safetensors.torch.load_file(files["sd-1.x"])
    flat = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in checkpoint.items()}
    safetensors.torch.save_file(flat, tmp_path / "flat.safetensors")
    ours = Model.from_pretrained(tmp_path / "flat.safetensors", config=folders["sd-1.x"])
    theirs = Model.from_pretrained(folders["sd-1.x"])
    assert_same(dict(to_state_dict(ours.params["text_encoder"])), dict(to_state_dict(theirs.params["text_encoder"])))


def test_a_picture_from_one_file_is_that_of_diffusers(folders: dict[str, Path], files: dict[str, Path]):
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(files["sd-1.x"]), config=str(folders["sd-1.x"]), local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    wanted = theirs("a cat", num_inference_steps=2, latents=latents, output_type="np").images
    ours = Model.from_pretrained(files["sd-1.x"], config=folders["sd-1.x"])
    made = ours("a cat", steps=2, latents=noise)
    assert np.abs(made.astype(float) - 255 * wanted).max() <= 1.5


def test_controlnets(tmp_path: Path):
    """Their own conversion of a file with the names of the original code is our folder's network."""
    pipeline = make_pipeline("controlnet", tmp_path / "parts")
    pipeline.controlnet.save_pretrained(tmp_path / "controlnet")
    network, params = load_model(tmp_path / "controlnet")
    originals = unet_originals(network.abstract_params())
    names = {name: each.name for name, each in originals.items()}
    state = pipeline.controlnet.state_dict()
    assert names.keys() == state.keys()
    safetensors.torch.save_file(
        {f"control_model.{names[name]}": tensor.contiguous() for name, tensor in state.items()},
        tmp_path / "control.safetensors",
    )
    _, ours = load_model(tmp_path / "control.safetensors", config=tmp_path / "controlnet")
    assert_same(dict(to_state_dict(ours)), dict(to_state_dict(params)))
    # Names that the converter of diffusers, which knows ControlNets of one size, has in common with the tiny one.
    for ours_name, theirs_name in (
        ("controlnet_mid_block.weight", "middle_block_out.0.weight"),
        ("controlnet_down_blocks.1.bias", "zero_convs.1.0.bias"),
        ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"),
        ("controlnet_cond_embedding.blocks.1.bias", "input_hint_block.4.bias"),
    ):
        assert names[ours_name] == theirs_name


def test_parts_alone(folders: dict[str, Path], tmp_path: Path):
    """What is written is read again, and by diffusers."""
    pipeline = make_pipeline("controlnet", tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model")
    model = Model.from_pretrained(tmp_path / "model")
    for part in ("unet", "controlnet"):
        file = tmp_path / f"{part}.safetensors"
        model.save_single_file(file, part)
        config = tmp_path / "model" / "controlnet" if part == "controlnet" else tmp_path / "model"
        subfolder = None if part == "controlnet" else part
        _, ours = load_model(file, subfolder, config=config)
        assert_same(dict(to_state_dict(ours)), dict(to_state_dict(model.params[part])))
        with safetensors.safe_open(file, framework="np") as opened:
            assert opened.metadata()["modelspec.architecture"] == f"stable-diffusion-v1/{part}"
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "unet.safetensors"), config=str(tmp_path / "model"), subfolder="unet", local_files_only=True
    )
    assert_same({name: x.numpy() for name, x in theirs.state_dict().items()}, dict(to_state_dict(model.params["unet"])))
    student = Model.from_pretrained(tmp_path / "model", unet=tmp_path / "unet.safetensors")
    assert_same(dict(to_state_dict(student.params["unet"])), dict(to_state_dict(model.params["unet"])))
    with pytest.raises(WeightsError, match="the model has no controlnet, or several: there is nothing to write"):
        Model.open(folders["sd-1.x"]).save_single_file(tmp_path / "none.safetensors", "controlnet")


# ---- What a file says of itself


@pytest.mark.parametrize(
    ("family", "tensors", "metadata", "expected"),
    [
        ("sd-1.x", {}, {}, None),
        ("sd-2.x", {"global_step": torch.tensor(875_000)}, {}, "epsilon"),
        ("sd-2.x", {"global_step": torch.tensor(110_000)}, {}, "v_prediction"),
        ("sd-2.x", {}, {}, None),
        ("sdxl", {"v_pred": torch.zeros(0)}, {}, "v_prediction"),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sdxl", {}, {}, None),
    ],
)
def test_what_the_network_predicts(family, tensors, metadata, expected, folders, files, tmp_path: Path):
    checkpoint = safetensors.torch.load_file(files[family])
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({**checkpoint, **tensors}, file, metadata=metadata)
    assert recognize(file).prediction_type == expected
    model = Model.open(file, config=folders[family])
    assert model.schedule.prediction_type == (expected or "epsilon")


def test_metadata_that_other_programs_read(files: dict[str, Path]):
    with safetensors.safe_open(files["sdxl"], framework="np") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["author"] == "me"
    assert json.loads(json.dumps(metadata)) == metadata


def test_precision_of_the_file(folders: dict[str, Path], tmp_path: Path):
    Model.from_pretrained(folders["sd-1.x"]).save_single_file(tmp_path / "half.safetensors", dtype="float16")
    tensors = safetensors.torch.load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


# ---- What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "is Flux, not a Stable Diffusion"),
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "is Stable Diffusion 3, not"),
        ("clip_txt_mapper.weight", "is Stable Cascade, not"),
        ("conditioner.embedders.0.model.text_projection", "is the SDXL refiner, not"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "is a LoRA: give it to --lora, not"),
        ("encoder.down.0.block.0.conv1.weight", "has none of the names"),
        ("encoder.mid.block_1.conv1.weight", "is an autoencoder alone, not"),
        ("down_blocks.0.resnets.0.conv1.weight", "is a network in diffusers' format: it needs a folder"),
        ("emp_params", "is an embedding of textual inversion, not"),
        ("something", "has none of the names of a Stable Diffusion"),
    ],
)
def test_files_that_are_something_else(name: str, message: str, tmp_path: Path):
    safetensors.torch.save_file({name: torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=message):
        Model.open(tmp_path / "other.safetensors")


def test_the_refiner_of_sdxl(files: dict[str, Path], tmp_path: Path):
    checkpoint = safetensors.torch.load_file(files["sdxl"])
    kept = {name: t for name, t in checkpoint.items() if not name.startswith("conditioner.")}
    kept["conditioner.embedders.0.model.text_projection"] = torch.ones(1)
    safetensors.torch.save_file(kept, tmp_path / "refiner.safetensors")
    with pytest.raises(WeightsError, match="is the SDXL refiner, not"):
        Model.open(tmp_path / "refiner.safetensors")


def test_gguf(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsError, match=r"model\.gguf is GGUF, a format of quantized weights"):
        Model.open(tmp_path / "model.gguf")


def test_files_without_a_part(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    checkpoint = safetensors.torch.load_file(files["sd-1.x"])
    kept = {name: tensor for name, tensor in checkpoint.items() if not name.startswith("first_stage_model.")}
    safetensors.torch.save_file(kept, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match=r"is Stable Diffusion 1\.x without its vae: take a complete version"):
        Model.from_pretrained(tmp_path / "bare.safetensors", config=folders["sd-1.x"])


def test_tensors_that_do_not_belong(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    """One is missing, another is new: nothing is half-loaded."""
    checkpoint = safetensors.torch.load_file(files["sd-1.x"])
    prefix = "model.diffusion_model."
    checkpoint[f"{prefix}new.weight"] = checkpoint.pop(f"{prefix}out.2.bias")
    safetensors.torch.save_file(checkpoint, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)1 missing: conv_out\.bias.*1 unexpected: model\.diffusion_model\.new"):
        Model.from_pretrained(tmp_path / "odd.safetensors", config=folders["sd-1.x"])


def test_a_student_that_takes_its_guidance_as_an_input(tmp_path: Path):
    make_pipeline("lcm", tmp_path / "parts").save_pretrained(tmp_path / "lcm")
    with pytest.raises(WeightsError, match=r"takes its guidance as an input, .* --bake_guidance_scale first"):
        Model.from_pretrained(tmp_path / "lcm").save_single_file(tmp_path / "lcm.safetensors")
    assert not (tmp_path / "lcm.safetensors").exists()


@pytest.mark.parametrize(
    ("network", "config", "count", "digest"),
    [
        (UNet2DCondition, UNetConfig.from_dict(UNETS["sd-1.5"]), 686, "3422671e7bd3eb47"),
        (UNet2DCondition, UNetConfig.from_dict(UNETS["sdxl-base"]), 1680, "fa772cb99a827a15"),
        (AutoencoderKL, VAEConfig.from_dict(VAE), 248, "007cb2ad4dcb0a88"),
    ],
    ids=["sd-1.5", "sdxl", "vae"],
)
def test_names_of_the_published_models(network: Any, config: Any, count: int, digest: str):
    """At full size, as diffusers' scripts convert_diffusers_to_original_stable_diffusion.py and ..._sdxl.py (0.42) name
    them; the digests are of what these scripts gave."""
    originals = unet_originals if network is UNet2DCondition else vae_originals
    names = {each.name for each in originals(network(config).abstract_params()).values()}
    assert len(names) == count
    assert hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_the_unet_of_another_file(naming: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    """As few-step students are published: a UNet alone, for the rest of a known model."""
    if naming == "diffusers":
        other = tmp_path / "student_unet.safetensors"
        halved = {
            name: tensor / 2
            for name, tensor in diffusers.UNet2DConditionModel.from_pretrained(folders["sd-1.x"], subfolder="unet")
            .state_dict()
            .items()
        }
        safetensors.torch.save_file(halved, other)
    else:
        checkpoint = safetensors.torch.load_file(files["sd-1.x"])
        other = tmp_path / "original_unet.safetensors"
        halved = {name: t / 2 for name, t in checkpoint.items() if name.startswith("model.diffusion_model.")}
        safetensors.torch.save_file(halved, other)
    ours, base = (Model.from_pretrained(folders["sd-1.x"], unet=unet) for unet in (other, None))
    wanted = jax.tree.map(lambda leaf: leaf / 2, base.params["unet"])
    assert_same(dict(to_state_dict(ours.params["unet"])), dict(to_state_dict(wanted)))
    assert_same(dict(to_state_dict(ours.params["vae"])), dict(to_state_dict(base.params["vae"])))
    with pytest.raises(WeightsError, match="There is no weight file"):
        Model.from_pretrained(folders["sd-1.x"], unet=tmp_path / "missing.safetensors")
