"""TCD for editors: distills InstructPix2Pix into a student of 2 to 8 one-pass steps with adjustable noise.

python3 training_scripts/train_tcd_instruct_pix2pix_flax.py \
    --pretrained_teacher_model timbrooks/instruct-pix2pix --dataset_name your/instruct-pix2pix-dataset \
    --resolution 512 --train_batch_size 12 --learning_rate 4e-6 --mixed_precision bf16 --max_train_steps 10000 \
    --output_dir runs/tcd-edit

The flags are the same as for train_lcm_distil_instruct_pix2pix_sdxl.py, and the teacher may be of SDXL, too. Sample it
with `python3 -m codi_jax.generate --model runs/tcd-edit --gamma 0 --image FILE --prompt INSTRUCTION`.
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import tcd
from codi_jax.methods.lcm import LcmEditFlags
from codi_jax.training.flags import EditDataFlags
from codi_jax.training.jobs.lcm import LcmRunFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(EditDataFlags, LcmEditFlags, LcmRunFlags):
    """Distills an InstructPix2Pix model into a student that leads to any time of its trajectory."""

    train_batch_size: int = 16
    """Examples per device and forward pass."""


def main(args: Args) -> None:
    run(tcd.EDIT, args)


if __name__ == "__main__":
    command_line.run(Args, main)
