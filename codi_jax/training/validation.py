"""What a run shows while it trains: which samples, and what is made of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from jaxtyping import UInt8

from codi_jax.cli.flags import Flags, Operational
from codi_jax.data import load_data, open_data
from codi_jax.io.images import open_image, to_pixels
from codi_jax.models.config import Params
from codi_jax.pipeline.model import DiffusionPipeline

Item = TypeVar("Item")

_AT_A_TIME = 8  # pictures of a batch


@dataclass(frozen=True)
class ValidationFlags(Flags):
    """Flags about validation pictures."""

    validation_data_dir: Operational[str | None] = None
    """Folder of samples to show that are not trained on, like --train_data_dir. Default: training samples."""
    validation_prompt: Operational[tuple[str, ...]] = ()
    """Prompts to show instead of samples of the data."""
    validation_image: Operational[
        Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--val_image_url_or_path", "--val_image_url"])]
    ] = ()
    """Condition images (files or URLs) for these prompts, or images to edit: one for each prompt, one for all prompts,
    or several for one prompt."""
    num_validation_images: Operational[int] = 8
    """Pictures of each prompt of --validation_prompt, or of each prompt with its image; without prompts, the samples of
    the data that are shown."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_validation_images")
        images, prompts = len(self.validation_image), len(self.validation_prompt)
        if images and not prompts:
            raise ValueError('--validation_image needs --validation_prompt: give one, such as "", the empty one.')
        if images != prompts and images > 1 and prompts > 1:
            raise ValueError(
                f"--validation_image has {images} images and --validation_prompt {prompts} prompts: give one of "
                "either, or as many images as prompts."
            )
        if prompts and self.validation_data_dir is not None:
            raise ValueError("--validation_prompt and --validation_data_dir exclude each other: give one of them.")


@dataclass(frozen=True)
class Samples:
    """What is shown.

    Attributes:
      prompts: n of them.
      resolution: side of the pictures to make.
      pictures: the ground truth, if there is one.
      conditions: condition images, or those to edit, if the task has them.
    """

    prompts: list[str]
    resolution: int
    pictures: UInt8[np.ndarray, "n h w 3"] | None = None
    conditions: UInt8[np.ndarray, "n h w 3"] | None = None


def validation_samples(flags: Any, condition: Any = None, *, has_images: bool = True) -> Samples:
    """The samples that the flags ask for: prompts of the user, else of a data set, in every run the same.

    Prompts and images make pairs as in diffusers' ``train_controlnet.py``, and each pair is there
    ``num_validation_images`` times: the noise of each is its own.

    Args:
      flags: `codi_jax.data.DataFlags` and `ValidationFlags`.
      condition: see `codi_jax.data.load_data`.
      has_images: whether the training data has images; that of ``validation_data_dir`` always does.

    Raises:
      ValueError: if data or images cannot be read, or prompts lack the condition images that the task has, or have
        some where it has none.
    """
    if not flags.validation_prompt:
        return held_out(flags, flags.num_validation_images, condition, has_images=has_images)
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
    pixels = [to_pixels(open_image(source), (flags.resolution,) * 2) for source in flags.validation_image]
    images = [np.round(image * 255).astype(np.uint8) for image in pixels]
    return Samples(prompts, flags.resolution, conditions=np.stack(_repeated(images, pairs, count)))


def _repeated(items: Sequence[Item], pairs: int, count: int) -> list[Item]:
    """One for each pair, or one for all of them, each ``count`` times in a row."""
    of_pairs = items if len(items) == pairs else [*items] * pairs
    return [item for item in of_pairs for _ in range(count)]


def held_out(
    flags: Any, count: int, condition: Any = None, *, has_text: bool = True, has_images: bool = True
) -> Samples:
    """The first samples of the shuffled validation data, without augmentation; all of them if there are not so many.

    Args:
      flags: `codi_jax.data.DataFlags` and `ValidationFlags`.
      count: how many.
      condition: see `codi_jax.data.load_data`.
      has_text: whether the data has captions; else prompts are empty.
      has_images: see `validation_samples`.

    Raises:
      ValueError: as `codi_jax.data.load_data`.
    """
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
    pipeline: DiffusionPipeline, params: Mapping[str, Params], samples: Samples, **options: Any
) -> UInt8[np.ndarray, "n h w 3"]:
    """What the pipeline makes of the samples with some of its parameters replaced; compiled once.

    Few at a time, since training leaves little memory. Picture i is that of seed i, whatever the batch.

    Args:
      pipeline: as it was loaded.
      params: those that are trained, by the name of the network.
      samples: prompts and conditions.
      options: of the pipeline's call, such as ``steps``.
    """
    original = pipeline.params
    pipeline.params = {**original, **params}
    size = {"height": samples.resolution, "width": samples.resolution}
    name = "image" if pipeline.task == "edit" else "control_image" if "controlnet" in pipeline.modules else None
    try:
        made = []
        for start, batch in _batches(samples):
            images = {} if name is None else {name: batch.conditions}
            seed = {"seed": start} if start else {}
            made.append(pipeline(batch.prompts, **images, **size, **seed, **options))
        return np.concatenate(made)[: len(samples.prompts)]
    finally:
        pipeline.params = original


def _batches(samples: Samples) -> Iterator[tuple[int, Samples]]:
    """Where each batch begins, and its samples: all have one size, and the last is filled up with the last sample."""
    count = len(samples.prompts)
    if count <= _AT_A_TIME:
        yield 0, samples
        return
    size = math.ceil(count / math.ceil(count / _AT_A_TIME))
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        conditions = None if samples.conditions is None else samples.conditions[rows]
        yield start, Samples([samples.prompts[row] for row in rows], samples.resolution, conditions=conditions)
