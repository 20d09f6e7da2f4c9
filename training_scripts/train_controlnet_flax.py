"""Trains a ControlNet: a Stable Diffusion model learns to follow condition images, and stays as it is without them.

python3 training_scripts/train_controlnet_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/controlnet
"""

from dataclasses import dataclass

import jax

from codi_jax.cli import command_line
from codi_jax.data import DataFlags
from codi_jax.models import sharding
from codi_jax.pipeline.conditions import add_controlnet, init_controlnet
from codi_jax.training import loop
from codi_jax.training.denoising_training import DenoisingTrainingFlags, denoise
from codi_jax.training.pretrained import (
    ConditionFlags,
    load_batches,
    load_pretrained,
    modules_of,
    open_training_data,
    trainable,
    with_controlnet,
)
from codi_jax.training.validation import validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(DenoisingTrainingFlags, ConditionFlags, DataFlags):
    """Trains a ControlNet on a frozen text-to-image model."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet to go on training. If left out: a new one, a copy of the UNet's encoder."""


def main(args: Args) -> None:
    args = loop.start(args)
    data = open_training_data(args, args.condition)
    samples = validation_samples(args, args.condition)
    mesh = sharding.make_mesh(args.fsdp)
    pipeline = load_pretrained(args, mesh, args.controlnet_model_name_or_path)
    loader = load_batches(args, pipeline, data, args.condition)
    if "controlnet" in pipeline.modules:
        pipeline.params["controlnet"] = trainable(pipeline, "controlnet", mesh)
    else:
        modules = add_controlnet(modules_of(pipeline, (), args))
        pipeline = with_controlnet(pipeline, modules.controlnet)
        key = jax.random.fold_in(jax.random.key(args.seed), 0)
        pipeline.params["controlnet"] = init_controlnet(modules, trainable(pipeline, "unet", mesh), key)
    denoise(args, pipeline, ["controlnet"], loader, samples, mesh)


if __name__ == "__main__":
    command_line.run(Args, main)
