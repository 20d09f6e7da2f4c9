"""Pairs of a diffusers pipeline and our model, loaded from the folder that it saved; and what both make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import torch
from folders import SIZE, make_pipeline
from PIL import Image

from codi_jax.pipeline.model import Model

PROMPTS = ["a red cat", "two dogs"]


class Pair(NamedTuple):
    """A diffusers pipeline, and ours, loaded from the folder that it saved."""

    family: str
    theirs: Any
    ours: Model
    folder: Path


Pairs = Callable[[str], Pair]


def load_pair(family: str, scratch: Path) -> Pair:
    theirs = make_pipeline(family, scratch)
    theirs.save_pretrained(scratch / "model")
    return Pair(family, theirs, Model.from_pretrained(scratch / "model"), scratch / "model")


def picture(seed: int) -> Image.Image:
    """A smooth picture: what a VAE sees of noise depends on the last bit."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def images_for(family: str) -> dict[str, Any]:
    """The image arguments of a family, with our names."""
    if "controlnet" in family:
        return {"control_image": [picture(0), picture(1)]}
    if "pix2pix" in family:
        return {"image": [picture(0), picture(1)]}
    if family == "inpainting":
        mask = np.zeros((SIZE, SIZE, 3), np.uint8)
        mask[8:20, 12:] = 255
        return {"image": [picture(0), picture(1)], "mask_image": [Image.fromarray(mask)] * 2}
    return {}


def run_theirs(family: str, pipeline: Any, latents: np.ndarray, **options: Any) -> np.ndarray:
    given = images_for(family)
    if "control_image" in given:
        given["image"] = given.pop("control_image")
    if family == "inpainting":
        given.update(height=SIZE, width=SIZE)
    latents = torch.from_numpy(latents).permute(0, 3, 1, 2)
    out = pipeline(**{"prompt": PROMPTS, "latents": latents, "output_type": "np", **given, **options})
    return (out.images * 255).round().astype(np.uint8)


def latents(height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, height, width, 4), dtype=np.float32)


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 10, "a flat picture proves nothing"
    difference = np.abs(ours.astype(int) - theirs.astype(int)).max()
    assert difference <= 2, f"largest difference {difference} of 255"


# The smallest run: most tests below share this one program, two images in two steps with guidance.
RUN = {"steps": 2, "guidance_scale": 3.0}


def run_ours(ours: Model, **options: Any) -> np.ndarray:
    return ours(**{"prompt": PROMPTS, "latents": latents(), **RUN, **options})


def as_in_folder(pair: Pair) -> Pair:
    """The pair, their pipeline with the scheduler that is in the folder, whatever the tests before did."""
    scheduler_class = getattr(diffusers, pair.ours.sampling.scheduler)
    pair.theirs.scheduler = scheduler_class.from_config(pair.ours.schedule.to_config())
    return pair


def run_both(pair: Pair, ours: dict[str, Any] | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our picture and theirs; ``ours`` are arguments with another name or value in our call."""
    theirs = {"latents": latents(), "num_inference_steps": 2, "guidance_scale": 3.0, **options}
    wanted = run_theirs(pair.family, pair.theirs, **theirs)
    return run_ours(pair.ours, **{**images_for(pair.family), **options, **(ours or {})}), wanted


def same_tree(left: Any, right: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; ``None`` removes one."""
    contents = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in contents.items() if value is not None}))
