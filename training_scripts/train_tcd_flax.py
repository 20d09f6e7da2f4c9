"""TCD: distills a text-to-image model into a student for 2 to 8 steps, with an adjustable amount of noise.

python3 training_scripts/train_tcd_flax.py \
    --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --resolution 512 --train_batch_size 12 --learning_rate 4e-6 --mixed_precision bf16 --max_train_steps 10000 \
    --output_dir runs/tcd

The flags are the same as for train_lcm_flax.py. Sample it with `python3 -m codi_jax.generate --model runs/tcd --gamma
0.3`.
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import tcd
from codi_jax.training.jobs.lcm import LcmTextRunFlags
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(LcmTextRunFlags):
    """Distills a text-to-image model into a student that leads to any time of its trajectory."""


def main(args: Args) -> None:
    run(tcd.TEXT, args)


if __name__ == "__main__":
    command_line.run(Args, main)
