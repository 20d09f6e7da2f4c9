"""Several ControlNets, and the part of the steps in which they take part, against diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import SIZE, make_controlnet
from pairs import PROMPTS, Pair, Pairs, assert_same_picture, latents, run_theirs, same_tree
from PIL import Image

from codi_jax.pipeline.model import Model
from codi_jax.training.teacher import open_teacher
from training_scripts import train_codi_flax


def noisy(seed: int) -> Image.Image:
    """A condition that the small networks tell from another one, which smooth pictures are not."""
    pixels = np.random.default_rng(seed).integers(0, 2, (SIZE, SIZE, 1), dtype=np.uint8)
    return Image.fromarray(255 * pixels.repeat(3, axis=-1))


CONDITIONS = [[noisy(0), noisy(1)], [noisy(2), noisy(3)]]
BY_PROMPT = [list(each) for each in zip(*CONDITIONS, strict=True)]  # as diffusers takes them
SCALES = (3.0, 5.0)
RUN = {"guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another ControlNet for the same model."""
    folder = tmp_path_factory.mktemp("second")
    make_controlnet(is_sdxl=False, seed=9).save_pretrained(folder)
    return folder


def with_both(pair: Pair, folder: Path) -> tuple[Any, Model]:
    theirs = pair.theirs
    parts = {**theirs.components, "requires_safety_checker": False}
    nets = [parts["controlnet"], diffusers.ControlNetModel.from_pretrained(folder)]
    theirs = type(theirs)(**{**parts, "controlnet": diffusers.MultiControlNetModel(nets)})
    theirs.set_progress_bar_config(disable=True)
    return theirs, Model.from_pretrained(pair.folder, [pair.folder, folder])


def test_two_equal_diffusers(pairs: Pairs, folder: Path) -> None:
    pair = pairs("controlnet")
    theirs, ours = with_both(pair, folder)
    options = {"controlnet_conditioning_scale": list(SCALES), **RUN}
    wanted = run_theirs("text-to-image", theirs, latents(), image=BY_PROMPT, num_inference_steps=2, **options)
    made = ours(PROMPTS, control_image=CONDITIONS, steps=2, latents=latents(), **options)
    assert_same_picture(made, wanted)
    swapped = ours(PROMPTS, control_image=CONDITIONS[::-1], steps=2, latents=latents(), **options)
    assert np.abs(swapped.astype(int) - made).max() > 5


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 1.0), (0.5, 0.75), (0.4, 0.6), (0.0, 0.0)])
def test_a_part_of_the_steps(pairs: Pairs, start: float, end: float) -> None:
    pair = pairs("controlnet")
    options = {"control_guidance_start": start, "control_guidance_end": end, **RUN}
    if start < end:  # diffusers refuses an empty part
        wanted = run_theirs(
            "text-to-image", pair.theirs, latents(), image=CONDITIONS[0], num_inference_steps=4, **options
        )
    else:
        options_of_none = {"controlnet_conditioning_scale": 0.0, **RUN}
        wanted = pair.ours(PROMPTS, control_image=CONDITIONS[0], steps=4, latents=latents(), **options_of_none)
    assert_same_picture(pair.ours(PROMPTS, control_image=CONDITIONS[0], steps=4, latents=latents(), **options), wanted)


def test_each_has_a_part_of_its_own(pairs: Pairs, folder: Path) -> None:
    theirs, ours = with_both(pairs("controlnet"), folder)
    parts = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0], **RUN}
    wanted = run_theirs("text-to-image", theirs, latents(), image=BY_PROMPT, num_inference_steps=4, **parts)
    assert_same_picture(ours(PROMPTS, control_image=CONDITIONS, steps=4, latents=latents(), **parts), wanted)


def test_what_is_not_given_once_or_for_each(pairs: Pairs, folder: Path) -> None:
    pair = pairs("controlnet")
    ours = Model.open(pair.folder, [pair.folder, folder])
    with pytest.raises(ValueError, match="the model has 2 ControlNets: give control_image as a list"):
        ours.check(control_image=noisy(0))
    for name, value, message in (
        ("controlnet_conditioning_scale", (1, 2, 3), "give one number, or one for each of the 2 ControlNets"),
        ("control_guidance_end", 1.5, "must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(PROMPTS, control_image=CONDITIONS, steps=2, **{name: value})


def test_several_are_saved_as_diffusers_saves_them(pairs: Pairs, folder: Path, tmp_path: Path) -> None:
    theirs, ours = with_both(pairs("controlnet"), folder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for place in ("theirs", "ours"):
        assert same_tree(Model.from_pretrained(tmp_path / place).params, ours.params)
        assert Model.open(tmp_path / place).networks == ours.networks
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours").controlnet
    assert isinstance(loaded, diffusers.MultiControlNetModel)
    for net, wanted in zip(loaded.nets, theirs.controlnet.nets, strict=True):
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in net.state_dict().items())


def test_fewer_are_saved_over_more(pairs: Pairs, folder: Path, tmp_path: Path) -> None:
    pair = pairs("controlnet")
    Model.from_pretrained(pair.folder, [pair.folder, folder, folder]).save_pretrained(tmp_path)
    Model.from_pretrained(pair.folder, [folder, pair.folder]).save_pretrained(tmp_path)
    assert len(diffusers.DiffusionPipeline.from_pretrained(tmp_path).controlnet.nets) == 2
    assert len(Model.open(tmp_path).networks.controlnet.nets) == 2


def test_training_takes_one(pairs: Pairs, folder: Path, tmp_path: Path) -> None:
    with_both(pairs("controlnet"), folder)[1].save_pretrained(tmp_path / "model")
    flags = train_codi_flax.Args(pretrained_model_name_or_path=str(tmp_path / "model"), train_data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"has 2 ControlNets, and training takes one: name it with .*model/controlnet"):
        open_teacher(flags)
