"""Complete small models as diffusers writes them: the folders that the pipeline tests load."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from oracle import make_torch
from published import TINY_CONTROLNETS, TINY_SD15, TINY_SDXL, TINY_TEXT, TINY_VAE
from transformers import CLIPTokenizer

from codi_jax.io import weights

SIZE = 32
TEXT = {**TINY_TEXT, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
# Two halvings, so that the latents of 32 pixels are 8 x 8, the sample_size of the tiny UNets.
SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DDIM = {**SD_SCHEDULER, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

# Fewer layers than in the tests of the models: here it is compilation that takes the time.
SD_UNET = {**TINY_SD15, "layers_per_block": 1}
XL_UNET = {**TINY_SDXL, "layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]}

# task -> (pipeline class, UNet, is SDXL, has a ControlNet)
FAMILIES: dict[str, tuple[Any, dict[str, Any], bool, bool]] = {
    "text-to-image": (diffusers.StableDiffusionPipeline, SD_UNET, False, False),
    "controlnet": (diffusers.StableDiffusionControlNetPipeline, SD_UNET, False, True),
    "instruct-pix2pix": (diffusers.StableDiffusionInstructPix2PixPipeline, {**SD_UNET, "in_channels": 8}, False, False),
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, {**SD_UNET, "in_channels": 9}, False, False),
    "lcm": (diffusers.LatentConsistencyModelPipeline, {**SD_UNET, "time_cond_proj_dim": 32}, False, False),
    "sdxl": (diffusers.StableDiffusionXLPipeline, XL_UNET, True, False),
    "sdxl-controlnet": (diffusers.StableDiffusionXLControlNetPipeline, XL_UNET, True, True),
    "sdxl-instruct-pix2pix": (
        diffusers.StableDiffusionXLInstructPix2PixPipeline,
        {**XL_UNET, "in_channels": 8},
        True,
        False,
    ),
}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token, 512 of them with the word ends."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    letters = [chr(i) for i in printable] + others
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    length = TEXT["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": length, "tokenizer_class": "CLIPTokenizer"})
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps({
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        })
    )  # fmt: skip
    return CLIPTokenizer.from_pretrained(folder)


def make_pipeline(family: str, scratch: Path, scheduler: Any = None) -> Any:
    """A randomly weighted diffusers pipeline."""
    cls, unet, is_sdxl, has_controlnet = FAMILIES[family]
    tokenizer = make_tokenizer(scratch / "vocabulary")
    if scheduler is None:
        lcm = diffusers.LCMScheduler(**SD_SCHEDULER)
        scheduler = lcm if family == "lcm" else diffusers.DDIMScheduler(**DDIM)
    parts = {
        "vae": make_torch("vae", TINY_VAE, 1),
        "text_encoder": make_torch("text_encoder", TEXT, 2),
        "tokenizer": tokenizer,
        "unet": make_torch("unet", unet, 3),
        "scheduler": scheduler,
    }
    if is_sdxl:
        second = {**TEXT, "hidden_size": 20, "hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"]}
        parts["text_encoder_2"] = make_torch("text_encoder", second, 4)
        parts["tokenizer_2"] = tokenizer
    else:
        parts.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if has_controlnet:
        parts["controlnet"] = make_controlnet(is_sdxl=is_sdxl)
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved_pipeline(family: str, scratch: Path) -> Path:
    """The folder of a family's model in ``scratch``, made once."""
    if not (scratch / family).exists():
        make_pipeline(family, scratch).save_pretrained(scratch / family)
    return scratch / family


def make_controlnet(*, is_sdxl: bool, seed: int = 5) -> Any:
    """A randomly weighted ControlNet for the models here."""
    unet, config = (XL_UNET, TINY_CONTROLNETS["sdxl"]) if is_sdxl else (SD_UNET, TINY_CONTROLNETS["sd-1.x"])
    return make_torch("controlnet", {key: unet.get(key, value) for key, value in config.items()}, seed)


def refuse_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever opens a file of weights fails the test."""

    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} is opened")

    monkeypatch.setattr(weights, "open_weights", refuse)
