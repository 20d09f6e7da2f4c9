"""The two stages of DisBack as runs: recording the path, and walking it back."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from codi_jax.data import ConditionOf
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.io.images import labeled_rows
from codi_jax.io.lora_files import save_lora
from codi_jax.io.weights import load_model
from codi_jax.methods import disback
from codi_jax.methods.dmd import Config
from codi_jax.methods.generator import Generator, generator_schedule, generator_unet
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop, optim
from codi_jax.training.degradation_path import (
    PATH_NAME,
    DegradationPath,
    MovingTarget,
    check_identity,
    digest,
    finish_path,
    open_path,
    write_node,
)
from codi_jax.training.pretrained import (
    load_batches,
    load_pretrained,
    modules_of,
    null_text_of,
    open_training_data,
    pretrained_schedule,
    save_trained,
    steps_of_teacher,
    trainable,
)
from codi_jax.training.validation import Samples, generate_with, validation_samples

NO_PATH = "none"
"""What ``--path`` is for plain distribution matching."""


@dataclass(frozen=True)
class Stage:
    """What a stage starts from.

    Attributes:
      args: with the folder filled in.
      flags: of the method.
      schedule: of the teacher.
      teacher: the whole model on the mesh, frozen.
      config: of the losses.
      loader: of batches.
      samples: to show.
      mesh: that all of it lies on.
    """

    args: Any
    flags: disback.DisbackFlags
    schedule: NoiseSchedule
    teacher: DiffusionPipeline
    config: Config
    loader: loop.Loader
    samples: Samples
    mesh: Mesh

    def identity(self, unet: Params) -> dict[str, Any]:
        """What a path of this teacher, of which the UNet in float32 is given, and of its generator is known by."""
        return {
            "model": self.args.pretrained_model_name_or_path,
            "teacher": digest(unet),
            "controlnet": self.args.controlnet_model_name_or_path,
            "timesteps": list(self.flags.timesteps),
        }

    def load_unet(self, dtype: DTypeLike = np.float32) -> Params:
        """The teacher's UNet, read again into host memory."""
        return load_model(**self.teacher.sources["unet"], dtype=dtype, place=lambda _, array: array)[1]

    def optimizer(self, learning_rate: float | None, num_steps: int) -> optax.GradientTransformation:
        """One with a learning rate of its own, or that of ``--learning_rate``."""
        rate = self.args.learning_rate if learning_rate is None else learning_rate
        flags = dataclasses.replace(self.args, learning_rate=rate)
        return optim.make_optimizer(flags, num_steps, batch_size=loop.global_batch_size(self.args))


def distill(args: Any) -> None:
    """Runs the stages that the flags ask for.

    Args:
      args: ``Args`` of ``training_scripts/train_disback_flax.py``.

    Raises:
      ValueError: if flags, model, data and path do not fit each other.
    """
    args.check()
    if args.stage == "degradation":
        record_path(args)
    elif args.stage == "backtracking":
        backtrack(args)
    else:
        is_recorded = args.resume_from_checkpoint is not None and (_path_folder(args) / PATH_NAME).is_file()
        args = args if is_recorded else record_path(args)
        backtrack(args)


def record_path(args: Any) -> Any:
    """Stage 1: a run in ``degradation`` of the output folder, which writes the path.

    Args:
      args: as in `distill`.

    Returns:
      The arguments, with the output folder filled in.

    Raises:
      ValueError: as `distill`.
    """
    whole, run_config = args, {"stage": "degradation"}
    # Where both stages are run, the name of a checkpoint is that of one of the second.
    resume = args.resume_from_checkpoint and "latest" if args.stage == "both" else args.resume_from_checkpoint
    args = dataclasses.replace(
        args,
        output_dir=str(Path(args.output_dir) / "degradation"),
        max_train_steps=args.num_nodes * args.degradation_interval,
        resume_from_checkpoint=resume,
        push_to_hub=False,
    )
    stage = _begin(args, run_config)
    args = stage.args
    whole = dataclasses.replace(whole, output_dir=str(Path(args.output_dir).parent))
    folder, module = _path_folder(whole), stage.teacher.modules["unet"]
    optimizer = stage.optimizer(args.guidance_lr, args.max_train_steps)
    unet = trainable(stage.teacher, "unet", stage.mesh)
    identity = {**stage.identity(unet), "interval": args.degradation_interval}
    key, precision = jax.random.key(args.seed), args.mixed_precision
    state = optim.init_state({"unet": unet}, optimizer, key, mixed_precision=precision)
    del unet  # or it would stay on the device beside its copies

    def write(state: Any, step: int) -> None:
        write_node(folder, step // args.degradation_interval - 1, module, state.params["unet"], args.save_dtype)

    step = functools.partial(
        disback.degradation_step,
        config=stage.config,
        optimizer=optimizer,
        accumulation=args.gradient_accumulation_steps,
    )
    loop.train(
        step,
        state,
        {**stage.teacher.params, "schedule": stage.schedule},
        stage.loader,
        args,
        mesh=stage.mesh,
        record=loop.Record(write, args.degradation_interval),
        run_config=run_config,
    )
    finish_path(folder, args.num_nodes, identity)
    return whole


def backtrack(args: Any) -> None:
    """Stage 2: trains the generator along a recorded path, or without one, and writes it.

    Args:
      args: as in `distill`.

    Raises:
      ValueError: as `distill`.
    """
    path = None if args.path == NO_PATH else open_path(_path_folder(args))
    run_config = {"path": NO_PATH if path is None else path.fingerprint}
    stage = _begin(args, run_config)
    args, flags, teacher = stage.args, stage.flags, stage.teacher
    num_steps = loop.num_steps(args, stage.loader.samples_per_epoch)
    unet = trainable(teacher, "unet", stage.mesh)
    if path is not None:
        check_identity(path, stage.identity(unet))
        _require_arrival(num_steps, flags, len(path.nodes))
    num_updates = -(-num_steps // flags.dfake_gen_update_ratio)
    optimizers = stage.optimizer(args.generator_lr, num_updates), stage.optimizer(args.guidance_lr, num_steps)
    state = disback.init_state(
        stage.config,
        unet,
        unet if path is None else sharding.put(stage.mesh, path.load(-1, np.float32)),
        optimizers,
        jax.random.key(args.seed),
        mixed_precision=args.mixed_precision,
    )
    del unet
    frozen = {**teacher.params, **null_text_of(teacher), "schedule": stage.schedule}
    if flags.generator_lora:
        frozen["teacher"] = frozen["unet"]
    others = {name: params for name, params in teacher.params.items() if name != "unet"}
    student = dataclasses.replace(teacher, params=others, schedule=generator_schedule(stage.schedule, flags))
    teacher.params.pop("unet")  # on the device it is a target like the others

    teacher_steps = steps_of_teacher(teacher.schedule)

    @functools.cache
    def by_teacher() -> np.ndarray:
        unet = sharding.put(stage.mesh, stage.load_unet(optim.compute_dtype(args.mixed_precision)))
        scales = {"guidance_scale": args.teacher_guidance_scale}
        return generate_with(teacher, {"unet": unet}, stage.samples, steps=teacher_steps, **scales)

    def unet_of(state: Any) -> Params:
        return generator_unet(state.generator.result, stage.load_unet() if flags.generator_lora else {})

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        made = generate_with(student, {"unet": sharding.put(stage.mesh, unet_of(state))}, stage.samples)
        rows = {"given": stage.samples.conditions, f"teacher, {teacher_steps} steps": by_teacher()}
        rows |= {f"generator, {len(flags.timesteps)}": made, "data": stage.samples.pictures}
        return {"samples": labeled_rows(rows)}

    def export(state: Any, folder: Path) -> None:
        save_trained(args, student, folder, {"unet": (student.modules["unet"], unet_of(state))})
        if flags.generator_lora:
            save_lora(folder, {"unet": state.generator.result["unet_lora"]})

    def export_too(state: Any, step: int) -> None:
        export(state, Path(args.output_dir) / f"step-{step}")

    step = functools.partial(
        disback.train_step,
        config=stage.config,
        optimizers=optimizers,
        accumulation=args.gradient_accumulation_steps,
    )
    with contextlib.closing(_targets(stage, frozen, path)) as targets:
        loop.train(
            step,
            state,
            targets,
            stage.loader,
            args,
            mesh=stage.mesh,
            validate=validate,
            record=loop.Record(export_too, args.export_steps) if args.export_steps else None,
            export=export,
            run_config=run_config,
        )


def _begin(args: Any, run_config: Mapping[str, Any]) -> Stage:
    """Everything up to the training itself, in an order that lets mistakes come out before long work."""
    flags = disback.DisbackFlags.of(args)
    args = loop.start(args, run_config)
    condition = args.condition if args.controlnet_model_name_or_path or args.task == "edit" else None
    has_images = flags.needs_images or condition is not None
    data = open_training_data(args, condition, has_images=has_images)
    samples = validation_samples(args, condition, has_images=has_images)
    schedule = pretrained_schedule(args)
    generator_schedule(schedule, flags)  # or it refuses
    mesh = sharding.make_mesh(args.fsdp)
    teacher = load_pretrained(args, mesh, args.controlnet_model_name_or_path)
    _require_teacher(teacher, condition)
    modules, vae = modules_of(teacher, ("unet",), args), teacher.modules["vae"].config
    side = args.resolution // vae.downscale
    config = Config(Generator(modules, flags, (side, side, vae.latent_channels)), flags)
    loader = load_batches(args, teacher, data, condition)
    return Stage(args, flags, schedule, teacher, config, loader, samples, mesh)


def _targets(stage: Stage, frozen: dict[str, Any], path: DegradationPath | None) -> MovingTarget:
    """What the generator is led to at each step: along the path to the teacher, or the teacher alone."""
    dtype = optim.compute_dtype(stage.args.mixed_precision)
    unet = frozen.pop("unet")
    if path is None:
        return MovingTarget(frozen, [lambda: unet], lambda _: 0, stage.mesh)
    nodes = [functools.partial(path.load, number, dtype) for number in reversed(range(len(path.nodes)))]
    # A LoRA needs the teacher at every step; else it is read again, since until then it would only take memory.
    is_there = stage.flags.generator_lora
    targets = [*nodes, (lambda: unet) if is_there else functools.partial(stage.load_unet, dtype)]
    return MovingTarget(frozen, targets, lambda step: disback.target_index(step, stage.flags, len(nodes)), stage.mesh)


def _path_folder(args: Any) -> Path:
    return Path(args.output_dir, "path") if args.path is None else Path(args.path).expanduser()


def _require_arrival(num_steps: int, flags: disback.DisbackFlags, num_nodes: int) -> None:
    if disback.target_index(num_steps - 1, flags, num_nodes) < num_nodes:
        needed = ((num_nodes - 1) * flags.interval - 1) * flags.dfake_gen_update_ratio + 1
        raise ValueError(
            f"--max_train_steps {num_steps} ends before the target is the teacher, which it is after {needed} steps: "
            f"train for longer, or lower --interval {flags.interval}."
        )


def _require_teacher(teacher: DiffusionPipeline, condition: ConditionOf) -> None:
    if teacher.modules["unet"].config.time_cond_proj_dim is not None or teacher.schedule.generator_timesteps:
        raise ValueError("the teacher has been distilled already: give the model that it was distilled from.")
    if teacher.task == "inpaint":
        raise ValueError("the teacher is for the task 'inpaint', which DisBack is not implemented for.")
    if teacher.task == "edit" and condition is None:
        raise ValueError(
            "the teacher is an InstructPix2Pix model: give --task edit, and name the columns of the data with "
            "--conditioning_image_column, --caption_column and --image_column."
        )
