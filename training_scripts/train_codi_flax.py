"""CoDi: distills a text-to-image model into a student of 1 to 4 steps that follows a condition image.

python3 training_scripts/train_codi_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --resolution 512 --train_batch_size 4 --learning_rate 1e-5 --mixed_precision bf16 --max_train_steps 500000 \
    --output_dir runs/codi
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codi_jax.cli import command_line
from codi_jax.cli.flags import Operational
from codi_jax.data import DataFlags
from codi_jax.io.images import labeled_rows
from codi_jax.methods import codi
from codi_jax.models import sharding
from codi_jax.training import loop, optim
from codi_jax.training.pretrained import (
    ConditionFlags,
    ModelFlags,
    load_batches,
    load_pretrained,
    modules_of,
    null_text_of,
    open_training_data,
    pretrained_schedule,
    save_trained,
    steps_of_teacher,
    trainable,
    with_controlnet,
)
from codi_jax.training.validation import ValidationFlags, generate_with, validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(
    ModelFlags, ConditionFlags, codi.CodiFlags, loop.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags
):
    """Distills a text-to-image model, with a new condition, into a student of few steps."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from. If left out: a new one, a copy of the UNet's encoder."""
    controlnet_revision: str | None = None
    """Branch, tag or commit of it on the hub."""
    controlnet_from_pt: Operational[bool] = False
    """Has no effect: PyTorch and Flax files are told apart by themselves."""
    learning_rate: float = 1e-5
    """The learning rate, after warm-up."""
    checkpointing_steps: int = 5000
    """Steps between two checkpoints; 0 for none."""
    validation_sampling_steps: Operational[tuple[int, ...]] = (1, 2, 4, 8)
    """Numbers of steps at which validation pictures show the student. Those above --distill_learning_steps are left
    out: its grid has no times for them."""
    guidance_scale: Operational[float] = 1.0
    """Guidance scale of the student in validation pictures; with --cfg_aware_distill one of the range it was trained
    with."""
    teacher_guidance_scale: Operational[float] = 7.5
    """Guidance scale of the teacher in validation pictures."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "guidance_scale", "teacher_guidance_scale")
        possible = all(steps >= 1 for steps in self.validation_sampling_steps) and len(self.student_steps) > 0
        self.require("validation_sampling_steps", possible, "1 to --distill_learning_steps")

    @property
    def student_steps(self) -> tuple[int, ...]:
        """What of ``validation_sampling_steps`` the student can be sampled with."""
        return tuple(steps for steps in self.validation_sampling_steps if steps <= self.distill_learning_steps)


def main(args: Args) -> None:
    flags = codi.CodiFlags.of(args)
    args = loop.start(args)
    condition = args.condition if flags.distill_type == "conditional" else None
    data = open_training_data(args, condition)
    samples = validation_samples(args, condition)
    schedule = codi.student_schedule(pretrained_schedule(args), flags)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    teacher = load_pretrained(args, mesh, args.controlnet_model_name_or_path, args.controlnet_revision)
    if condition is None:
        teacher = with_controlnet(teacher, None)
    loader = load_batches(args, teacher, data, condition)
    config = codi.configure(modules_of(teacher, ("controlnet", "unet"), args), flags)
    num_steps = loop.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=loop.global_batch_size(args))
    state = codi.init_state(
        config,
        trainable(teacher, "unet", mesh),
        optimizer,
        key,
        controlnet_params=trainable(teacher, "controlnet", mesh) if "controlnet" in teacher.modules else None,
        mixed_precision=args.mixed_precision,
    )
    frozen = {**teacher.params, "schedule": schedule}
    if flags.is_guided:
        frozen |= null_text_of(teacher)
    student = dataclasses.replace(with_controlnet(teacher, config.modules.controlnet), schedule=schedule)

    teacher_steps = steps_of_teacher(teacher.schedule)

    @functools.cache
    def by_teacher() -> np.ndarray:
        return generate_with(teacher, {}, samples, steps=teacher_steps, guidance_scale=args.teacher_guidance_scale)

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        rows = {"condition": samples.conditions, f"teacher, {teacher_steps} steps": by_teacher()}
        for steps in args.student_steps:
            made = generate_with(student, state.ema, samples, steps=steps, guidance_scale=args.guidance_scale)
            rows[f"student, {steps}"] = made
        return {"samples": labeled_rows({**rows, "data": samples.pictures})}

    def export(state: Any, folder: Path) -> None:
        trained = {name: (student.modules[name], params) for name, params in state.ema.items()}
        save_trained(args, student, folder, trained)

    loop.train(
        functools.partial(
            codi.train_step, config=config, optimizer=optimizer, accumulation=args.gradient_accumulation_steps
        ),
        state,
        frozen,
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
    )


if __name__ == "__main__":
    command_line.run(Args, main)
