"""Trains the UNet of a Stable Diffusion model on images and captions, and optionally its text encoder.

python3 training_scripts/train_text_to_image_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/mine
"""

from dataclasses import dataclass
from typing import Literal

from codi_jax.cli import command_line
from codi_jax.methods import denoising
from codi_jax.training.flags import ManyStepsFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(denoising.TextToImageFlags, ManyStepsFlags):
    """Trains a text-to-image model."""

    from_scratch: tuple[Literal["unet", "text_encoder"], ...] = ()
    """Networks that start from random parameters: only their config.json is read."""

    def check(self) -> None:
        super().check()
        if "text_encoder" in self.from_scratch and not self.train_text_encoder:
            raise ValueError("--from_scratch text_encoder needs --train_text_encoder, otherwise it stays random.")

    @property
    def starts_random(self) -> tuple[str, ...]:
        return self.from_scratch

    @property
    def caches_text(self) -> bool:
        return not self.train_text_encoder


def main(args: Args) -> None:
    run(denoising.TEXT_TO_IMAGE, args)


if __name__ == "__main__":
    command_line.run(Args, main)
