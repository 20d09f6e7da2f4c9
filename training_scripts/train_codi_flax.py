"""CoDi: distills a text-to-image model into a student of 1 to 4 steps that follows a condition image.

python3 training_scripts/train_codi_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --resolution 512 --train_batch_size 4 --learning_rate 1e-5 --mixed_precision bf16 --max_train_steps 500000 \
    --output_dir runs/codi
"""

from dataclasses import dataclass
from typing import ClassVar

from codi_jax.cli import command_line
from codi_jax.cli.flags import ForValidation, Operational
from codi_jax.data import ConditionOf
from codi_jax.methods import codi
from codi_jax.training.flags import ConditionFlags, Shown, TrainingFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(ConditionFlags, codi.CodiFlags, TrainingFlags):
    """Distills a text-to-image model, with a new condition, into a student of few steps."""

    essential: ClassVar[tuple[str, ...]] = (
        "pretrained_model_name_or_path", "controlnet_model_name_or_path", "train_data_dir", "task", "output_dir",
        "resolution", "train_batch_size", "learning_rate", "max_train_steps", "mixed_precision",
    )  # fmt: skip

    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from. Default: a new one, a copy of the UNet's encoder."""
    controlnet_revision: str | None = None
    """Branch, tag or commit of the ControlNet on the hub."""
    controlnet_from_pt: Operational[bool] = False
    """Has no effect: PyTorch and Flax files are detected automatically."""
    learning_rate: float = 1e-5
    """The learning rate, after warm-up."""
    checkpointing_steps: int = 5000
    """Steps between checkpoints; 0 for none."""
    validation_sampling_steps: ForValidation[tuple[int, ...]] = (1, 2, 4, 8)
    """Numbers of steps with which validation images show the student. Values above --distill_learning_steps are
    skipped: its grid has no times for them."""
    guidance_scale: ForValidation[float] = 1.0
    """Guidance scale of the student in validation images; with --cfg_aware_distill, choose one in its training
    range."""
    teacher_guidance_scale: ForValidation[float] = 7.5
    """Guidance scale of the teacher in validation images."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "guidance_scale", "teacher_guidance_scale")
        possible = all(steps >= 1 for steps in self.validation_sampling_steps) and len(self.shown.steps) > 0
        self.require("validation_sampling_steps", possible, "1 to --distill_learning_steps")

    @property
    def controlnet(self) -> str | None:
        return self.controlnet_model_name_or_path

    @property
    def condition(self) -> ConditionOf:
        return super().condition if self.distill_type == "conditional" else None

    @property
    def shown(self) -> Shown:
        steps = tuple(steps for steps in self.validation_sampling_steps if steps <= self.distill_learning_steps)
        return Shown(steps, {"guidance_scale": self.guidance_scale}, {"guidance_scale": self.teacher_guidance_scale})


def main(args: Args) -> None:
    run(codi.METHOD, args)


if __name__ == "__main__":
    command_line.run(Args, main)
