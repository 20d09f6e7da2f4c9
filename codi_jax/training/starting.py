"""The start of a run: its flags, what it must share with a run that it resumes, and its folder."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
from etils import epath

from codi_jax.cli.flags import Adjustable, ForValidation, Local, Operational, Scope, Topic
from codi_jax.cli.progress import heartbeat
from codi_jax.io import processes
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.models import sharding
from codi_jax.training import publish, run_folder
from codi_jax.training.checkpoint import (
    CheckpointError,
    CheckpointFlags,
    check_run_config,
    find_checkpoint,
    is_remote,
    require_whole,
    saved_run_config,
    set_damaged_aside,
    store_errors,
)
from codi_jax.training.publish import HubFlags
from codi_jax.training.tracking import TrackingFlags, log

_BATCH = "batch_size"  # of all devices and passes, among a checkpoint's settings


@dataclass(frozen=True)
class LoopFlags(CheckpointFlags, TrackingFlags, HubFlags):
    """Flags of the training loop."""

    topic: ClassVar[Topic] = Topic.RUN

    output_dir: Adjustable[str] = "runs/{timestamp}"
    """Folder for checkpoints, logs and the trained model; {timestamp} is replaced by the time. On this machine; for
    checkpoints elsewhere see --checkpoint_dir."""
    seed: int = 0
    """Seed for all randomness."""
    train_batch_size: Adjustable[int] = 1
    """Examples per device and forward pass."""
    gradient_accumulation_steps: Adjustable[int] = 1
    """Passes whose gradients are accumulated into one step. A run that resumes on another number of devices takes as
    many as keep the global batch."""
    num_train_epochs: Adjustable[int] = 100
    """Passes through the data, if --max_train_steps is not given."""
    max_train_steps: Adjustable[int | None] = None
    """Total number of steps (parameter updates), including those before a resume."""
    validation_steps: ForValidation[int] = 100
    """Steps between validations, if there is something to validate; 0 validates only at the end."""
    validate_at_start: ForValidation[bool] = False
    """Also validate before the first step."""
    fsdp: Adjustable[int] = 1
    """Number of devices to split parameters and optimizer over; 1 keeps a copy on every device."""
    ccache: Local[Path] = Path("~/.cache/codi_jax/xla")
    """Folder for caching compiled programs, which makes the next start faster."""
    allow_tf32: bool = False
    """Let float32 products use TF32 on every GPU that has it; JAX does so by default on most."""
    peer_timeout: Operational[int] = 60
    """Seconds without a sign of life after which another process of the run counts as lost, and all end."""
    hang_timeout: Operational[int] = 1800
    """Seconds that a step, or reading its data, may take before the run ends and says where it hangs; 0 for no
    limit."""
    check_replicas: Operational[int] = 0
    """Steps between comparisons of the devices' copies of the state, which end the run if a device computes wrongly; 0
    for none. With --fsdp equal to the number of devices there are no copies."""
    debug: Operational[bool] = False
    """Stop at the first NaN and report which operation made it; waits for every step. Slow."""
    local_rank: Local[int] = -1
    """Has no effect: JAX finds its processes automatically."""

    def steps_between_validations(self, samples_per_epoch: int | None) -> int:
        """``validation_steps``, unless a script uses another flag."""
        del samples_per_epoch
        return self.validation_steps

    def check(self) -> None:
        super().check()
        self.require_at_least(
            1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "fsdp"
        )
        self.require_at_least(0, "validation_steps", "check_replicas", "hang_timeout")
        if is_remote(self.output_dir):
            raise ValueError(
                f"--output_dir {self.output_dir} has to be on this machine: use --checkpoint_dir to keep checkpoints "
                "on an object store."
            )
        self.require_at_least(5, "peer_timeout")


Args = TypeVar("Args", bound=LoopFlags)


def global_batch_size(flags: LoopFlags, devices: int | None = None) -> int:
    """The number of examples in one step, over all devices (default: those that there are) and passes."""
    return flags.train_batch_size * flags.gradient_accumulation_steps * (devices or jax.device_count())


def num_steps(flags: LoopFlags, samples_per_epoch: int | None) -> int:
    """The number of steps of the complete run.

    Raises:
      ValueError: if ``--max_train_steps`` is not given, and the number of examples is unknown or zero.
    """
    if flags.max_train_steps is not None:
        return flags.max_train_steps
    if samples_per_epoch is None:
        raise ValueError("--max_train_steps is needed: with streaming, the number of steps in an epoch is unknown.")
    if samples_per_epoch < 1:
        raise ValueError("There is not a single example to train on: check the flags about data.")
    # The batch already includes the accumulation passes, so the division happens only once.
    return math.ceil(flags.num_train_epochs * samples_per_epoch / global_batch_size(flags))


def start(flags: Args, run_config: Mapping[str, Any] | None = None) -> Args:
    """Starts a run: checks everything that can be wrong with it, except model and data.

    Joins the other processes, sets JAX up, fills in ``output_dir``, and writes the arguments there.

    Returns:
      The flags with the folder filled in.

    Raises:
      ValueError: if a flag makes no sense, the folder holds another run, or the checkpoint to resume from is missing or
        does not fit.
      OSError: if the folder cannot be written.
    """
    flags.check()
    processes.initialize(flags.peer_timeout)
    everything = flags.values_within(Scope.START)
    processes.agree("flags", {f"--{name}": value for name, value in everything.items()}, "give all the same command")
    processes.agree("code", {"version": processes.code_version()}, "install the same version on all machines")
    if flags.local_rank != -1:
        log("--local_rank has no effect: JAX finds its processes automatically")
    _configure_jax(flags)
    sharding.make_mesh(flags.fsdp)
    flags = dataclasses.replace(flags, output_dir=run_folder.fill_in(flags.output_dir))
    if jax.process_index() == 0:
        _open_folder(flags, run_config or {})
    processes.wait_for_all("output_dir is open")
    kept = _keeping_batch(flags)
    if kept is not flags:
        log(
            f"--gradient_accumulation_steps is {kept.gradient_accumulation_steps} instead of "
            f"{flags.gradient_accumulation_steps}: with {jax.device_count()} devices this keeps the global batch of "
            f"{global_batch_size(kept)}"
        )
    return kept


def _open_folder(flags: LoopFlags, run_config: Mapping[str, Any]) -> None:
    """Locks the folder, unless it holds another run or cannot be resumed from."""
    output_dir = Path(flags.output_dir)
    run_folder.lock(output_dir)
    folder = flags.checkpoint_folder(output_dir)
    if not is_remote(folder):
        run_folder.lock(Path(folder))
    with store_errors(folder), heartbeat(f"looking for checkpoints in {folder}"):
        if flags.resume_from_checkpoint == "latest":
            for line in set_damaged_aside(folder):
                log(line)
        checkpoint = find_checkpoint(flags.resume_from_checkpoint, folder)
        if checkpoint is not None:
            if flags.resume_from_checkpoint != "latest":  # which is intact by now
                require_whole(checkpoint)
            check_resumed(checkpoint, run_config, _keeping_batch(flags))
    if checkpoint is None:
        if flags.resume_from_checkpoint is not None:
            log(f"{folder} has no checkpoint: starting from scratch")
        run_folder.check_arguments(flags, output_dir)
    if flags.push_to_hub:
        publish.create_repository(flags, output_dir)
    run_folder.write_arguments(flags, output_dir)
    if is_remote(folder):
        with store_errors(folder):  # a store that refuses to be written says so now, rather than hours later
            (folder / run_folder.CONFIG_NAME).write_text(run_folder.arguments(flags))


def complete_config(run_config: Mapping[str, Any], flags: LoopFlags) -> dict[str, Any]:
    """Adds what every run has: its flags, and the global batch size, since the number of devices may change."""
    return {**flags.values_within(Scope.RUN), **run_config, _BATCH: global_batch_size(flags)}


def _keeping_batch(flags: Args) -> Args:
    """The flags of a run that resumes on another number of devices, with the passes that keep its global batch.

    Unchanged if there is no such number of passes, or nothing to resume; or if no number of devices explains the global
    batch, since the flags are other ones then.
    """
    checkpoint = find_checkpoint(flags.resume_from_checkpoint, flags.checkpoint_folder(flags.output_dir))
    batch = None if checkpoint is None else saved_run_config(checkpoint).get(_BATCH)
    pass_size, of_device = flags.train_batch_size * jax.device_count(), global_batch_size(flags, 1)
    if not isinstance(batch, int) or batch < 1 or batch % of_device or batch % pass_size:
        return flags
    passes = batch // pass_size
    unchanged = passes == flags.gradient_accumulation_steps
    return flags if unchanged else dataclasses.replace(flags, gradient_accumulation_steps=passes)


def check_resumed(checkpoint: epath.Path, run_config: Mapping[str, Any], flags: LoopFlags) -> None:
    """Raises `CheckpointError` if a checkpoint is from a run with other settings."""
    batch, here = saved_run_config(checkpoint).get(_BATCH), global_batch_size(flags)
    if batch is not None and batch != here:
        raise CheckpointError(
            f"{checkpoint} was made with a global batch of {batch}, but this run has {here}: --train_batch_size "
            f"{flags.train_batch_size} times --gradient_accumulation_steps {flags.gradient_accumulation_steps} times "
            f"{jax.device_count()} devices. Change the flags so that it stays {batch}."
        )
    # An older checkpoint does not know newer flags.
    check_run_config(checkpoint, complete_config(run_config, flags), if_both=flags.names())


def _configure_jax(flags: LoopFlags) -> None:
    keep_compiled_programs(flags.ccache)
    if flags.allow_tf32:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
