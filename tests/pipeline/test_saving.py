"""Folders that are saved, as diffusers loads them."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from folders import FAMILIES
from pairs import Pairs, assert_same_picture, latents, run_ours, run_theirs, same_tree

from codi_jax.models.config import WeightsError
from codi_jax.pipeline.model import Model


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_is_saved(pairs: Pairs, family: str, tmp_path: Path) -> None:
    pair = pairs(family)
    pair.ours.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FAMILIES[family][0]
    for name in pair.ours.networks.by_name():
        theirs = getattr(pair.theirs, name).state_dict()
        assert theirs.keys() == (state := getattr(loaded, name).state_dict()).keys()
        assert all(torch.equal(state[key], theirs[key]) for key in theirs)
    if family in ("text-to-image", "sdxl"):
        loaded.set_progress_bar_config(disable=True)
        wanted = run_theirs(family, loaded, latents(), num_inference_steps=2, guidance_scale=3.0)
        assert_same_picture(run_ours(pair.ours), wanted)


# diffusers has no InstructPix2Pix with a ControlNet, and loads the rest.
@pytest.mark.parametrize(
    ("family", "loaded_class"),
    [
        ("instruct-pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline),
        ("inpainting", diffusers.StableDiffusionControlNetInpaintPipeline),
    ],
)
def test_a_controlnet_goes_with_every_task(pairs: Pairs, family: str, loaded_class: type, tmp_path: Path) -> None:
    ours = Model.from_pretrained(pairs(family).folder, pairs("controlnet").folder)
    ours.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is loaded_class
    assert same_tree(Model.from_pretrained(tmp_path).params, ours.params)


def test_a_controlnet_alone_or_in_a_run_folder(pairs: Pairs, tmp_path: Path) -> None:
    model, whole = pairs("text-to-image").folder, pairs("controlnet")
    whole.theirs.controlnet.save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "run" / "controlnet")
    for source in ("alone", "run"):
        ours = Model.from_pretrained(model, tmp_path / source)
        assert same_tree(ours.params, whole.ours.params)
    ours.save_pretrained(tmp_path / "saved")
    assert same_tree(Model.from_pretrained(tmp_path / "saved").params, whole.ours.params)


def test_saving_again_and_over_itself(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("controlnet")
    pair.ours.save_pretrained(tmp_path)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pair.ours.save_pretrained(tmp_path)
    Model.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_a_folder_that_cannot_be_written(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"Could not save .*file"):
        pairs("text-to-image").ours.save_pretrained(tmp_path / "file" / "model")
