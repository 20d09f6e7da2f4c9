"""Loading: precision, variants, and folders that cannot be loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import SD_UNET
from oracle import make_torch, to_params
from pairs import Pairs, edit_json, run_ours

from codi_jax.models.config import ConfigError, WeightsError
from codi_jax.pipeline.model import Model


def test_bfloat16_stays_near_float32(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    half = Model.from_pretrained(pair.folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    difference = np.abs(run_ours(half).astype(int) - run_ours(pair.ours)).mean()
    assert 0 < difference < 4, f"mean difference {difference} of 255"


def test_a_variant_is_that_of_the_parts_that_have_it(pairs: Pairs, tmp_path: Path) -> None:
    """A ControlNet's own folder included; parts without it have their plain files read."""
    pair = pairs("controlnet")
    shutil.copytree(pair.folder, tmp_path / "model")
    shutil.move(tmp_path / "model" / "controlnet", tmp_path / "controlnet")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    del index["controlnet"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    kinds = {"model/unet": diffusers.UNet2DConditionModel, "controlnet": diffusers.ControlNetModel}
    for name, kind in kinds.items():
        half = kind.from_pretrained(tmp_path / name, torch_dtype=torch.float16)
        for plain in (tmp_path / name).glob("*.safetensors"):
            plain.unlink()
        half.save_pretrained(tmp_path / name, variant="fp16")
    with pytest.warns(UserWarning, match=r"model/vae has no weights of variant 'fp16'"):
        ours = Model.from_pretrained(tmp_path / "model", tmp_path / "controlnet", variant="fp16")
    assert ours.sources["controlnet"]["variant"] == "fp16"
    for name, params in ours.params.items():
        halved = name in ("unet", "controlnet")
        wanted = jax.tree.map(lambda x: x.astype(np.float16).astype(x.dtype) if halved else x, pair.ours.params[name])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, params, wanted)


@pytest.mark.slow
def test_float16_on_a_cpu_stays_near_float32(pairs: Pairs) -> None:
    pair = pairs("sdxl")
    half = Model.from_pretrained(pair.folder, dtype=jnp.float16)
    made, wanted = run_ours(half), run_ours(pair.ours)
    assert np.abs(made.astype(int) - wanted).max() <= 8


def test_float16_leaves_a_vae_that_would_overflow_in_float32(pairs: Pairs, tmp_path: Path) -> None:
    shutil.copytree(pairs("text-to-image").folder, tmp_path, dirs_exist_ok=True)
    wanted = {"force_upcast": jnp.float32, "no force_upcast": jnp.float16}
    for case, dtype in wanted.items():
        edit_json(tmp_path / "vae" / "config.json", force_upcast=case == "force_upcast")
        half = Model.from_pretrained(tmp_path, dtype=jnp.float16)
        assert half.networks.vae.dtype == dtype
        for name, params in half.params.items():
            stored = {leaf.dtype for leaf in jax.tree.leaves(params)}
            assert stored == {jnp.dtype(dtype if name == "vae" else jnp.float16)}


# ---- Bad folders


def save_unet_with_five_channels(folder: Path) -> None:
    make_torch("unet", {**SD_UNET, "in_channels": 5}).save_pretrained(folder / "unet")


def write_nan(folder: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.conv_in.bias.data[3] = float("nan")
    pipeline.unet.save_pretrained(folder / "unet")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "There is no folder .*model"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), r"There is no model_index\.json in .*model: it holds"),
    "broken-index": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not valid JSON"),
    "no-unet": (lambda f: shutil.rmtree(f / "unet"), r"There is no config\.json in .*model/unet: .*model holds "),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), r"There is no config\.json in .*model/vae"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"There is no vocab\.json with merges\.txt"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"There is no scheduler_config\.json"),
    "no-weights": (
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "model/unet has no weights",
    ),
    "flux": (
        lambda f: (f / "model_index.json").write_text(
            '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
        ),
        "describes a FluxPipeline without unet and vae and text_encoder and tokenizer: it is not a Stable .*; "
        "supported are text-to-image, InstructPix2Pix, inpainting and ControlNet pipelines of Stable Diffusion",
    ),
    "kolors": (
        lambda f: edit_json(
            f / "model_index.json", _class_name="KolorsPipeline", text_encoder=["kolors", "ChatGLMModel"]
        ),
        "describes a KolorsPipeline whose text_encoder is ChatGLMModel, not CLIPTextModel or .*; supported are",
    ),
    "t2i-adapter": (
        lambda f: edit_json(
            f / "model_index.json",
            _class_name="StableDiffusionAdapterPipeline",
            adapter=["diffusers", "T2IAdapter"],
            image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        ),
        r"describes a StableDiffusionAdapterPipeline with adapter \(T2IAdapter\), which codi_jax does not read",
    ),
    "refiner": (
        lambda f: edit_json(f / "model_index.json", text_encoder=[None, None], tokenizer=[None, None]),
        "without text_encoder and tokenizer",
    ),
    "scheduler": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        r"scheduler_config\.json.*FlowMatchEulerDiscreteScheduler",
    ),
    "five-channels": (save_unet_with_five_channels, "in_channels = 5; with this VAE codi_jax can sample models with 4"),
    "nan": (write_nan, "conv_in.bias holds NaN or infinity"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(pairs: Pairs, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    shutil.copytree(pairs("text-to-image").folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        Model.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_bad_controlnets(pairs: Pairs, tmp_path: Path) -> None:
    model = pairs("text-to-image").folder
    with pytest.raises(WeightsError, match="unet is a UNet2DCondition, not a ControlNet"):
        Model.from_pretrained(model, model / "unet")
    with pytest.raises(WeightsError, match=r"There is no config\.json in .*model/controlnet: .*model holds"):
        Model.from_pretrained(model, model)
    with pytest.raises(WeightsError, match=r"There is no folder .*nowhere"):
        Model.from_pretrained(model, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"the ControlNet has block_out_channels = .* made for this model's family"):
        Model.from_pretrained(model, pairs("sdxl-controlnet").folder)
    widened = make_torch("controlnet", {**pairs("controlnet").theirs.controlnet.config, "in_channels": 8})
    widened.save_pretrained(tmp_path / "widened")
    with pytest.raises(ConfigError, match=r"the ControlNet has in_channels = 8, but .* noisy latents, 4 channels"):
        Model.from_pretrained(model, tmp_path / "widened")


@pytest.mark.parametrize("layout", ["its own folder", "a model", "shards", "accelerate"])
def test_the_unet_of_another_folder(pairs: Pairs, tmp_path: Path, layout: str) -> None:
    pair = pairs("text-to-image")
    other = make_torch("unet", dict(pair.theirs.unet.config), 11)
    if layout == "accelerate":
        (tmp_path / "other").mkdir()
        torch.save(other.state_dict(), tmp_path / "other" / "pytorch_model.bin")
    else:
        place = tmp_path / "other" / ("unet" if layout == "a model" else "")
        other.save_pretrained(place, max_shard_size="100KB" if layout == "shards" else "1GB")
        if layout == "shards":  # and without a configuration: the model's own is meant
            assert len(list(place.glob("*.safetensors"))) > 2
            (place / "config.json").unlink()
    ours = Model.from_pretrained(pair.folder, unet=tmp_path / "other")
    wanted = pair.ours.with_params({"unet": to_params(pair.ours.networks.unet, other)})
    jax.tree.map(np.testing.assert_array_equal, ours.params, dict(wanted.params))
    assert Model.open(pair.folder, unet=tmp_path / "other").networks == ours.networks


def test_unets_that_do_not_fit(pairs: Pairs, tmp_path: Path) -> None:
    folder = pairs("text-to-image").folder
    with pytest.raises(ConfigError, match=r"the UNet has cross_attention_dim = .* made for this model's family"):
        Model.open(folder, unet=pairs("sdxl").folder)
    with pytest.raises(WeightsError, match="is a ControlNet, not a UNet"):
        Model.open(folder, unet=pairs("controlnet").folder / "controlnet")
    with pytest.raises(WeightsError, match=r"has no weights, none of diffusion_pytorch_model.safetensors"):
        Model.from_pretrained(folder, unet=tmp_path)
    with pytest.raises(WeightsError, match=r"There is no weight file"):
        Model.open(folder, unet="student.safetensors")
