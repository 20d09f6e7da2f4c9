"""Trains a ControlNet: a Stable Diffusion model learns to follow condition images; without them it is unchanged.

python3 training_scripts/train_controlnet_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/controlnet
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import denoising
from codi_jax.training.flags import ConditionFlags, ManyStepsFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(ConditionFlags, denoising.DenoisingFlags, ManyStepsFlags):
    """Trains a ControlNet on a frozen text-to-image model."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet to continue training. Default: a new one, a copy of the UNet's encoder."""

    @property
    def controlnet(self) -> str | None:
        return self.controlnet_model_name_or_path


def main(args: Args) -> None:
    run(denoising.CONTROLNET, args)


if __name__ == "__main__":
    command_line.run(Args, main)
