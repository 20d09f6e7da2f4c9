"""Small models of every class, as diffusers and transformers save them."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from weight_folders import CLIP, UNET, VAE


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


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.randn(5, 3, 2, 2),
        "half": torch.randn(7).half(),
        "brain.float": torch.randn(4, 6).bfloat16(),
        "double": torch.randn(3).double(),
        "ids": torch.arange(11),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
