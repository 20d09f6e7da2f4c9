"""CLIP, DINO and LPIPS against transformers, and against the package lpips, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_folders import ASSETS, LAYERS, randomized, write_clip
from records import images, read, weights_of
from transformers import (
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from codi_jax.evaluation.encoders import Clip, dino, lpips_distances
from codi_jax.models.config import ConfigError, WeightsError
from codi_jax.models.lpips import SMALLEST

TEXTS = ["a red heart", "", "two cats and a dog, photographed from far away"]
PICTURES = images(3, 72)[:, :60]  # neither square nor of the networks' size


def unit(vectors: Any) -> np.ndarray:
    array = getattr(vectors, "pooler_output", vectors).detach().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(hidden_act: str, tmp_path: Path) -> None:
    model = write_clip(tmp_path, hidden_act=hidden_act)
    clip = Clip(str(tmp_path), batch_size=2)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(list(PICTURES), return_tensors="pt").pixel_values
    np.testing.assert_allclose(clip.images(PICTURES), unit(model.get_image_features(pixel_values=pixels)), atol=2e-6)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    np.testing.assert_allclose(clip.texts(TEXTS), unit(model.get_text_features(input_ids=ids)), atol=2e-6)


def test_a_clip_as_it_was_published_in_2021_is_read(tmp_path: Path) -> None:
    """A pickle with positions among its tensors, a config full of defaults, and sizes that are single numbers."""
    model = write_clip(tmp_path, eos_token_id=2)
    expected = Clip(str(tmp_path)).images(PICTURES)
    (tmp_path / "model.safetensors").unlink()
    tensors = model.state_dict() | {
        f"{tower}_model.embeddings.position_ids": torch.arange(length)[None]
        for tower, length in (("text", 32), ("vision", 17))
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part] |= {"bad_words_ids": None, "num_beams": 1, "architectures": None, "top_p": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {"crop_size": 32, "size": 36, "resample": 3, "do_resize": True, "do_center_crop": True, "do_normalize": True}
    mean_and_std = json.loads((tmp_path / "preprocessor_config.json").read_text())
    old |= {name: mean_and_std[name] for name in ("image_mean", "image_std")}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(old | {"feature_extractor_type": "CLIPFeatureExtractor"})
    )
    clip = Clip(str(tmp_path))
    np.testing.assert_allclose(clip.images(PICTURES), expected, atol=1e-6)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    np.testing.assert_allclose(clip.texts(TEXTS), unit(model.get_text_features(input_ids=ids)), atol=2e-6)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_dino_equals_transformers(kind: str, tmp_path: Path) -> None:
    if kind == "vit":
        config = ViTConfig(**LAYERS, intermediate_size=40, image_size=32, patch_size=8)
        model, processor = ViTModel(config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    else:
        config = Dinov2Config(**LAYERS, mlp_ratio=2, image_size=32, patch_size=8)
        model = Dinov2Model(config)
        processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    randomized(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pixels = processor(list(PICTURES), return_tensors="pt").pixel_values
    expected = unit(model(pixel_values=pixels).last_hidden_state[:, 0])
    np.testing.assert_allclose(dino(str(tmp_path), batch_size=2)(PICTURES), expected, atol=2e-6)


def write_lpips(backbone: str, folder: Path) -> tuple[Path, Path]:
    """The files of a classifier and of the fitted layers, with the weights that the record was made with."""
    shapes = read("lpips")[backbone]["shapes"]
    tensors = {name: torch.from_numpy(each) for name, each in weights_of(shapes).items()}
    heads = {name: each.abs() for name, each in tensors.items() if name.startswith("lin")}
    torch.save({name: each for name, each in tensors.items() if name not in heads}, folder / "classifier.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "classifier.pth", folder / "heads.pth"


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_equals_its_package(backbone: str, tmp_path: Path) -> None:
    pictures = images(4, 64)
    distances = lpips_distances(*write_lpips(backbone, tmp_path), batch_size=3)
    found = distances(pictures, np.roll(pictures, 1, axis=0))
    np.testing.assert_allclose(found, read("lpips")[backbone]["distances"], rtol=1e-4)
    np.testing.assert_allclose(distances(pictures, pictures), 0, atol=1e-7)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no file none\.pth: give torchvision's alexnet"):
        lpips_distances(Path("none.pth"))
    weights, heads = write_lpips("alex", tmp_path)
    with pytest.raises(WeightsError, match=r"neither AlexNet nor VGG-16 of torchvision: it has no features\.0\."):
        lpips_distances(heads, heads)
    with pytest.raises(WeightsError, match=r"neither AlexNet nor VGG-16 of torchvision: it has no lin0\.model\."):
        lpips_distances(weights, weights)
    with pytest.raises(WeightsError, match="pip install --no-deps lpips, or name the file with --lpips_heads"):
        lpips_distances(weights)
    with pytest.raises(WeightsError, match=r"none\.pth"):
        lpips_distances(weights, Path("none.pth"))
    small = images(2, SMALLEST["alex"] - 1)
    with pytest.raises(ValueError, match="LPIPS of alex needs images of at least 63 pixels"):
        lpips_distances(weights, heads)(small, small)
    with pytest.raises(WeightsError, match="describes 'clip_text_model', not a whole CLIP with both towers"):
        Clip(str(ASSETS / "avatars" / "text_encoder"))
    with pytest.raises(ConfigError, match="model_type = 'clip_text_model' is not supported; only clip, vit and dinov2"):
        dino(str(ASSETS / "avatars" / "text_encoder"))


def test_a_processor_of_another_network_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"gives images of \(224, 224\), but its network takes 32 × 32"):
        Clip(str(tmp_path)).images(PICTURES)
