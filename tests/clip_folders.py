"""Small CLIP models as transformers writes them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

ASSETS = Path(__file__).resolve().parents[1] / "assets"
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24}


def randomized(model: Any) -> Any:
    """A model none of whose parameters is zero, one, or so small that it would not be missed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and (("norm" in name and name.endswith("weight")) or "lambda" in name)
        parameter.data = 1 + 0.2 * noise if is_scale else 0.2 * noise
    return model.eval()


def write_clip(folder: Path, **text: Any) -> CLIPModel:
    """A small CLIP with the vocabulary of the embedded models."""
    tokens = {"vocab_size": 864, "bos_token_id": 862, "eos_token_id": 863, "max_position_embeddings": 40}
    config = CLIPConfig(
        text_config={**LAYERS, "intermediate_size": 40, **tokens, **text},
        vision_config={**LAYERS, "intermediate_size": 32, "image_size": 32, "patch_size": 8, **text},
        projection_dim=20,
    )
    model = randomized(CLIPModel(config))
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    for file in (ASSETS / "avatars" / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return model
