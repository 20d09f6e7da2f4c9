"""LCM: distills a text-to-image model, with or without a ControlNet, into a student of 1 to 8 steps or a LoRA.

python3 training_scripts/train_lcm_flax.py \
    --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --resolution 512 --train_batch_size 12 --learning_rate 1e-6 --max_train_steps 10000 --mixed_precision bf16 \
    --output_dir runs/lcm

and, for a LoRA, --use_lora --lora_rank 64 --learning_rate 1e-4.
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import lcm
from codi_jax.training.jobs.lcm import LcmTextRunFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(LcmTextRunFlags):
    """Distills a text-to-image model into a student of few steps."""


def main(args: Args) -> None:
    run(lcm.TEXT, args)


if __name__ == "__main__":
    command_line.run(Args, main)
