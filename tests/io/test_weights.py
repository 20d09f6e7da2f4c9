"""Models out of folders, against diffusers and transformers as the oracle."""

import json
from pathlib import Path

import diffusers
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from weight_folders import CLASSES, PARTS, assert_same, rewrite, state_dict, stem

from codi_jax.io.state_dict import to_state_dict
from codi_jax.io.weights import load_model, save_model
from codi_jax.models.config import ConfigError, WeightsError


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
    with pytest.raises(WeightsError, match="it needs a folder with its config"):
        load_model(copy / "unet" / "weights.safetensors")
    (copy / "empty").mkdir()
    with pytest.raises(WeightsError, match="it is empty"):
        load_model(copy, "empty")
