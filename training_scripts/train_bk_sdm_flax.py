"""BK-SDM: distills a text-to-image model into a student with fewer blocks, by the features of the blocks that stay.

python3 training_scripts/train_bk_sdm_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir data/mine \
    --distill_level bk_base --resolution 512 --train_batch_size 4 --gradient_accumulation_steps 8 \
    --learning_rate 5e-5 --mixed_precision bf16 --max_train_steps 50000 --output_dir runs/bk-base
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from codi_jax.cli import command_line
from codi_jax.cli.flags import Adjustable, Operational
from codi_jax.data import DataFlags
from codi_jax.io.pruning_levels import find_level
from codi_jax.methods import bk_sdm
from codi_jax.models import sharding
from codi_jax.models.pruning import Features, Surgery, whole
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop
from codi_jax.training.denoising_training import DenoisingTrainingFlags, denoise
from codi_jax.training.pretrained import (
    load_batches,
    load_pretrained,
    modules_of,
    open_training_data,
    pretrained_unet,
    trainable,
    with_network,
)
from codi_jax.training.validation import validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(DenoisingTrainingFlags, DataFlags):
    """Distills a text-to-image model into a student with fewer blocks."""

    distill_level: str = "sd_small"
    """Which blocks stay. For SD 1.x and 2.x: sd_small, sd_tiny, bk_base, bk_small, bk_tiny; for SDXL: ssd_1b, vega; or
    a level of --distill_table."""
    distill_table: Adjustable[Path | None] = None
    """YAML file of levels of your own; assets/recipes/emoji-levels.yaml is an example."""
    prepare_unet: bool = True
    """Take blocks away; without it (--no_prepare_unet) the student starts as the whole teacher."""
    output_weight: float = 1.0
    """Weight of the distance between the outputs of student and teacher."""
    feature_weight: float = 1.0
    """Weight of the distance between the outputs of their blocks. With both weights 0 it is plain training."""
    feature_normalize: bool = False
    """Take the distance of each pair of blocks relative to the size of the teacher's features, so that no pair, and not
    the features together, decides alone."""
    noise_offset: float = 0.0
    """Strength of a noise that is the same all over a channel."""
    input_perturbation: float = 0.0
    """Strength of further noise on the network's input."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the student shall predict, if not what the teacher does."""
    non_ema_revision: str | None = None
    """Branch, tag or commit on the hub of the UNet alone, if it is another."""
    validation_prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--validation_prompts"])] = ()
    """Prompts to show instead of samples of the data."""
    validation_epochs: Operational[int | None] = None
    """Passes through the data between two validations, in place of --validation_steps."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "output_weight", "feature_weight", "noise_offset", "input_perturbation")
        self.require_at_least(1, "validation_epochs")


def main(args: Args) -> None:
    surgery = find_level(args.distill_level, args.distill_table) if args.prepare_unet else None
    run_config = {"surgery": None if surgery is None else dataclasses.asdict(surgery)}
    args = loop.start(args, run_config)
    data = open_training_data(args)
    samples = validation_samples(args)
    unet: Any = pretrained_unet(args)
    surgery = surgery or whole(unet.config)
    bk_sdm.make_student(unet, unet.abstract_params(), surgery)  # refuses what does not fit before weights are loaded
    mesh = sharding.make_mesh(args.fsdp)
    teacher = _load_teacher(args, mesh)
    loader = load_batches(args, teacher, data)
    student, features = _make_student(args, teacher, surgery, mesh)
    denoise(
        _with_validation_steps(args, loader), student, ["unet"], loader, samples, mesh, run_config=run_config,
        frozen={"teacher": teacher.params["unet"], "teacher_schedule": teacher.schedule}, teacher=teacher,
        method=bk_sdm, teacher_unet=modules_of(teacher, (), args).unet, features=features,
        output_weight=args.output_weight, feature_weight=args.feature_weight, feature_normalize=args.feature_normalize,
        noise_offset=args.noise_offset, input_perturbation=args.input_perturbation,
    )  # fmt: skip


def _load_teacher(args: Args, mesh: Mesh) -> DiffusionPipeline:
    teacher = load_pretrained(args, mesh)
    if teacher.task != "text-to-image" or "controlnet" in teacher.modules:
        raise ValueError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: take a text-to-image model without "
            "a ControlNet, which would not fit the student."
        )
    if args.non_ema_revision is None:
        return teacher
    source = teacher.sources["unet"] | {"revision": args.non_ema_revision}
    return with_network(teacher, "unet", source, args, mesh)


def _make_student(
    args: Args, teacher: DiffusionPipeline, surgery: Surgery, mesh: Mesh
) -> tuple[DiffusionPipeline, Features]:
    unet, params, features = bk_sdm.make_student(teacher.modules["unet"], trainable(teacher, "unet", mesh), surgery)
    schedule = teacher.schedule
    if args.prediction_type is not None:
        schedule = schedule.with_config(prediction_type=args.prediction_type)
    modules, params = teacher.modules | {"unet": unet}, teacher.params | {"unet": params}
    return dataclasses.replace(teacher, modules=modules, params=params, schedule=schedule), features


def _with_validation_steps(args: Args, loader: loop.Loader) -> Args:
    if args.validation_epochs is None:
        return args
    passes = dataclasses.replace(args, max_train_steps=None, num_train_epochs=args.validation_epochs)
    return dataclasses.replace(args, validation_steps=loop.num_steps(passes, loader.samples_per_epoch))


if __name__ == "__main__":
    command_line.run(Args, main)
