"""Trains InstructPix2Pix: a Stable Diffusion model (1.x, 2.x or SDXL) learns to edit images by instruction.

python3 training_scripts/train_instruct_pix2pix_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name timbrooks/instructpix2pix-clip-filtered --original_image_column original_image \
    --resolution 256 --train_batch_size 4 --conditioning_dropout_prob 0.05 --mixed_precision bf16 --output_dir runs/edit
"""

from dataclasses import dataclass, replace

from codi_jax.cli import command_line
from codi_jax.cli.flags import ForValidation
from codi_jax.methods import denoising
from codi_jax.training.flags import EditDataFlags, ManyStepsFlags, Shown
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(EditDataFlags, denoising.EditFlags, ManyStepsFlags):
    """Trains an editor on pairs of images and instructions."""

    image_guidance_scale: ForValidation[float] = 1.5
    """Guidance scale of the image in validation images."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "image_guidance_scale")

    @property
    def shown(self) -> Shown:
        shown = super().shown
        return replace(shown, scales={**shown.scales, "image_guidance_scale": self.image_guidance_scale})


def main(args: Args) -> None:
    run(denoising.INSTRUCT_PIX2PIX, args)


if __name__ == "__main__":
    command_line.run(Args, main)
