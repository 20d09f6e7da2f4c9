"""Encodes a complete data set once, for training runs with --cache_latents and otherwise the same flags.

    python3 dataset_tools/cache_latents.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir data/coyo --resolution 512 --center_crop --mixed_precision bf16 --cache_dir cache

Several machines share the work with --num_parts 8 and --part 0 to 7, through a folder that all of them can access; each
may be killed and restarted.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from codi_jax.cli import command_line
from codi_jax.cli.choices import choices_with_aliases
from codi_jax.data import ConditionOf, DataFlags
from codi_jax.data.images import FORMER_CONDITION_NAMES
from codi_jax.data.latent_encoding import Part
from codi_jax.data.load import cache_data, condition_of_task, open_data
from codi_jax.models import sharding
from codi_jax.pipeline.model import Model
from codi_jax.training import optim
from codi_jax.training.batches import encoders_of
from codi_jax.training.flags import ModelFlags

_Task = Literal["none", "column", "edit", "canny", "super_resolution", "inpainting"]


@dataclass(frozen=True, kw_only=True)
class Args(ModelFlags, DataFlags):
    """Encodes images and captions of a data set, and caches them for training runs with the same flags."""

    task: Annotated[_Task, choices_with_aliases(_Task, FORMER_CONDITION_NAMES)] = "none"
    """--task of the training run; none for text to image, column for most ControlNets, edit for InstructPix2Pix (with
    --conditioning_image_column input_image --image_column edited_image --caption_column edit_prompt)."""
    mixed_precision: optim.MixedPrecision = "no"
    """--mixed_precision of the training run, in which the networks compute."""
    train_text_encoder: bool = False
    """The run will train the text encoder: cache the captions' tokens instead of its features."""
    encode_batch_size: int = 16
    """Images or captions encoded at a time."""
    num_parts: int = 1
    """Number of parts that the work is divided into."""
    part: int = 0
    """Index of the part to compute, from 0."""
    fsdp: int = 1
    """Number of devices that the parameters are sharded over, as in training."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_parts", "fsdp")
        self.require_in(1, 4096, "encode_batch_size")
        self.require_in(0, self.num_parts - 1, "part")
        if self.streaming or self.train_shards_path_or_url:
            raise ValueError("a stream cannot be cached: give --train_data_dir or --dataset_name without --streaming.")

    @property
    def condition(self) -> ConditionOf:
        """Where condition images come from."""
        return condition_of_task(self.task)


def main(args: Args) -> None:
    args.check()
    source = open_data(args, batch_size=1, condition=args.condition)
    model = _load_model(args)
    encoders = encoders_of(model, not args.train_text_encoder, conditions_too=args.task == "edit")
    encoders = dataclasses.replace(encoders, batch_size=args.encode_batch_size)
    part = Part(args.part, args.num_parts)
    folder = cache_data(
        args, model.tokenize, source=source, encoders=encoders, condition=args.condition,
        time_ids=model.networks.is_sdxl, part=part,
    )  # fmt: skip
    if folder is None:
        print(f"part {args.part} of {args.num_parts} is done; the last part to finish joins them")
    else:
        print(f"{len(source)} samples are cached in {folder}")


def _load_model(args: Args) -> Model:
    """The networks whose outputs are cached."""
    source = args.pretrained_model_name_or_path
    networks = Model.open(source, revision=args.revision, cache_dir=args.cache_dir).networks
    multiple = networks.vae.config.downscale * 2 ** (networks.unet.config.num_blocks - 1)
    args.check_resolution(multiple, f"the model {source}")
    return Model.from_pretrained(
        source,
        without_params=["unet"],
        dtype=optim.compute_dtype(args.mixed_precision),
        attention=args.attention,
        tokenizer=args.tokenizer_name,
        place=sharding.place(sharding.make_mesh(args.fsdp)),
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )


if __name__ == "__main__":
    command_line.run(Args, main)
