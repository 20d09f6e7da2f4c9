"""What a run shows while it trains: which samples, and what is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import UInt8

from codi_jax.data import load_data, open_data
from codi_jax.flags import Flags, Operational
from codi_jax.images import open_image, to_pixels
from codi_jax.models.config import Params
from codi_jax.pipeline import DiffusionPipeline


@dataclass(frozen=True)
class ValidationFlags(Flags):
    """Flags about validation pictures."""

    validation_data_dir: Operational[str | None] = None
    """Folder of samples to show that are not trained on, like --train_data_dir. If left out: training samples."""
    validation_prompt: Operational[tuple[str, ...]] = ()
    """Prompts to show instead of samples of the data."""
    validation_image: Operational[
        Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--val_image_url_or_path", "--val_image_url"])]
    ] = ()
    """Condition images (files or URLs) for these prompts, or images to edit: one for all, or one for each."""
    num_validation_images: Operational[int] = 8
    """Samples in a validation picture."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_validation_images")
        if self.validation_image and len(self.validation_image) not in (1, len(self.validation_prompt)):
            raise ValueError(
                f"--validation_image has {len(self.validation_image)} images and --validation_prompt "
                f"{len(self.validation_prompt)} prompts: give one image, or one for each prompt."
            )


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

    Args:
      flags: `codi_jax.data.DataFlags` and `ValidationFlags`.
      condition: see `codi_jax.data.load_data`.
      has_images: whether the training data has images; that of ``validation_data_dir`` always does.

    Raises:
      ValueError: if data or images cannot be read, or prompts lack the condition images that the task has.
    """
    if not flags.validation_prompt:
        return held_out(flags, flags.num_validation_images, condition, has_images=has_images)
    if condition is not None and not flags.validation_image:
        raise ValueError(
            "--validation_prompt needs --validation_image here: a condition image for all, or one for each."
        )
    prompts, size = list(flags.validation_prompt), (flags.resolution, flags.resolution)
    if not flags.validation_image:
        return Samples(prompts, flags.resolution)
    images = [to_pixels(open_image(source), size) for source in flags.validation_image]
    images = images * len(prompts) if len(images) == 1 else images
    return Samples(prompts, flags.resolution, conditions=np.round(np.stack(images) * 255).astype(np.uint8))


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

    Args:
      pipeline: as it was loaded.
      params: those that are trained, by the name of the network.
      samples: prompts and conditions.
      options: of the pipeline's call, such as ``steps``.
    """
    original = pipeline.params
    pipeline.params = {**original, **params}
    try:
        images = {}
        if pipeline.task == "edit":
            images["image"] = samples.conditions
        elif "controlnet" in pipeline.modules:
            images["control_image"] = samples.conditions
        return pipeline(samples.prompts, **images, height=samples.resolution, width=samples.resolution, **options)
    finally:
        pipeline.params = original
