"""DisBack: distills a model into a generator of one step, without images.

python3 training_scripts/train_disback_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_prompt_path prompts.txt \
    --resolution 512 --train_batch_size 8 --dfake_gen_update_ratio 5 --real_guidance_scale 6 --interval 100 \
    --max_train_steps 10000 --mixed_precision bf16 --output_dir runs/disback

records the path from the teacher to the untrained generator (--stage degradation) and walks it back (--stage
backtracking). With --stage backtracking --path none it is plain distribution matching distillation (DMD).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from codi_jax.cli import command_line
from codi_jax.cli.flags import Adjustable, Operational
from codi_jax.cli.outputs import file_in_place_of
from codi_jax.data import PromptFlags
from codi_jax.methods.disback import DisbackFlags
from codi_jax.training import loop, optim
from codi_jax.training.disback_training import NO_PATH, distill
from codi_jax.training.pretrained import ConditionFlags, ModelFlags
from codi_jax.training.tracking import say
from codi_jax.training.validation import ValidationFlags


@dataclass(frozen=True, kw_only=True)
class Args(
    ModelFlags, ConditionFlags, DisbackFlags, loop.LoopFlags, optim.OptimizerFlags, PromptFlags, ValidationFlags
):
    """Distills a model into a generator of one step (DisBack), or of few."""

    pretrained_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--model_id"])]
    """The teacher: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    stage: Adjustable[Literal["degradation", "backtracking", "both"]] = "both"
    """degradation records the path, backtracking trains the generator along it."""
    path: Adjustable[Annotated[str | None, tyro.conf.arg(aliases=["--trajectory_dir"])]] = None
    """Folder of the path. If left out: path in --output_dir. none, with --stage backtracking, has the teacher as the
    target throughout: plain distribution matching."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet that the teacher is distilled with, and that the generator keeps as it is."""
    train_data_dir: str | None = None
    """Folder of a data set. Its captions are the prompts; its images are read where they are needed: for the GAN loss,
    for --denoising without --backward_simulation, and for conditions."""
    real_image_path: Adjustable[str | None] = None
    """The same, but put aside where no images are needed; where they are, --train_prompt_path is put aside."""
    max_train_steps: Annotated[int | None, tyro.conf.arg(aliases=["--train_iters"])] = None
    """Steps of backtracking in all, those before a resume included: each is one of the fake score, and every
    --dfake_gen_update_ratio-th one of the generator, too."""
    train_batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch_size"])] = 1
    """Examples per device and pass."""
    learning_rate: float = 5e-7
    """The learning rate, after warm-up: of full-size models."""
    generator_lr: Adjustable[float | None] = None
    """That of the generator. If left out: --learning_rate."""
    guidance_lr: Adjustable[float | None] = None
    """That of the fake score, in both stages. If left out: --learning_rate."""
    lr_warmup_steps: Annotated[int, tyro.conf.arg(aliases=["--warmup_step"])] = 500
    """Updates of each network over which its learning rate rises from 0; constant has no warm-up."""
    max_grad_norm: float = 10.0
    """Gradients of each network are scaled down to this norm; inf for no limit."""
    checkpointing_steps: int = 500
    """Steps between two checkpoints, in both stages; 0 for none."""
    export_steps: Operational[int] = 0
    """Steps between two exports of the generator into folders step-N, besides the one at the end; 0 for none."""
    teacher_guidance_scale: Operational[float] = 7.5
    """Guidance scale of the teacher in validation pictures."""
    lora_dropout: float = 0.0
    """Must be 0: a LoRA is trained without dropout here."""
    denoising_loss_weight: Operational[float] = 1.0
    """Has no effect: nor does the reference code multiply anything by it."""
    sdxl: Operational[bool] = False
    """Has no effect: what family a model is of, its folder says."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "generator_lr", "guidance_lr", "export_steps", "teacher_guidance_scale")
        self.require_at_least(0, "denoising_loss_weight")
        self.require("lora_dropout", self.lora_dropout == 0, "0")
        if self.path not in (None, NO_PATH) and (file := file_in_place_of(Path(self.path or ""))):
            raise ValueError(f"--path {self.path} is not possible: {file} is a file, where a folder is needed.")
        if self.path == NO_PATH and self.stage != "backtracking":
            raise ValueError("--path none needs no stage but the second: give --stage backtracking with it.")


def main(args: Args) -> None:
    if args.real_image_path is not None and args.needs_images:
        if args.train_prompt_path is not None:
            say("--train_prompt_path is put aside: the prompts are the captions of --real_image_path")
        args = dataclasses.replace(args, train_data_dir=args.real_image_path, train_prompt_path=None)
    distill(args)


if __name__ == "__main__":
    command_line.run(Args, main)
