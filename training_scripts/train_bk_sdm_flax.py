"""BK-SDM: distills a text-to-image model into a student with fewer blocks, by the remaining blocks' features.

python3 training_scripts/train_bk_sdm_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --distill_level bk_base --resolution 512 --train_batch_size 4 --gradient_accumulation_steps 8 \
    --learning_rate 5e-5 --mixed_precision bf16 --max_train_steps 50000 --output_dir runs/bk-base
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from codi_jax.cli import command_line
from codi_jax.cli.flags import Adjustable, ForValidation
from codi_jax.io.pruning_levels import find_level
from codi_jax.methods import bk_sdm
from codi_jax.training import starting
from codi_jax.training.flags import ManyStepsFlags, Replacement, Shown
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(bk_sdm.BkSdmFlags, ManyStepsFlags):
    """Distills a text-to-image model into a student with fewer blocks."""

    distill_level: str = "sd_small"
    """Which blocks stay. For SD 1.x and 2.x: sd_small, sd_tiny, bk_base, bk_small, bk_tiny; for SDXL: ssd_1b, vega; or
    a level of --distill_table."""
    distill_table: Adjustable[Path | None] = None
    """YAML file with custom levels; assets/recipes/small-levels.yaml is an example."""
    prepare_unet: bool = True
    """Remove blocks; without it (--no_prepare_unet) the student starts as the complete teacher."""
    non_ema_revision: str | None = None
    """Branch, tag or commit on the hub for the UNet, if different from the model's."""
    validation_prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--validation_prompts"])] = ()
    """Prompts to show instead of samples of the data."""
    validation_epochs: ForValidation[int | None] = None
    """Passes through the data between validations, instead of --validation_steps."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "validation_epochs")

    @property
    def shown(self) -> Shown:
        return dataclasses.replace(super().shown, teacher_scales=super().shown.scales)

    @property
    def replacements(self) -> Mapping[str, Replacement]:
        if self.non_ema_revision is None:
            return {}
        return {"unet": Replacement("--non_ema_revision", revision=self.non_ema_revision)}

    def steps_between_validations(self, samples_per_epoch: int | None) -> int:
        if self.validation_epochs is None:
            return super().steps_between_validations(samples_per_epoch)
        passes = dataclasses.replace(self, max_train_steps=None, num_train_epochs=self.validation_epochs)
        return starting.num_steps(passes, samples_per_epoch)


def main(args: Args) -> None:
    kept_blocks = find_level(args.distill_level, args.distill_table) if args.prepare_unet else None
    identity = {"surgery": None if kept_blocks is None else dataclasses.asdict(kept_blocks)}
    run(bk_sdm.method(kept_blocks), args, identity=identity)


if __name__ == "__main__":
    command_line.run(Args, main)
