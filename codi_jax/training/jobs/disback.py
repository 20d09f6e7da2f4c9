"""The two stages of DisBack as runs: recording the degradation path, and walking it back."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from codi_jax.cli.flags import Adjustable, Flags, ForValidation, Operational
from codi_jax.cli.outputs import file_in_place_of
from codi_jax.data import ConditionOf, PromptFlags
from codi_jax.io.checksums import digest_of
from codi_jax.methods import disback
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Frozen
from codi_jax.training import optim, teacher
from codi_jax.training.degradation_path import (
    PATH_NAME,
    DegradationPath,
    MovingTarget,
    check_identity,
    finish_path,
    open_path,
    write_node,
)
from codi_jax.training.flags import ConditionFlags, Shown, TrainingFlags
from codi_jax.training.loop import Recorder
from codi_jax.training.run import Hooks, Run, run

NO_PATH = "none"
"""The value of ``--path`` for plain distribution matching."""


@dataclass(frozen=True, kw_only=True)
class ReferenceFlags(Flags):
    """Flags of the reference code that are not needed here, so that its commands can be typed."""

    use_fp16: bool = False
    """The same as --mixed_precision bf16: the reference computes in bfloat16 with it."""
    sdxl: Operational[bool] = False
    """Has no effect: the model's family is read from its folder."""
    latent_resolution: Operational[int | None] = None
    """Has no effect: it follows from --resolution and the autoencoder."""
    initialie_generator: Operational[bool] = False
    """Has no effect: the generator starts as the teacher, or as --generator_ckpt_path says."""
    start_target_num: Operational[int | None] = None
    """Has no effect: a path is walked from its last node."""
    denoising_loss_weight: Operational[float] = 1.0
    """Has no effect, nor is it used in the reference code."""
    grid_size: Operational[int | None] = None
    """Has no effect: --num_validation_images says how many images are shown."""
    log_loss: Operational[bool] = False
    """Has no effect: losses are always logged."""
    wandb_name: Operational[str | None] = None
    """Has no effect: runs are named by Weights & Biases."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "latent_resolution", "grid_size")
        self.require_at_least(0, "start_target_num", "denoising_loss_weight")


@dataclass(frozen=True, kw_only=True)
class DisbackRunFlags(ConditionFlags, PromptFlags, ReferenceFlags, disback.DisbackFlags, TrainingFlags):
    """The flags of a run of DisBack."""

    pretrained_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--model_id"])]
    """The teacher: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    stage: Adjustable[Literal["degradation", "backtracking", "both"]] = "both"
    """degradation records the path, backtracking trains the generator along it."""
    path: Adjustable[Annotated[str | None, tyro.conf.arg(aliases=["--trajectory_dir"])]] = None
    """Folder of the path. Default: path in --output_dir. none, with --stage backtracking, uses the teacher as the
    target throughout: plain distribution matching."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet that the teacher is distilled with, and that the generator keeps unchanged."""
    train_data_dir: str | None = None
    """Folder of a data set. Its captions are the prompts; its images are read if needed: for the GAN loss, for
    --denoising without --backward_simulation, and for conditions."""
    real_image_path: Adjustable[str | None] = None
    """The same, but ignored if no images are needed; if they are, --train_prompt_path is ignored."""
    max_train_steps: Annotated[int | None, tyro.conf.arg(aliases=["--train_iters"])] = None
    """Total number of backtracking steps, including those before a resume: each updates the fake score, and every
    --dfake_gen_update_ratio-th one also the generator."""
    train_batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch_size"])] = 1
    """Examples per device and forward pass."""
    learning_rate: float = 5e-7
    """The learning rate, after warm-up; the default is for full-size models."""
    lr_warmup_steps: Annotated[int, tyro.conf.arg(aliases=["--warmup_step"])] = 500
    """Number of updates of each network over which its learning rate rises from 0; constant has no warm-up."""
    max_grad_norm: float = 10.0
    """Gradients of each network are scaled down to this norm; inf for no limit."""
    checkpointing_steps: Annotated[int, tyro.conf.arg(aliases=["--log_iters"])] = 500
    """Steps between checkpoints, in both stages; 0 for none."""
    generator_ckpt_path: Annotated[str | None, tyro.conf.arg(aliases=["--ckpt_only_path"])] = None
    """Where the generator starts: a UNet of the teacher's architecture, as a file of any format or a folder, such as
    DMD2's checkpoint or the --output_dir of another run. Default: the teacher."""
    output_dir: Annotated[str, tyro.conf.arg(aliases=["--output_path"])] = "runs/{timestamp}"
    """Folder for checkpoints, logs and the trained model; {timestamp} is replaced by the time."""
    logging_dir: Annotated[str, tyro.conf.arg(aliases=["--log_path"])] = "logs"
    """Folder for TensorBoard's files, in --output_dir."""
    logging_steps: Annotated[int, tyro.conf.arg(aliases=["--wandb_iters"])] = 100
    """Steps between reports of the metrics."""
    teacher_guidance_scale: ForValidation[float] = 7.5
    """Guidance scale of the teacher in validation images."""
    lora_dropout: float = 0.0
    """Must be 0: a LoRA is trained without dropout here."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "teacher_guidance_scale")
        self.require("lora_dropout", self.lora_dropout == 0, "0")
        if self.path not in (None, NO_PATH) and (file := file_in_place_of(Path(self.path or ""))):
            raise ValueError(f"--path {self.path} is not possible: {file} is a file, but must be a folder.")
        if self.path == NO_PATH and self.stage != "backtracking":
            raise ValueError("--path none only needs the second stage: give --stage backtracking with it.")

    @property
    def controlnet(self) -> str | None:
        return self.controlnet_model_name_or_path

    @property
    def condition(self) -> ConditionOf:
        return super().condition if self.controlnet_model_name_or_path or self.task == "edit" else None

    @property
    def reads_images(self) -> bool:
        return self.needs_images or self.condition is not None

    @property
    def shown(self) -> Shown:
        return Shown(teacher_scales={"guidance_scale": self.teacher_guidance_scale})


def distill(args: DisbackRunFlags) -> None:
    """Runs the stages that the flags ask for.

    Args:
      args: the script's arguments.

    Raises:
      ValueError: if flags, model, data and path do not fit each other.
    """
    if args.use_fp16:
        args = replace(args, mixed_precision="bf16")
    if args.plan is None:
        args.check()  # a plan needs no data
    elif args.stage == "both":
        args = replace(args, stage="backtracking")  # the larger one
    is_resumed = args.stage == "both" and args.resume_from_checkpoint is not None
    is_recorded = is_resumed and (_path_folder(args) / PATH_NAME).is_file()
    if args.stage != "backtracking" and not is_recorded:
        args = record_path(args)
    if args.stage != "degradation":
        backtrack(args)


def record_path(args: DisbackRunFlags) -> DisbackRunFlags:
    """Stage 1: a run in ``degradation`` of the output folder, which writes the path.

    Args:
      args: as in `distill`.

    Returns:
      The arguments, with the output folder filled in.

    Raises:
      ValueError: as in `distill`.
    """
    # If both stages run, a checkpoint's name refers to the second.
    resume = args.resume_from_checkpoint and "latest" if args.stage == "both" else args.resume_from_checkpoint
    stage = replace(
        args,
        output_dir=str(Path(args.output_dir) / "degradation"),
        checkpoint_dir=None,  # they are of no use without the path, which is in the output folder
        max_train_steps=args.num_nodes * args.degradation_interval,
        resume_from_checkpoint=resume,
        push_to_hub=False,
    )
    stage = run(disback.degradation(args.resolution), stage, hooks=_recording(args), identity={"stage": "degradation"})
    return replace(args, output_dir=str(Path(stage.output_dir).parent))


def backtrack(args: DisbackRunFlags) -> None:
    """Stage 2: trains the generator along a recorded path, or without one, and writes it.

    Args:
      args: as in `distill`.

    Raises:
      ValueError: as in `distill`.
    """
    if args.path == NO_PATH:
        method, hooks, identity = (
            disback.backtracking(args.resolution, False),
            Hooks(check=_check_teacher, load=_start(args)),
            {"path": NO_PATH},
        )
    elif args.plan is not None:  # the path need not be there yet
        method, hooks, identity = disback.backtracking(args.resolution, True), Hooks(), {}
    else:
        path = open_path(_path_folder(args))
        method, hooks = disback.backtracking(args.resolution, True), _walking(path, args)
        identity = {"path": path.fingerprint}
    run(method, args, hooks=hooks, identity=identity)


def _start(args: DisbackRunFlags) -> dict[str, Callable[[], Params]]:
    """What reads the generator's start into host memory, if it is not the teacher."""
    if args.generator_ckpt_path is None:
        return {}

    def read() -> Params:
        opened = teacher.open_teacher(args)
        source = {**opened.sources["unet"], "weights": args.generator_ckpt_path}
        return teacher.load_on_host(opened.with_network("unet", opened.networks.unet, source=source), "unet")

    return {"generator": read}


def _identity(args: DisbackRunFlags, this: Run, teacher_digest: str) -> dict[str, Any]:
    """A path's identity: the teacher and the generator, by the digests of their float32 UNets."""
    return {
        "model": args.pretrained_model_name_or_path,
        "teacher": teacher_digest,
        "generator": None if args.generator_ckpt_path is None else digest_of(this.load("generator")),
        "controlnet": args.controlnet_model_name_or_path,
        "timesteps": list(args.timesteps),
    }


def _path_folder(args: DisbackRunFlags) -> Path:
    return Path(args.output_dir, "path") if args.path is None else Path(args.path).expanduser()


def _check_teacher(this: Run) -> None:
    if this.model.task == "edit" and this.args.condition is None:
        raise ValueError(
            "the teacher is an InstructPix2Pix model: give --task edit, and name the columns of the data with "
            "--conditioning_image_column, --caption_column and --image_column."
        )


def _check_arrival(num_steps: int, args: DisbackRunFlags, num_nodes: int) -> None:
    if disback.target_index(num_steps - 1, args, num_nodes) < num_nodes:
        needed = ((num_nodes - 1) * args.interval - 1) * args.dfake_gen_update_ratio + 1
        raise ValueError(
            f"--max_train_steps {num_steps} ends before the target is the teacher, which it is after {needed} steps: "
            f"train for longer, or lower --interval {args.interval}."
        )


def _recording(args: DisbackRunFlags) -> Hooks:
    """A run that writes its state as a node of the path every few steps, and whose result is the path."""
    identity: dict[str, Any] = {}

    def folder(this: Run) -> Path:
        return _path_folder(replace(this.args, output_dir=str(Path(this.args.output_dir).parent)))

    def check(this: Run) -> None:
        _check_teacher(this)
        # Now, because the teacher's float32 parameters are not kept.
        identity.update(_identity(args, this, digest_of(this.load("unet"))))

    def frozen(this: Run, constant: Frozen) -> Frozen:
        if args.generator_ckpt_path is None:
            return constant
        this.model = this.model.without_params("unet")  # the generator takes its place
        dtype = optim.compute_dtype(args.mixed_precision)
        start = jax.tree.map(lambda leaf: leaf.astype(dtype), this.load("generator"))
        return replace(constant, params={**constant.params, "unet": start})

    def record(this: Run) -> Recorder:
        interval = this.args.degradation_interval

        def write(state: Any, step: int) -> None:
            unet = this.model.networks.unet
            write_node(folder(this), step // interval - 1, unet, state.params["unet"], this.args.save_dtype)

        return Recorder(write, interval)

    def finish(this: Run, state: Any, output_dir: Path) -> None:
        del state, output_dir
        finish_path(folder(this), args.num_nodes, {**identity, "interval": args.degradation_interval})

    return Hooks(load=_start(args), check=check, frozen=frozen, record=record, show=None, write=finish)


def _walking(path: DegradationPath, args: DisbackRunFlags) -> Hooks:
    """A run whose target moves from node to node of a path, and finally to the teacher."""

    def check(this: Run) -> None:
        _check_teacher(this)
        check_identity(path, _identity(args, this, digest_of(this.load("unet"))))
        _check_arrival(this.num_steps, args, len(path.nodes))

    def frozen(this: Run, constant: Frozen) -> MovingTarget:
        dtype = optim.compute_dtype(args.mixed_precision)
        nodes = [functools.partial(path.load, number, dtype) for number in reversed(range(len(path.nodes)))]
        # A LoRA needs the teacher at every step; otherwise it is read again later, to save memory until then.
        without_params = this.model.replace(params={})
        last = functools.partial(teacher.load_on_host, without_params, "unet", dtype)
        if args.generator_lora:
            last = functools.partial(constant.params.__getitem__, "unet")

        def index_at(step: int) -> int:
            return disback.target_index(step, args, len(nodes))

        return MovingTarget(constant, [*nodes, last], index_at, this.mesh)

    end = functools.partial(path.load, -1, np.float32)
    return Hooks(load={"path_end": end, **_start(args)}, check=check, frozen=frozen)
