"""What the two scripts of LCM share: all of it but their flags of data and conditions."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from codi_jax.cli.flags import Adjustable, Operational
from codi_jax.data import ConditionOf
from codi_jax.diffusion.schedule import distillation_grid
from codi_jax.io.hub import ModelFolder
from codi_jax.io.images import labeled_rows
from codi_jax.io.lora_files import save_lora
from codi_jax.io.weights import save_model
from codi_jax.methods import lcm
from codi_jax.methods.baking import bake_guidance
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.models.lora import merge_lora
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop, optim
from codi_jax.training.pretrained import (
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
    with_network,
)
from codi_jax.training.validation import ValidationFlags, generate_with, validation_samples

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class LcmTrainingFlags(ModelFlags, lcm.LcmFlags, loop.LoopFlags, optim.OptimizerFlags, ValidationFlags):
    """The flags of a run of LCM, but for data and conditions."""

    pretrained_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--pretrained_teacher_model"])]
    """The teacher: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    revision: Annotated[str | None, tyro.conf.arg(aliases=["--teacher_revision"])] = None
    """Branch, tag or commit of it on the hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """Autoencoder instead of the teacher's: a folder with its config.json, or an id on the hub."""
    vae_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of the autoencoder. If left out: that of --mixed_precision, but fp32 for one that says that it needs it
    (force_upcast) instead of fp16."""
    vae_encode_batch_size: Adjustable[int | None] = None
    """Images of a device that the autoencoder takes at a time; fewer need less memory. If left out: all."""
    cast_teacher_unet: Operational[bool] = False
    """Has no effect: what is not trained is kept in the precision of the computation always."""
    checkpointing_steps: int = 500
    """Steps between two checkpoints; 0 for none."""
    validation_sampling_steps: Operational[tuple[int, ...]] = (1, 2, 4)
    """Numbers of steps at which validation pictures show the student."""
    guidance_scale: Operational[float] = 7.5
    """Guidance scale in validation pictures, of the teacher and of the student."""
    image_guidance_scale: Operational[float] = 1.5
    """Guidance scale of the source image in validation pictures, likewise."""
    bake_guidance_scale: Adjustable[float | None] = None
    """Fold this guidance scale into the exported weights, exactly. diffusers' InstructPix2Pix and text-to-image
    pipelines, which never pass guidance to the network, then give the right images: call them with guidance_scale=1."""
    bake_image_guidance_scale: Adjustable[float | None] = None
    """The same for the image guidance of a student that takes it."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        self.require_at_least(0, "bake_guidance_scale", "bake_image_guidance_scale")
        possible = all(1 <= steps <= self.num_ddim_timesteps for steps in self.validation_sampling_steps)
        self.require("validation_sampling_steps", possible, f"1 to --num_ddim_timesteps {self.num_ddim_timesteps}")
        self.require_at_least(1, "vae_encode_batch_size")
        divides = self.train_batch_size % (self.vae_encode_batch_size or 1) == 0
        what = f"a divisor of --train_batch_size {self.train_batch_size}, or larger"
        larger = (self.vae_encode_batch_size or 0) > self.train_batch_size
        self.require("vae_encode_batch_size", divides or larger, what)
        if self.bake_guidance_scale is not None:
            takes_both = self.bake_image_guidance_scale is not None
            what = "given if, and only if, --w_image_min and --bake_guidance_scale are"
            self.require("bake_image_guidance_scale", takes_both == self.weighs_image, what)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The shape of a LoRA to train in place of the whole UNet: see `codi_jax.models.lora.init_lora`."""

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None


def distill(
    args: Any,
    condition: ConditionOf,
    *,
    controlnet: str | None = None,
    dropout: float | int = 0.0,
    lora: Lora | None = None,
    require: Any = None,
) -> None:
    """Distills a model by LCM, and writes the student.

    Args:
      args: `LcmTrainingFlags` and `codi_jax.data.DataFlags`.
      condition: where condition images or source images come from, see `codi_jax.data.load_data`.
      controlnet: folder or repository of a ControlNet that the teacher has.
      dropout: see `codi_jax.methods.lcm.configure`.
      lora: trains a LoRA in place of the UNet.
      require: called with the loaded pipeline, to refuse it.

    Raises:
      ValueError: if flags, model and data do not fit each other.
    """
    flags = lcm.LcmFlags.of(args)
    args = loop.start(args)
    data = open_training_data(args, condition)
    samples = validation_samples(args, condition)
    schedule = lcm.student_schedule(pretrained_schedule(args), flags)
    distillation_grid(schedule.num_train_timesteps, flags.num_ddim_timesteps)  # or it refuses
    if (vae := args.pretrained_vae_model_name_or_path) is not None:
        ModelFolder(vae, cache_dir=args.cache_dir).require("config.json")  # or it refuses
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    teacher = _with_vae(load_pretrained(args, mesh, controlnet), args, mesh)
    if require is not None:
        require(teacher)
    parts = max(args.train_batch_size // (args.vae_encode_batch_size or args.train_batch_size), 1)
    modules = dataclasses.replace(modules_of(teacher, (), args), vae_parts=parts)
    config = lcm.configure(modules, flags, dropout=dropout, lora=lora is not None)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, remat=args.gradient_checkpointing))
    loader = load_batches(args, teacher, data, condition)
    num_steps = loop.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=loop.global_batch_size(args))
    state = lcm.init_state(
        config,
        teacher.params["unet"] if lora is not None else trainable(teacher, "unet", mesh),
        optimizer,
        key,
        mixed_precision=args.mixed_precision,
        **({} if lora is None else vars(lora)),
    )
    frozen = {**teacher.params, **null_text_of(teacher), "schedule": schedule}
    unet = dataclasses.replace(config.student, remat=False)
    student = dataclasses.replace(teacher, modules=teacher.modules | {"unet": unet}, schedule=schedule)
    scales = {"guidance_scale": args.guidance_scale, "image_guidance_scale": args.image_guidance_scale}

    teacher_steps = steps_of_teacher(teacher.schedule)

    @functools.cache
    def by_teacher() -> np.ndarray:
        return generate_with(teacher, {}, samples, steps=teacher_steps, **scales)

    def of_student(params: Params) -> Params:
        if lora is None:
            return params["unet"]
        return merge_lora(teacher.params["unet"], params["unet_lora"])

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        rows = {"given": samples.conditions, f"teacher, {teacher_steps} steps": by_teacher()}
        guidance = scales if lora is None else {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
        params = {"unet": of_student(state.result)}
        for steps in args.validation_sampling_steps:
            rows[f"student, {steps}"] = generate_with(student, params, samples, steps=steps, **guidance)
        return {"samples": labeled_rows({**rows, "data": samples.pictures})}

    def export(state: Any, folder: Path) -> None:
        if lora is not None:
            save_lora(folder, {"unet": state.params["unet_lora"]})
            if jax.process_index() == 0:
                schedule.save_pretrained(folder)
            return
        (module, params), target = _exported(args, unet, state.params), _exported(args, unet, state.ema)
        of_folder = dataclasses.replace(student, modules=student.modules | {"unet": module})
        save_trained(args, of_folder, folder, {"unet": (module, params)})
        save_model(folder, "unet_target", *target, dtype=args.save_dtype)

    loop.train(
        functools.partial(
            lcm.train_step, config=config, optimizer=optimizer, accumulation=args.gradient_accumulation_steps
        ),
        state,
        frozen,
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
    )


def _exported(args: LcmTrainingFlags, unet: Any, params: Params) -> tuple[Any, Params]:
    if args.bake_guidance_scale is None:
        return unet, params["unet"]
    return bake_guidance(unet, params["unet"], args.bake_guidance_scale, args.bake_image_guidance_scale)


def _with_vae(pipeline: DiffusionPipeline, args: Any, mesh: Mesh) -> DiffusionPipeline:
    """The pipeline with the autoencoder that the flags ask for, in the precision that they ask for."""
    path = args.pretrained_vae_model_name_or_path
    if path is None and args.vae_precision is None:
        return pipeline
    source = pipeline.sources["vae"]
    if path is not None:
        source = {"source": path, "subfolder": None, "cache_dir": args.cache_dir}
    dtype = None if args.vae_precision is None else _PRECISIONS[args.vae_precision]
    own, pipeline = pipeline.modules["vae"].config, with_network(pipeline, "vae", source, args, mesh, dtype)
    vae = pipeline.modules["vae"].config
    if vae.latent_channels != own.latent_channels or vae.downscale != own.downscale:
        raise ValueError(
            f"--pretrained_vae_model_name_or_path {path}: its latents have {vae.latent_channels} channels and are "
            f"{vae.downscale} times smaller than images, those of the teacher {own.latent_channels} and "
            f"{own.downscale}: take one of the teacher's family."
        )
    return pipeline
