"""The batches of a run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from folders import SIZE, saved_pipeline
from picture_folders import write_folder

from codi_jax.pipeline.model import Model
from codi_jax.training.batches import load_batches, open_training_data, unread_networks
from codi_jax.training.flags import TrainingFlags


def test_batches_divide_into_devices_and_passes(tmp_path: Path) -> None:
    """Only tokenizers are needed for them."""
    data, folder = write_folder(tmp_path / "data", 8), saved_pipeline("text-to-image", tmp_path)
    flags = TrainingFlags(
        pretrained_model_name_or_path=str(folder), resolution=SIZE, train_data_dir=str(data), train_batch_size=2,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    model = Model.open(folder)
    loader = load_batches(flags, model, open_training_data(flags))
    try:
        batch = next(loader)
    finally:
        loader.close()
    assert batch["pixels"].shape == (6, SIZE, SIZE, 3)
    assert batch["input_ids"].keys() == {"text_encoder"}
    flags = dataclasses.replace(flags, train_batch_size=4)
    with pytest.raises(ValueError, match="8 samples, fewer than one batch of 12 takes"):
        load_batches(flags, model, open_training_data(flags))


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    [
        ("text-to-image", {"cache_latents": False}, ()),
        ("text-to-image", {}, ("vae", "text_encoder")),
        ("text-to-image", {"caches_text": False}, ("vae",)),
        ("sdxl", {}, ("vae", "text_encoder", "text_encoder_2")),
        ("controlnet", {"condition": "inpainting"}, ("vae", "text_encoder")),  # which a ControlNet takes as pixels
        ("instruct-pix2pix", {"condition": "column"}, ("vae", "text_encoder")),
        ("instruct-pix2pix", {"condition": "inpainting"}, ("text_encoder",)),
        ("inpainting", {"condition": "column"}, ("text_encoder",)),
    ],
)
def test_what_no_step_reads_of_cached_data(
    family: str, flags: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    """The VAE stays where it encodes masks and conditions that are drawn for every sample."""

    class Given(TrainingFlags):
        condition = flags.get("condition")
        caches_text = flags.get("caches_text", True)

    given = Given(pretrained_model_name_or_path="m", cache_latents=flags.get("cache_latents", True))
    networks = Model.open(saved_pipeline(family, tmp_path)).networks
    assert unread_networks(given, networks) == expected
