"""Trains InstructPix2Pix: a Stable Diffusion model (1.x, 2.x or SDXL) learns to edit images by instruction.

python3 training_scripts/train_instruct_pix2pix_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name timbrooks/instructpix2pix-clip-filtered --original_image_column original_image \
    --resolution 256 --train_batch_size 4 --conditioning_dropout_prob 0.05 --mixed_precision bf16 --output_dir runs/edit
"""

import dataclasses
from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.cli.flags import Operational
from codi_jax.models import sharding
from codi_jax.pipeline.conditions import widen_for_edits
from codi_jax.training import loop
from codi_jax.training.denoising_training import DenoisingTrainingFlags, denoise
from codi_jax.training.pretrained import (
    EditFlags,
    load_batches,
    load_pretrained,
    null_text_of,
    open_training_data,
    require_editor,
    trainable,
)
from codi_jax.training.validation import validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(DenoisingTrainingFlags, EditFlags):
    """Trains an editor on pairs of images and instructions."""

    image_guidance_scale: Operational[float] = 1.5
    """Guidance scale of the image in validation pictures."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "image_guidance_scale")


def main(args: Args) -> None:
    args = loop.start(args)
    data = open_training_data(args, args.condition)
    samples = validation_samples(args, args.condition)
    mesh = sharding.make_mesh(args.fsdp)
    pipeline = load_pretrained(args, mesh)
    pipeline.params["unet"] = trainable(pipeline, "unet", mesh)
    if pipeline.task == "text-to-image":
        unet, pipeline.params["unet"] = widen_for_edits(pipeline.modules["unet"], pipeline.params["unet"])
        pipeline = dataclasses.replace(pipeline, modules=pipeline.modules | {"unet": unet})
    require_editor(pipeline)
    loader = load_batches(args, pipeline, data, args.condition)
    denoise(
        args, pipeline, ["unet"], loader, samples, mesh,
        frozen=null_text_of(pipeline), image_guidance_scale=args.image_guidance_scale,
        dropout=args.conditioning_dropout_prob,
    )  # fmt: skip


if __name__ == "__main__":
    command_line.run(Args, main)
