"""Models in and out of folders, against diffusers and transformers as the oracle."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import flax.serialization
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from codi_jax.io import hub, weights
from codi_jax.io.hub import ModelFolder
from codi_jax.io.state_dict import to_state_dict
from codi_jax.io.weights import load_model, save_model
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.config import ConfigError, WeightsError
from codi_jax.models.controlnet import ControlNet
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parents[2]
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "layers_per_block": 1,
}
VAE = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 8,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
CLASSES = {
    "unet": (UNet2DCondition, diffusers.UNet2DConditionModel),
    "controlnet": (ControlNet, diffusers.ControlNetModel),
    "vae": (AutoencoderKL, diffusers.AutoencoderKL),
    "text_encoder": (CLIPTextModel, transformers.CLIPTextModel),
    "text_encoder_2": (CLIPTextModel, transformers.CLIPTextModelWithProjection),
}
PARTS = pytest.mark.parametrize("part", CLASSES)


@pytest.fixture(scope="module")
def oracles() -> dict[str, torch.nn.Module]:
    """One small model of each class, no weight of it zero or one."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET)
    models = {
        "unet": unet,
        "controlnet": diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
    }
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return models


@pytest.fixture(scope="module")
def pipeline(oracles: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers and transformers write it."""
    folder = tmp_path_factory.mktemp("pipeline")
    for part, model in oracles.items():
        model.save_pretrained(folder / part)
    return folder


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    """The same folder, to be changed."""
    return shutil.copytree(pipeline, tmp_path / "pipeline")


def state_dict(model: torch.nn.Module) -> dict[str, np.ndarray]:
    # transformers 5 has no text_model inside a CLIPTextModel; every earlier version, and the published files, have.
    # Published files have a text_model level, which newer releases of transformers 5 dropped from the plain encoder.
    flat = isinstance(model, transformers.CLIPTextModel) and not hasattr(model, "text_model")
    prefix = "text_model." if flat else ""
    return {prefix + name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def assert_same(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        np.testing.assert_array_equal(np.asarray(actual[name], array.dtype), array, err_msg=name)


def stem(part: str, kind: str) -> str:
    text = {"safetensors": "model", "bin": "pytorch_model", "msgpack": "flax_model"}
    rest = {"msgpack": "diffusion_flax_model"}
    return text[kind] if part.startswith("text") else rest.get(kind, "diffusion_pytorch_model")


def rewrite(folder: Path, part: str, change: Callable[[dict], dict | None], kind: str = "safetensors") -> Path:
    """Replaces the safetensors of a part by another file, of changed tensors."""
    path = folder / part / f"{stem(part, 'safetensors')}.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = change(tensors) or tensors
    path.unlink()
    path = path.with_name(f"{stem(part, kind)}.{kind}")
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)
    return path


@PARTS
def test_loads_what_the_oracle_saved(oracles: dict, pipeline: Path, part: str):
    module, params = load_model(pipeline, part)
    assert isinstance(module, CLASSES[part][0])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), module.abstract_params()
    )
    assert_same(dict(to_state_dict(params)), state_dict(oracles[part]))
    assert_same(dict(to_state_dict(load_model(pipeline / part)[1])), state_dict(oracles[part]))


@PARTS
def test_the_oracle_loads_what_is_saved(oracles: dict, pipeline: Path, part: str, tmp_path: Path):
    save_model(tmp_path, part, *load_model(pipeline, part))
    model, info = CLASSES[part][1].from_pretrained(tmp_path / part, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(state_dict(model), state_dict(oracles[part]))
    written, expected = (json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path, pipeline))
    # How the weights were initialized and in what they were stored is not the network.
    ignored = {"_name_or_path", "transformers_version", "dtype", "initializer_factor", "initializer_range"}
    ignored |= {"attention_dropout"}
    assert {key: value for key, value in expected.items() if key not in ignored} == written
    assert_same(dict(to_state_dict(load_model(tmp_path, part)[1])), state_dict(oracles[part]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(oracles: dict, pipeline: Path, tmp_path: Path, dtype: object):
    module, params = load_model(pipeline, "vae", dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert module.dtype == dtype
    assert load_model(pipeline, "vae", dtype, compute_dtype=jnp.float32)[0].dtype == jnp.float32
    torch_dtype = torch.bfloat16 if dtype == jnp.bfloat16 else torch.float16
    expected = {name: tensor.to(torch_dtype) for name, tensor in oracles["vae"].state_dict().items()}
    save_model(tmp_path, "kept", module, params)
    save_model(tmp_path, "converted", *load_model(pipeline, "vae"), dtype=dtype)
    for folder in ("kept", "converted"):
        tensors = safetensors.torch.load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    wide = load_model(tmp_path, "kept")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_module_options(pipeline: Path):
    module, _ = load_model(pipeline, "unet", attention="xla", remat=True)
    assert (module.attention, module.remat) == ("xla", True)


def test_place(pipeline: Path):
    seen = {}

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        assert array.flags.c_contiguous
        seen[path] = array.shape
        return jnp.zeros(array.shape)

    module, params = load_model(pipeline, "vae", place=place)
    leaves = jax.tree.leaves_with_path(module.abstract_params())
    assert seen == {tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}
    assert not any(leaf.any() for leaf in jax.tree.leaves(params))


@PARTS
@pytest.mark.parametrize("kind", ["bin", "shards", "bin shards"])
def test_other_files_of_the_oracle(oracles: dict, copy: Path, part: str, kind: str):
    if kind == "bin":
        rewrite(copy, part, lambda tensors: tensors, "bin")
    elif kind == "shards" or part.startswith("text"):
        (copy / part / f"{stem(part, 'safetensors')}.safetensors").unlink()
        oracles[part].save_pretrained(copy / part, max_shard_size="10KB")
    else:
        (copy / part / "diffusion_pytorch_model.safetensors").unlink()
        oracles[part].save_pretrained(copy / part, max_shard_size="10KB", safe_serialization=False)
    if kind != "bin":
        assert len(list((copy / part).glob("*-of-*"))) > 1
    assert_same(dict(to_state_dict(load_model(copy, part)[1])), state_dict(oracles[part]))


@PARTS
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_variants(oracles: dict, pipeline: Path, tmp_path: Path, part: str, shard_size: str):
    half = CLASSES[part][1].from_pretrained(pipeline / part, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / part, variant="fp16", max_shard_size=shard_size)
    params = load_model(tmp_path, part, variant="fp16")[1]
    expected = {name: array.astype(np.float16) for name, array in state_dict(oracles[part]).items()}
    assert_same(dict(to_state_dict(params)), expected)
    for variant in (None, "ema"):
        with pytest.raises(WeightsError, match=r"has no weights.*It has the variant fp16: select it with --variant"):
            load_model(tmp_path, part, variant=variant)


def test_a_part_without_the_variant_has_its_plain_file_read(oracles: dict, pipeline: Path):
    with pytest.warns(
        UserWarning, match=r"unet has no weights of variant 'fp16': reading diffusion_pytorch_model\.safe"
    ):
        params = load_model(pipeline, "unet", variant="fp16")[1]
    assert_same(dict(to_state_dict(params)), state_dict(oracles["unet"]))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_of_shards_that_is_none_is_named(oracles: dict, copy: Path, content: str):
    for path in (copy / "unet").glob("diffusion*"):
        path.unlink()
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(
        WeightsError,
        match=r"safetensors\.index\.json .*: download it again",
    ):
        load_model(copy, "unet")


def test_a_configuration_with_a_byte_order_mark_or_nested_without_end(oracles: dict, copy: Path):
    file = copy / "unet" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    load_model(copy, "unet")
    file.write_text('{"a":' * 100_000)
    with pytest.raises(WeightsError, match=r"config\.json is not valid JSON .*: download it again"):
        load_model(copy, "unet")


def test_order_of_files(oracles: dict, copy: Path):
    """All kinds of files at once, each with other values: the best of those that are left is taken."""
    folder = copy / "unet"
    tensors = oracles["unet"].state_dict()
    _, params = load_model(copy, "unet")
    for path in folder.glob("diffusion*"):
        path.unlink()

    def scaled(factor: float) -> dict[str, torch.Tensor]:
        return {name: tensor * factor for name, tensor in tensors.items()}

    def write_index(kind: str, file: str) -> None:
        weight_map = {"weight_map": dict.fromkeys(tensors, file)}
        (folder / f"diffusion_pytorch_model.{kind}.index.json").write_text(json.dumps(weight_map))

    safetensors.torch.save_file(scaled(1), folder / "diffusion_pytorch_model.safetensors")
    safetensors.torch.save_file(scaled(2), folder / "shard.safetensors")
    write_index("safetensors", "shard.safetensors")
    torch.save(scaled(3), folder / "diffusion_pytorch_model.bin")
    torch.save(scaled(4), folder / "shard.bin")
    write_index("bin", "shard.bin")
    tree = jax.tree.map(lambda leaf: np.asarray(leaf) * 5, params)
    (folder / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    for factor, kind in enumerate(("safetensors", "safetensors.index.json", "bin", "bin.index.json", "_"), start=1):
        expected = {name: tensor.numpy() for name, tensor in scaled(factor).items()}
        assert_same(dict(to_state_dict(load_model(copy, "unet")[1])), expected)
        (folder / f"diffusion_pytorch_model.{kind}").unlink(missing_ok=True)


def flax_tree(params: dict, part: str) -> dict:
    """Parameters as the Flax classes of diffusers 0.2 to 0.39 and transformers 4 named them."""
    if part == "vae":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
        return {
            names.get(key, key): flax_tree(leaf, part) if isinstance(leaf, dict) else leaf
            for key, leaf in params.items()
        }
    if part.startswith("text"):
        encoder = params["text_model"]["encoder"]
        layers = {name.removeprefix("layers_"): layer for name, layer in encoder.items()}
        return {**params, "text_model": {**params["text_model"], "encoder": {"layers": layers}}}
    return params


@PARTS
def test_flax_msgpack(oracles: dict, copy: Path, part: str):
    tree = flax_tree(jax.tree.map(np.asarray, load_model(copy, part)[1]), part)
    (copy / part / f"{stem(part, 'safetensors')}.safetensors").unlink()
    (copy / part / f"{stem(part, 'msgpack')}.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    path = copy / part / "config.json"
    config = json.loads(path.read_text())
    if "_class_name" in config:
        config["_class_name"] = f"Flax{config['_class_name']}"
    else:
        config["architectures"] = [f"Flax{config['architectures'][0]}"]
    path.write_text(json.dumps(config))
    module, params = load_model(copy, part)
    assert_same(dict(to_state_dict(params)), state_dict(oracles[part]))
    save_model(copy, "saved", module, params)
    model, info = CLASSES[part][1].from_pretrained(copy / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(state_dict(model), state_dict(oracles[part]))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("is_conv", [False, True])
def test_legacy_vae_attention(oracles: dict, copy: Path, kind: str, is_conv: bool):
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict) -> dict:
        renamed = {}
        for name, tensor in tensors.items():
            new = name
            for modern, old in legacy.items():
                new = new.replace(f"attentions.0.{modern}.", f"attentions.0.{old}.")
            renamed[new] = tensor[:, :, None, None] if is_conv and new != name and tensor.ndim == 2 else tensor
        assert sum("proj_attn" in name for name in renamed) == 4
        return {name: tensor.contiguous() for name, tensor in renamed.items()}

    rewrite(copy, "vae", rename, kind)
    assert_same(dict(to_state_dict(load_model(copy, "vae")[1])), state_dict(oracles["vae"]))
    if not is_conv:  # diffusers agrees
        reference = diffusers.AutoencoderKL.from_pretrained(copy / "vae", use_safetensors=kind == "safetensors")
        assert_same(state_dict(reference), state_dict(oracles["vae"]))


def test_legacy_vae_attention_as_flax_convolution(oracles: dict, copy: Path):
    tree = flax_tree(jax.tree.map(np.asarray, load_model(copy, "vae")[1]), "vae")
    attention = tree["encoder"]["mid_block"]["attentions_0"]
    attention["query"]["kernel"] = attention["query"]["kernel"][None, None]
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    assert_same(dict(to_state_dict(load_model(copy, "vae")[1])), state_dict(oracles["vae"]))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("prefix", [True, False])
def test_text_encoders_of_every_version_of_transformers(oracles: dict, copy: Path, part: str, prefix: bool):
    def rename(tensors: dict) -> dict:
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        tensors["embeddings.position_ids"] = torch.arange(12)[None]
        add = "text_model." if prefix else ""
        return {name if name.startswith("text_") else add + name: tensor for name, tensor in tensors.items()}

    rewrite(copy, part, rename)
    assert_same(dict(to_state_dict(load_model(copy, part)[1])), state_dict(oracles[part]))


def test_text_encoder_config_without_architectures(oracles: dict, copy: Path):
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    assert_same(dict(to_state_dict(load_model(copy, "text_encoder")[1])), state_dict(oracles["text_encoder"]))


def test_mismatches_are_listed(copy: Path):
    def change(tensors: dict) -> None:
        for name in list(tensors):
            if name.startswith("down_blocks.1."):
                tensors["other." + name] = tensors.pop(name)
        tensors["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
        tensors["conv_in.bias"] = torch.zeros(8, dtype=torch.int8)

    path = rewrite(copy, "unet", change)
    with pytest.raises(WeightsError) as error:
        load_model(copy, "unet")
    first, *report = str(error.value).splitlines()
    assert first == f"{path} does not fit its config.json; check that they are from one model:"
    missing, unexpected, shape, kind = report
    assert missing.startswith("  12 missing: down_blocks.1.resnets.0.conv1.bias [16], ")
    assert missing.endswith(" and 2 more")
    assert unexpected.startswith("  12 unexpected: other.down_blocks.1.resnets.0.")
    assert shape == "  1 of another shape: conv_in.weight is [8, 9, 3, 3] instead of [8, 4, 3, 3]"
    assert kind == "  1 not floating: conv_in.bias is int8"


@pytest.mark.parametrize("part", ["unet", "controlnet", "text_encoder_2"])
def test_convolutions_are_no_linear_layers_outside_the_vae(copy: Path, part: str):
    def change(tensors: dict) -> dict:
        return {
            name: tensor[:, :, None, None].contiguous() if ".to_q." in name or "q_proj.weight" in name else tensor
            for name, tensor in tensors.items()
        }

    rewrite(copy, part, change)
    with pytest.raises(WeightsError, match="of another shape"):
        load_model(copy, part)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite(copy: Path, value: float, dtype: torch.dtype):
    def change(tensors: dict) -> dict:
        tensors["quant_conv.bias"][-1] = value
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    path = rewrite(copy, "vae", change)
    with pytest.raises(WeightsError, match=rf"{path}: quant_conv\.bias holds NaN or infinity"):
        load_model(copy, "vae")


def test_values_too_large_for_float16(copy: Path, tmp_path: Path):
    def change(tensors: dict) -> None:
        tensors["quant_conv.weight"][0] = 1e5

    rewrite(copy, "vae", change)
    with pytest.raises(WeightsError, match=r"quant_conv\.weight does not fit into float16; use bfloat16 or float32"):
        load_model(copy, "vae", jnp.float16)
    module, params = load_model(copy, "vae", jnp.bfloat16)
    with pytest.raises(WeightsError, match=r"quant_conv\.weight does not fit into float16; use bfloat16 or float32"):
        save_model(tmp_path / "out", "vae", module, params, dtype=jnp.float16)
    assert not (tmp_path / "out").exists()


def test_configs_of_other_families(copy: Path):
    path = copy / "unet" / "config.json"
    for config, named in (
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "CLIPModel"),
        ({"model_type": "t5"}, "t5"),
        ({}, "no known model"),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=f"{path} describes {named}: a config from another model family"):
            load_model(copy, "unet")
    path.write_text("{")
    with pytest.raises(WeightsError, match=f"{path} is not valid JSON"):
        load_model(copy, "unet")
    path.write_text("[]")
    with pytest.raises(WeightsError, match="holds a JSON list"):
        load_model(copy, "unet")
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "flavour": 1}))
    with pytest.raises(ConfigError, match="flavour"):
        load_model(copy, "unet")


def test_missing_folders_and_files(copy: Path):
    with pytest.raises(WeightsError, match=r"no config\.json in .*/pipeline/unt: .* holds controlnet, .*, unet, vae"):
        load_model(copy, "unt")
    with pytest.raises(WeightsError, match="There is no folder /nowhere/at/all"):
        load_model("/nowhere/at/all", "unet")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "weights.safetensors")
    with pytest.raises(
        WeightsError, match=r"has no weights, none of .*: it holds config\.json, weights\.safetensors\.$"
    ):
        load_model(copy, "unet")
    with pytest.raises(WeightsError, match="is a file; give a folder"):
        load_model(copy / "unet" / "weights.safetensors")
    (copy / "empty").mkdir()
    with pytest.raises(WeightsError, match="it is empty"):
        load_model(copy, "empty")


# The hub


@pytest.fixture
def cache(pipeline: Path, tmp_path: Path) -> Path:
    """A cache as huggingface_hub would have left it, with a UNet's safetensors and a VAE's .bin."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--artist--style"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(pipeline / "unet", snapshot / "unet")
    shutil.copytree(pipeline / "vae", snapshot / "vae")
    rewrite(snapshot, "vae", lambda tensors: tensors, "bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "cache"


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("local_files_only", [True, False])  # HF_HUB_OFFLINE is set for all tests
def test_hub_cache(oracles: dict, cache: Path, part: str, local_files_only: bool):
    _, params = load_model("artist/style", part, cache_dir=cache, local_files_only=local_files_only)
    assert_same(dict(to_state_dict(params)), state_dict(oracles[part]))


@pytest.mark.parametrize("local_files_only", [True, False])
def test_hub_out_of_reach(cache: Path, local_files_only: bool):
    with pytest.raises(
        WeightsError, match=r"no config\.json in artist/style/controlnet: it is not a folder .* the local cache"
    ):
        load_model("artist/style", "controlnet", cache_dir=cache, local_files_only=local_files_only)
    for path in cache.rglob("diffusion_pytorch_model.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match=r"artist/style/unet has no weights of variant 'fp16'.* was not reached"):
        load_model("artist/style", "unet", variant="fp16", cache_dir=cache, local_files_only=local_files_only)


def test_hub_asks_for_one_commit_and_only_what_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repo: str, name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return huggingface_hub.hf_hub_download(repo, name, **options)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    load_model("artist/style", "unet", cache_dir=cache, revision="main")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert asked == [
        ("config.json", "main"),
        ("config.json", commit),  # found in the cache without asking the hub
        ("diffusion_pytorch_model.safetensors", commit),
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "artist/style is neither a folder on this machine nor a public repository"),
        ("GatedRepoError", "artist/style is gated: accept its license at https://huggingface.co/artist/style"),
        ("RevisionNotFoundError", "artist/style has no revision 'v2'"),
        ("XetDownloadError", r"Downloading config\.json of artist/style/unet failed: server on fire"),
        ("EntryNotFoundError", r"no config\.json in artist/style/unet: it holds unet\.txt\."),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: str, message: str):
    def download(*_: object, **__: object) -> str:
        # Without __init__, which wants the response of whichever HTTP client this version of the library has.
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind, "server on fire")

    def names(*_: object, **__: object) -> list[str]:
        return ["README.md", "unet/unet.txt"]

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", names)
    with pytest.raises(WeightsError, match=message) as raised:
        load_model("artist/style", "unet", revision="v2")
    assert "\n" not in str(raised.value)
    if error == "EntryNotFoundError":
        with pytest.raises(WeightsError, match=r"in artist/style/unt: artist/style holds README\.md, unet/unet\.txt\."):
            load_model("artist/style", "unt")


def test_names_on_the_hub_with_shards(cache: Path, oracles: dict):
    snapshot = next((cache / "models--artist--style" / "snapshots").iterdir())
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    oracles["unet"].save_pretrained(snapshot / "unet", max_shard_size="20KB")
    _, params = load_model("artist/style", "unet", cache_dir=cache)
    assert_same(dict(to_state_dict(params)), state_dict(oracles["unet"]))
    next((snapshot / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match="no diffusion_pytorch_model-00002-of-"):
        load_model("artist/style", "unet", cache_dir=cache)


def test_model_folder_reads_other_files(copy: Path):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert ModelFolder(str(copy)).read_json("model_index.json") == {"_class_name": "StableDiffusionPipeline"}
    assert ModelFolder(str(copy)).find("nothing.json") is None
    assert ModelFolder(str(copy), "vae").names() == ["config.json", "diffusion_pytorch_model.safetensors"]


# Saving


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saves_shards_that_the_oracle_loads(oracles: dict, pipeline: Path, tmp_path: Path):
    for part in ("unet", "text_encoder"):
        save_model(tmp_path, part, *load_model(pipeline, part), max_shard_size="20KB")
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
        model, info = CLASSES[part][1].from_pretrained(tmp_path / part, output_loading_info=True)
        assert not any(info.values()), info
        assert_same(state_dict(model), state_dict(oracles[part]))
        assert_same(dict(to_state_dict(load_model(tmp_path, part)[1])), state_dict(oracles[part]))


def test_saves_over_an_earlier_save(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "vae")
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "notes.txt").write_text("mine")
    for tree, size in ((params, 10**9), (other, 20_000), (params, 50_000), (other, 10**9)):
        save_model(tmp_path, "vae", module, tree, max_shard_size=size)
        assert_same(dict(to_state_dict(load_model(tmp_path, "vae")[1])), dict(to_state_dict(tree)))
        model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        assert_same(state_dict(model), dict(to_state_dict(tree)))
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "notes.txt",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_saves_into_the_folder_itself(oracles: dict, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, params = load_model(pipeline, "controlnet")
    monkeypatch.chdir(tmp_path)
    save_model(".", None, module, params)
    save_model("new/one", None, module, params)
    for folder in (".", "new/one"):
        assert_same(dict(to_state_dict(load_model(folder)[1])), state_dict(oracles["controlnet"]))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_is_left(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing, interrupt
):
    module, params = load_model(pipeline, "vae")
    if existing:
        save_model(tmp_path / "out", "vae", module, params)
    before = contents(tmp_path)
    real = weights.write_safetensors
    calls = []

    def fails_at_the_second(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)
        if len(calls) == 2:
            raise interrupt

    monkeypatch.setattr(weights, "write_safetensors", fails_at_the_second)
    expected = WeightsError if isinstance(interrupt, OSError) else interrupt
    with pytest.raises(expected, match="out/vae: No space left on device" if expected is WeightsError else None):
        save_model(tmp_path / "out", "vae", module, params, max_shard_size="20KB")
    assert contents(tmp_path) == before
    assert (tmp_path / "out").exists() == existing
    if existing:
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["vae"]


def test_a_file_system_that_refuses(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "vae")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"Could not save .*vae: File too large"):
            save_model(tmp_path / "out", "vae", module, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"Could not save .*file/vae: Not a directory"):
        save_model(tmp_path / "file", "vae", module, params)


def test_parameters_of_another_model_are_not_saved(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "unet")
    del params["conv_in"]["bias"]
    params["conv_out"]["bias"] = jnp.zeros(7)
    with pytest.raises(
        WeightsError, match=r"(?s)1 missing: conv_in\.bias \[8\].*conv_out\.bias is \[7\] instead of \[4\]"
    ):
        save_model(tmp_path / "out", "unet", module, params)
    assert not (tmp_path / "out").exists()


def run_python(code: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from codi_jax.io.weights import load_model, save_model
mesh = jax.make_mesh((8,), ("fsdp",))
def place(path, array):
    axis = next((i for i, size in enumerate(array.shape) if size % 8 == 0), None)
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
    return jax.device_put(array, NamedSharding(mesh, spec))
module, params = load_model(sys.argv[1], "unet", place=place)
assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params)) > 20
save_model(sys.argv[2], "unet", module, params)
assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params)), "host copies were kept"
"""


def test_sharded_parameters(oracles: dict, pipeline: Path, tmp_path: Path):
    run_python(SHARDED, pipeline, tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert_same(dict(to_state_dict(load_model(tmp_path, "unet")[1])), state_dict(oracles["unet"]))


PEAK = """
import sys, jax
from codi_jax.io.weights import load_model
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
# Tracing the module costs tens of MB whatever the size of the weights: done once before, it is not in the difference.
config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
CLIPTextModel(config).abstract_params()
before = status("VmRSS")
module, params = load_model(sys.argv[1])
assert module.config == config
jax.block_until_ready(params)
print((status("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory(tmp_path: Path, kind: str):
    """SD 1.5's text encoder, 492 MB, a third of it in one tensor: the hardest case there is for a loader."""
    config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.CLIPTextModel(config)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert float(run_python(PEAK, tmp_path)) <= 1.2
