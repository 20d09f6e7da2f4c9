"""DisBack: distills a model into a one-step generator, without images.

python3 training_scripts/train_disback_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_prompt_path prompts.txt \
    --resolution 512 --train_batch_size 8 --dfake_gen_update_ratio 5 --real_guidance_scale 6 --interval 100 \
    --max_train_steps 10000 --mixed_precision bf16 --output_dir runs/disback

records the path from the teacher to the untrained generator (--stage degradation) and walks it back (--stage
backtracking). With --stage backtracking --path none it is plain distribution matching distillation (DMD).
"""

import dataclasses
from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.training.jobs.disback import DisbackRunFlags, distill
from codi_jax.training.tracking import log


@dataclass(frozen=True, kw_only=True)
class Args(DisbackRunFlags):
    """Distills a model into a one-step generator (DisBack), or one of few steps."""


def main(args: Args) -> None:
    if args.real_image_path is not None and args.needs_images:
        if args.train_prompt_path is not None:
            log("--train_prompt_path is ignored: the prompts are the captions of --real_image_path")
        args = dataclasses.replace(args, train_data_dir=args.real_image_path, train_prompt_path=None)
    distill(args)


if __name__ == "__main__":
    command_line.run(Args, main)
