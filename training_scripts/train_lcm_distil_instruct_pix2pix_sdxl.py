"""LCM for editors: distills InstructPix2Pix on SDXL or SD 1.x and 2.x into a student of 1 to 4 one-pass steps.

python3 training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py \
    --pretrained_teacher_model diffusers/sdxl-instructpix2pix-768 --dataset_name your/instruct-pix2pix-dataset \
    --resolution 768 --train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 1e-4 --max_train_steps 10000 \
    --mixed_precision bf16 --output_dir runs/lcm-edit

The teacher's family (SDXL, SD 1.x or SD 2.x) is read from its folder.
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import lcm
from codi_jax.training.flags import EditDataFlags
from codi_jax.training.jobs.lcm import LcmRunFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(EditDataFlags, lcm.LcmEditFlags, LcmRunFlags):
    """Distills an InstructPix2Pix model into a student of few steps."""

    train_batch_size: int = 16
    """Examples per device and forward pass."""


def main(args: Args) -> None:
    run(lcm.EDIT, args)


if __name__ == "__main__":
    command_line.run(Args, main)
