"""LCM: distills a text-to-image model, with a ControlNet or without, into a student of 1 to 8 steps, or into a LoRA.

python3 training_scripts/train_lcm_flax.py \
    --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --resolution 512 --train_batch_size 12 --learning_rate 1e-6 --max_train_steps 10000 --mixed_precision bf16 \
    --output_dir runs/lcm

and, for a LoRA, --use_lora --lora_rank 64 --learning_rate 1e-4.
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.data import DataFlags
from codi_jax.models.lora import LARGEST_RANK
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training.lcm_training import LcmTrainingFlags, Lora, distill
from codi_jax.training.pretrained import ConditionFlags


@dataclass(frozen=True, kw_only=True)
class Args(LcmTrainingFlags, ConditionFlags, DataFlags):
    """Distills a text-to-image model into a student of few steps."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet that the teacher is distilled with, and that the student keeps as it is."""
    use_lora: bool = False
    """Train a LoRA in place of the UNet (LCM-LoRA): it takes no guidance weights, so sample it with guidance 1."""
    lora_rank: int = 64
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """Its factor is alpha / rank. If left out: the rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Ends of the names of the layers that it adapts, as in diffusers: to_q, ff.net.2. If left out: attention,
    feed-forward and convolutions."""

    def check(self) -> None:
        super().check()
        self.require_in(1, LARGEST_RANK, "lora_rank")
        self.require_positive("lora_alpha")


def main(args: Args) -> None:
    lora = None
    if args.use_lora:
        lora = Lora(rank=args.lora_rank, alpha=args.lora_alpha, target_modules=args.lora_target_modules or None)
    controlnet = args.controlnet_model_name_or_path
    condition = args.condition if controlnet is not None else None
    distill(args, condition, controlnet=controlnet, lora=lora, require=_require_text_to_image)


def _require_text_to_image(pipeline: DiffusionPipeline) -> None:
    if pipeline.task == "edit":
        raise ValueError(
            "the teacher is an InstructPix2Pix model: distill it with train_lcm_distil_instruct_pix2pix_sdxl.py."
        )
    if pipeline.task != "text-to-image":
        raise ValueError(f"the teacher is for the task {pipeline.task!r}, which LCM is not implemented for.")


if __name__ == "__main__":
    command_line.run(Args, main)
