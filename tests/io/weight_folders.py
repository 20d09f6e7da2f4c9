"""A small model of each class in a folder, and what tests do with it."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from codi_jax.models.clip_text import CLIPTextModel
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
