"""LCM for editors: distills InstructPix2Pix on SDXL or SD 1.x and 2.x into a student of 1 to 4 one-pass steps.

python3 training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py \
    --pretrained_teacher_model diffusers/sdxl-instructpix2pix-768 --dataset_name your/instruct-pix2pix-dataset \
    --resolution 768 --train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 1e-4 --max_train_steps 10000 \
    --mixed_precision bf16 --output_dir runs/lcm-edit

Which family the teacher is of follows from its folder.
"""

import functools
from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.training.lcm_training import LcmTrainingFlags, distill
from codi_jax.training.pretrained import EditFlags, require_editor


@dataclass(frozen=True, kw_only=True)
class Args(LcmTrainingFlags, EditFlags):
    """Distills an InstructPix2Pix model into a student of few steps."""

    train_batch_size: int = 16
    """Examples per device and pass."""


def main(args: Args) -> None:
    require = functools.partial(require_editor, flag=f"--pretrained_teacher_model {args.pretrained_model_name_or_path}")
    distill(args, args.condition, dropout=args.conditioning_dropout_prob, require=require)


if __name__ == "__main__":
    command_line.run(Args, main)
