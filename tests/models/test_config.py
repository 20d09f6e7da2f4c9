"""Configurations that no model has: refused in one sentence, before anything of their size is made."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from diffusers.training_utils import EMAModel
from oracle import make_torch
from published import TINY_CONTROLNETS, TINY_SDXL, TINY_TEXT, TINY_UNETS, TINY_VAE

from codi_jax.io.weights import load_model
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import ConfigError, ModelConfig
from codi_jax.models.controlnet import ControlNet, ControlNetConfig
from codi_jax.models.published import CONTROLNETS, TEXT_ENCODERS, UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig

MODELS: dict[str, tuple[type[ModelConfig], Any, dict[str, Any]]] = {
    "unet": (UNetConfig, UNet2DCondition, {**TINY_SDXL, "layers_per_block": 1, "time_cond_proj_dim": 16}),
    "controlnet": (ControlNetConfig, ControlNet, TINY_CONTROLNETS["sdxl"]),
    "vae": (VAEConfig, AutoencoderKL, TINY_VAE),
    "text_encoder": (CLIPTextConfig, CLIPTextModel, TINY_TEXT),
}


def numeric_fields(kind: str) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(MODELS[kind][0])
        if any(name in str(field.type) for name in ("int", "float"))
    ]


FIELDS = [(kind, name) for kind in MODELS for name in numeric_fields(kind)]


def test_the_fields_are_all_that_hold_numbers():
    """Without this, a field whose annotation is written otherwise would not be tried below."""
    for kind, (config_class, _, mapping) in MODELS.items():
        written = config_class.from_dict(mapping).to_dict()
        numbers = {name for name, value in written.items() if "." in str(value) or _has_number(value)}
        assert numbers <= set(numeric_fields(kind)) | {"downsample_padding", "conv_in_kernel", "conv_out_kernel"}
    assert len(FIELDS) > 50


def _has_number(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize(("kind", "field"), FIELDS)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value, value, value]], ids=["number", "list"])
def test_numbers_that_no_model_has(kind: str, field: str, wrap: Any):
    config_class, _, mapping = MODELS[kind]
    for number in (-4, -1, 10**6 + 1, 10**9, 2**70, 10.0**300, -1e-3, math.inf, math.nan, True, "3"):
        value = wrap(number)
        if (field, value) in (("vocab_size", 10**6 + 1), ("pad_token_id", 10**6 + 1), ("bos_token_id", 10**6 + 1)):
            continue
        with pytest.raises(ConfigError, match=rf"^some/config\.json: .*{field}") as error:
            config_class.from_dict({**mapping, field: value}, "some/config.json")
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unet", {"in_channels": 0}, "in_channels = 0 .* an integer from 1 to 65536"),
        ("unet", {"layers_per_block": 1_000_000}, "layers_per_block = 1000000 .* an integer from 1 to 10"),
        ("unet", {"block_out_channels": [32] * 10**4}, "block_out_channels = .* a list of 1 to 12"),
        ("unet", {"block_out_channels": []}, "block_out_channels"),
        ("unet", {"down_block_types": [], "up_block_types": []}, "down_block_types"),
        ("unet", {"layers_per_block": 10, "transformer_layers_per_block": 64}, "1280 transformer blocks"),
        ("unet", {"sample_size": [64]}, "sample_size = .* a list of 2"),
        ("unet", {"projection_class_embeddings_input_dim": 48}, "no room for the text"),
        ("unet", {"addition_time_embed_dim": 7}, "addition_time_embed_dim = 7 must be even"),
        ("unet", {"time_cond_proj_dim": 15}, "time_cond_proj_dim = 15 must be even"),
        ("unet", {"block_out_channels": [33, 48, 64], "norm_num_groups": 1, "attention_head_dim": 1}, "must be even"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups = 0"),
        ("unet", {"norm_num_groups": 7}, "norm_num_groups = 7"),
        ("unet", {"a" * 10**6: "b" * 10**6}, "the key 'aaa"),
        ("controlnet", {"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels"),
        ("vae", {"norm_num_groups": 7}, "block_out_channels = 16 is not divisible by norm_num_groups = 7"),
        ("vae", {"scaling_factor": 0.0}, "scaling_factor = 0.0"),
        ("text_encoder", {"eos_token_id": 99}, "eos_token_id = 99 is not among vocab_size = 99"),
        ("text_encoder", {"num_attention_heads": 0}, "num_attention_heads = 0"),
    ],
)
def test_configurations_that_make_no_sense(kind: str, changes: dict[str, Any], message: str):
    config_class, _, mapping = MODELS[kind]
    with pytest.raises(ConfigError, match=message) as error:
        config_class.from_dict({**mapping, **changes}, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert len(str(error.value)) < 500


def test_configurations_of_published_models_are_read():
    for config_class, mappings in (
        (UNetConfig, {**UNETS, **TINY_UNETS}),
        (ControlNetConfig, {**CONTROLNETS, **TINY_CONTROLNETS}),
        (VAEConfig, {"vae": VAE, "tiny": TINY_VAE}),
        (CLIPTextConfig, {**TEXT_ENCODERS, "tiny": TINY_TEXT}),
    ):
        for name, mapping in mappings.items():
            config = config_class.from_dict(json.loads(json.dumps(mapping)), name)
            assert config_class.from_dict(json.loads(json.dumps(config.to_dict())), name) == config


def test_a_moving_average_that_diffusers_saved(tmp_path: Path):
    """It writes how it averaged into the configuration of the UNet."""
    unet = make_torch("unet", TINY_UNETS["sd-1.x"], 0)
    average = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)  # pyright: ignore
    average.step(unet.parameters())
    average.save_pretrained(tmp_path / "unet")
    written = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert {"decay", "update_after_step", "optimization_step"} <= written.keys()
    module, _ = load_model(tmp_path, "unet")
    assert module.config == UNetConfig.from_dict(TINY_UNETS["sd-1.x"])
