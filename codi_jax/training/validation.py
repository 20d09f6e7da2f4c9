"""What a run shows during training: which samples, and the images generated for them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from codi_jax.data import load_data, open_data
from codi_jax.io.images import open_image, to_pixels
from codi_jax.models.config import Params
from codi_jax.pipeline.model import Model
from codi_jax.training.flags import RunFlags

Item = TypeVar("Item")

_AT_A_TIME = 8  # images per batch


@dataclass(frozen=True)
class Samples:
    """The samples to show.

    Attributes:
      prompts: n prompts.
      resolution: the side of the images to generate.
      pictures: the ground truth, if there is one.
      conditions: condition images, or images to edit, if the task has them.
    """

    prompts: list[str]
    resolution: int
    pictures: UInt8[np.ndarray, "n h w 3"] | None = None
    conditions: UInt8[np.ndarray, "n h w 3"] | None = None


def validation_samples(flags: RunFlags) -> Samples:
    """The samples that the flags ask for: the user's prompts, else a data set's, the same in every run.

    Prompts and images are paired as in diffusers' ``train_controlnet.py``, and each pair appears
    ``num_validation_images`` times, each with its own noise.

    Args:
      flags: the run's flags.

    Raises:
      ValueError: if data or images cannot be read, or if condition images are missing for a task that needs them or
        given for one that does not.
    """
    if not flags.validation_prompt:
        return held_out(flags, flags.num_validation_images)
    condition = flags.condition
    if condition is not None and not flags.validation_image:
        raise ValueError(
            "--validation_prompt needs --validation_image here: a condition image for all, or one for each."
        )
    if condition is None and flags.validation_image:
        raise ValueError("--validation_image has no place here: this training has no condition images.")
    count, pairs = flags.num_validation_images, max(len(flags.validation_prompt), len(flags.validation_image))
    prompts = _repeated(flags.validation_prompt, pairs, count)
    if not flags.validation_image:
        return Samples(prompts, flags.resolution)
    pixels = [to_pixels(open_image(source), (flags.resolution, flags.resolution)) for source in flags.validation_image]
    images = [np.round(image * 255).astype(np.uint8) for image in pixels]
    return Samples(prompts, flags.resolution, conditions=np.stack(_repeated(images, pairs, count)))


def _repeated(items: Sequence[Item], pairs: int, count: int) -> list[Item]:
    """One per pair, or one for all of them, each repeated ``count`` times in a row."""
    of_pairs = items if len(items) == pairs else [*items] * pairs
    return [item for item in of_pairs for _ in range(count)]


def held_out(flags: RunFlags, count: int, *, has_text: bool = True) -> Samples:
    """The first samples of the shuffled validation data, without augmentation; all of them if there are fewer.

    Args:
      flags: the run's flags; the data in ``validation_data_dir`` always has images.
      count: how many.
      has_text: whether the data has captions; otherwise prompts are empty.

    Raises:
      ValueError: as in `codi_jax.data.load_data`.
    """
    condition, has_images = flags.condition, flags.reads_images
    flags = replace(
        flags,
        random_flip=False,
        center_crop=True,
        proportion_empty_prompts=0.0,
        cache_latents=False,
        dataloader_num_workers=0,
    )
    if flags.validation_data_dir is not None:
        others: dict[str, Any] = dict.fromkeys((*flags.sources, "max_train_samples"))
        flags = replace(flags, **{**others, "train_data_dir": flags.validation_data_dir})
        has_images = True
    captions: list[str] = []

    def keep(texts: list[str]) -> dict[str, Any]:
        captions.extend(texts)
        return {}

    try:
        source = open_data(flags, batch_size=1, condition=condition, has_text=has_text, has_images=has_images)
        tokenize = keep if has_text else None
        loader = load_data(flags, tokenize, batch_size=1, seed=0, condition=condition, source=source)
    except ValueError as error:
        if flags.validation_data_dir is None:
            raise
        raise ValueError(str(error).replace("--train_data_dir", "--validation_data_dir")) from error
    count = min(count, loader.samples_per_epoch or count)
    try:
        rows = [next(loader) for _ in range(count)]
    finally:
        loader.close()
    batch = {
        name: np.concatenate([row[name] for row in rows]) for name in ("pixels", "conditioning") if name in rows[0]
    }
    prompts = captions[:count] if has_text else [""] * count
    return Samples(prompts, flags.resolution, batch.get("pixels"), batch.get("conditioning"))


def generate_with(
    model: Model, params: Mapping[str, Params], samples: Samples, **options: Any
) -> UInt8[np.ndarray, "n h w 3"]:
    """The model's images for the samples, with some of its parameters replaced; compiled once.

    A few at a time, since training leaves little memory. Image i has seed i, whatever the batch.

    Args:
      model: the model, with its other parameters.
      params: the trained parameters, by network name.
      samples: prompts and conditions.
      options: arguments of the model's call, such as ``steps``.
    """
    model = model.with_params(params)
    size = {"height": samples.resolution, "width": samples.resolution}
    has_control = model.networks.controlnet is not None
    name = "image" if model.task == "edit" else "control_image" if has_control else None
    made = []
    for start, batch in _batches(samples):
        images = {} if name is None else {name: batch.conditions}
        seed = {"seed": start} if start else {}
        made.append(model(batch.prompts, **images, **size, **seed, **options))
    return np.concatenate(made)[: len(samples.prompts)]


def _batches(samples: Samples) -> Iterator[tuple[int, Samples]]:
    """Where each batch begins, and its samples: all have one size; the last is padded with the last sample."""
    count = len(samples.prompts)
    if count <= _AT_A_TIME:
        yield 0, samples
        return
    size = math.ceil(count / math.ceil(count / _AT_A_TIME))
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        conditions = None if samples.conditions is None else samples.conditions[rows]
        yield start, Samples([samples.prompts[row] for row in rows], samples.resolution, conditions=conditions)
