"""The only training loop: data, step, metrics, validation, checkpoints.

It does not know which method it trains. It is given a step, ``train_step(state, frozen, batch) -> (state, metrics)``,
and only knows that the state is a tree with a ``step``, and that the metrics are scalars by name.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from codi_jax.cli.flags import Adjustable, Local, Operational, Scope
from codi_jax.io import processes
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.models import sharding
from codi_jax.training import publish, run_folder
from codi_jax.training.buffers import forget, own_buffers
from codi_jax.training.checkpoint import (
    CheckpointError,
    CheckpointFlags,
    Checkpoints,
    check_run_config,
    find_checkpoint,
    require_whole,
    saved_run_config,
    set_damaged_aside,
    step_of,
)
from codi_jax.training.monitor import Metrics, Monitor
from codi_jax.training.publish import HubFlags
from codi_jax.training.replicas import check_replicas
from codi_jax.training.signals import stop_signals
from codi_jax.training.tracking import Profiler, Tracker, TrackingFlags, log
from codi_jax.training.watchdog import Watchdog

State = TypeVar("State")
Pictures = dict[str, UInt8[np.ndarray, "h w 3"]]
TrainStep = Callable[[State, Any, Any], tuple[State, Metrics]]

# Steps that may be in flight while the host prepares the next: enough to keep the device busy, few enough for accurate
# timing and a prompt stop.
_IN_FLIGHT = 2
_MAX_SKIPPED_IN_A_ROW = 25
_BATCH = "batch_size"  # of all devices and passes, among a checkpoint's settings
# On CPUs, XLA uses YNNPACK for products and convolutions, with which a training step takes 1.1 times as long as with
# Eigen. This is for JAX 0.10; other versions may not know the option.
CPU_OPTIONS: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}


@runtime_checkable
class Loader(Protocol):
    """An endless stream of batches, and the position in it."""

    samples_per_epoch: int | None

    def __next__(self) -> Any:
        """This process's share of the next batch, a tree of NumPy arrays."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position after the batches returned so far, JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position."""
        ...

    def close(self) -> None:
        """Stops reading ahead."""
        ...


@runtime_checkable
class Moving(Protocol):
    """Frozen trees that can change between steps, such as a moving target."""

    def at(self, step: int) -> Any:
        """The trees for the step after ``step`` steps.

        They are already on the mesh and have the same structure, shapes and shardings at every step, since one program
        takes them all. This is called before every step and must not wait for the device.
        """
        ...

    def close(self) -> None:
        """Stops reading ahead."""
        ...


@dataclass(frozen=True)
class _Constant:
    """Frozen trees that never change."""

    trees: Any

    def at(self, _: int) -> Any:
        return self.trees

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Recorder:
    """Writes something periodically during a run, besides its checkpoints.

    Attributes:
      write: called with the state and the number of steps done; before the checkpoint of the same step, so that
        everything that a resumed run does not write again exists.
      every: the number of steps between two calls.
    """

    write: Callable[[Any, int], None]
    every: int


@dataclass(frozen=True)
class LoopFlags(CheckpointFlags, TrackingFlags, HubFlags):
    """Flags of the training loop."""

    output_dir: Adjustable[str] = "runs/{timestamp}"
    """Folder for checkpoints, logs and the trained model; {timestamp} is replaced by the time."""
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
    validation_steps: Operational[int] = 100
    """Steps between validations, if there is something to validate; 0 validates only at the end."""
    validate_at_start: Operational[bool] = False
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
    if flags.resume_from_checkpoint == "latest":
        for line in set_damaged_aside(output_dir):
            log(line)
    checkpoint = find_checkpoint(flags.resume_from_checkpoint, output_dir)
    if checkpoint is not None:
        if flags.resume_from_checkpoint != "latest":  # which is intact by now
            require_whole(checkpoint)
        _check_resumed(checkpoint, run_config, _keeping_batch(flags))
    else:
        if flags.resume_from_checkpoint is not None:
            log(f"{output_dir} has no checkpoint: starting from scratch")
        run_folder.check_arguments(flags, output_dir)
    if flags.push_to_hub:
        publish.create_repository(flags, output_dir)
    run_folder.write_arguments(flags, output_dir)


def train(
    train_step: TrainStep[State],
    state: State,
    frozen: Any,
    loader: Loader,
    flags: LoopFlags,
    *,
    mesh: Mesh,
    validate: Callable[[State, int], Pictures] | None = None,
    record: Recorder | None = None,
    export: Callable[[State, Path], None] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> State:
    """Trains to the end, from the start or from a checkpoint.

    Args:
      train_step: pure and not jitted; takes the state, the frozen trees and a batch, and returns the state and scalars.
      state: the initial state, with a field ``step``. Its arrays are donated: use the returned state instead.
      frozen: trees that the step reads but does not change; or an object that has each step's trees, see `Moving`.
      loader: yields batches; it is closed at the end.
      flags: the loop's flags.
      mesh: from `codi_jax.models.sharding.make_mesh`.
      validate: makes images by name from the state.
      record: writes something of the state periodically.
      export: writes the trained model into a folder.
      run_config: what a resumed run must share beyond its flags, JSON; saved in every checkpoint.

    Returns:
      The trained state.

    Raises:
      ValueError: if a checkpoint does not fit, or the batch does not divide among the devices.
      OSError: if a checkpoint cannot be written.
      FloatingPointError: if consecutive steps gave non-finite values.
      ReplicaError: if devices differ that should be equal, see ``--check_replicas``.
      SystemExit: after SIGTERM or SIGINT, when the step is finished and a checkpoint is on disk.
    """
    output_dir, run_config = Path(flags.output_dir), run_config or {}
    total = num_steps(flags, loader.samples_per_epoch)
    checkpoint = find_checkpoint(flags.resume_from_checkpoint, output_dir)
    if checkpoint is not None:
        _check_resumed(checkpoint, run_config, flags)
    first = 0 if checkpoint is None else step_of(checkpoint)
    frozen = frozen if isinstance(frozen, Moving) else _Constant(sharding.put(mesh, frozen))
    with contextlib.closing(loader), contextlib.closing(frozen), contextlib.ExitStack() as stack:
        state = own_buffers(sharding.put(mesh, state), frozen.at(first))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(output_dir, flags.checkpoints_total_limit)))
        if checkpoint is not None:
            state, position = checkpoints.restore(checkpoint, forget(state))
            loader.set_state(position)
            log(f"resuming from {checkpoint}")
        tracker = Tracker(flags, output_dir, flags.values_within(Scope.PROCESS), first)
        stack.enter_context(contextlib.closing(tracker))
        if first < total:
            run = _Run(
                flags, mesh, first, total, tracker, checkpoints, validate, record, _complete(run_config, flags),
                flags.steps_between_validations(loader.samples_per_epoch),
            )  # fmt: skip
            state = _loop(train_step, state, frozen, loader, run)
    if export is not None:
        export(state, output_dir)
    if jax.process_index() == 0:
        if flags.push_to_hub:
            publish.upload(flags, output_dir)
        run_folder.unlock(output_dir)
    processes.wait_for_all("the model is saved")
    return state


def _complete(run_config: Mapping[str, Any], flags: LoopFlags) -> dict[str, Any]:
    """Adds what every run has: its flags, and the global batch size, since the number of devices may change."""
    return {**flags.values_within(Scope.RUN), **run_config, _BATCH: global_batch_size(flags)}


def _keeping_batch(flags: Args) -> Args:
    """The flags of a run that resumes on another number of devices, with the passes that keep its global batch.

    Unchanged if there is no such number of passes, or nothing to resume; or if no number of devices explains the global
    batch, since the flags are other ones then.
    """
    checkpoint = find_checkpoint(flags.resume_from_checkpoint, Path(flags.output_dir))
    batch = None if checkpoint is None else saved_run_config(checkpoint).get(_BATCH)
    pass_size, of_device = flags.train_batch_size * jax.device_count(), global_batch_size(flags, 1)
    if not isinstance(batch, int) or batch < 1 or batch % of_device or batch % pass_size:
        return flags
    passes = batch // pass_size
    unchanged = passes == flags.gradient_accumulation_steps
    return flags if unchanged else dataclasses.replace(flags, gradient_accumulation_steps=passes)


def _check_resumed(checkpoint: Path, run_config: Mapping[str, Any], flags: LoopFlags) -> None:
    """Raises `CheckpointError` if a checkpoint is from a run with other settings."""
    batch, here = saved_run_config(checkpoint).get(_BATCH), global_batch_size(flags)
    if batch is not None and batch != here:
        raise CheckpointError(
            f"{checkpoint} was made with a global batch of {batch}, but this run has {here}: --train_batch_size "
            f"{flags.train_batch_size} times --gradient_accumulation_steps {flags.gradient_accumulation_steps} times "
            f"{jax.device_count()} devices. Change the flags so that it stays {batch}."
        )
    # An older checkpoint does not know newer flags.
    check_run_config(checkpoint, _complete(run_config, flags), if_both=flags.names())


@dataclass(frozen=True)
class _Run:
    """Everything that stays the same from the first step to the last."""

    flags: LoopFlags
    mesh: Mesh
    first: int
    total: int
    tracker: Tracker
    checkpoints: Checkpoints
    validate: Callable[[Any, int], Pictures] | None
    record: Recorder | None
    config: dict[str, Any]
    validation_steps: int

    def saves_at(self, step: int) -> bool:
        every = self.flags.checkpointing_steps
        return every > 0 and (step % every == 0 or step == self.total)

    def validates_at(self, step: int) -> bool:
        every = self.validation_steps
        return self.validate is not None and (step == self.total or (every > 0 and step % every == 0))


def _loop(train_step: TrainStep[State], state: State, frozen: Moving, loader: Loader, run: _Run) -> State:
    """The steps ``first + 1`` to ``total``."""
    batch, position = _fetch(loader, run.mesh)
    with contextlib.ExitStack() as stack:
        if run.flags.debug:
            # Not `jax.config.update`: JAX ignores that in a thread that has used the context manager before.
            stack.enter_context(jax.debug_nans(True))
        stack.enter_context(sharding.context_of(state))
        program = _compile(train_step, state, frozen.at(run.first), batch, run)
        monitor = stack.enter_context(contextlib.closing(_monitor(run, batch)))
        profiler = Profiler(run.flags, Path(run.flags.output_dir), run.first, monitor.pause)
        stack.enter_context(contextlib.closing(profiler))
        profiler.memory("initial")
        if run.validate is not None and run.flags.validate_at_start and run.first == 0:
            _validate(state, 0, run, monitor, profiler)
        stopped_by = stack.enter_context(stop_signals())
        for step in range(run.first + 1, run.total + 1):
            profiler.before(step)
            state, metrics = program(state, frozen.at(step - 1), batch)
            monitor.add(step, metrics)
            position_here = position
            try:
                if step < run.total:
                    with monitor.waiting_for_data():
                        batch, position = _fetch(loader, run.mesh)
            except Exception:
                # Ctrl-C also reaches the loader's processes.
                if not stopped_by(step):
                    raise
            monitor.settle(0 if run.flags.debug else _IN_FLIGHT)
            stop = stopped_by(step)
            if run.flags.check_replicas and (step % run.flags.check_replicas == 0 or run.saves_at(step)):
                with monitor.pause():
                    check_replicas(run.mesh, state, step)
            if run.record is not None and step % run.record.every == 0:
                with monitor.pause():
                    run.record.write(state, step)
            if run.saves_at(step) or (stop and run.flags.checkpointing_steps):
                with monitor.pause():
                    run.checkpoints.save(step, state, position_here, run.config)
            if stop:
                monitor.settle()
                _exit_after_signal(step, stop, run)
            if run.validates_at(step):
                _validate(state, step, run, monitor, profiler)
        monitor.settle()
        profiler.memory("final")
    return state


def _fetch(loader: Loader, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """The next batch on the devices, and the position after it, which belongs to the step that uses it."""
    batch = sharding.to_global(mesh, next(loader))
    return batch, loader.get_state()


def _compile(train_step: TrainStep[State], state: State, frozen: Any, batch: Any, run: _Run) -> Any:
    """Compiles the step ahead of time, so that no step's timing includes compilation."""
    # To find a NaN, JAX repeats the step, so the state must still exist.
    jitted = jit_step(train_step, state, run.mesh, donate=not run.flags.debug)
    if run.flags.debug:
        return jitted
    began = time.perf_counter()
    program = compile_for(run.mesh.devices.flat[0].platform, jitted.lower(state, frozen, batch))
    devices = f"{run.mesh.size} × {run.mesh.devices.flat[0].device_kind}"
    log(f"compiled the step in {time.perf_counter() - began:.1f} s for {devices}")
    return program


def jit_step(train_step: TrainStep[State], state: State, mesh: Mesh, *, donate: bool = True) -> Any:
    """The step as the loop compiles it.

    Args:
      train_step: see `train`.
      state: the arrays, or their shapes with shardings.
      mesh: the mesh that they are on.
      donate: whether the state is overwritten.
    """
    # The state must come out as it went in, or the next step would not accept it.
    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=0 if donate else (), out_shardings=out_shardings)


def compile_for(platform: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a training step with options that make it fast on a platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    if platform == "cpu":
        # Another version of XLA may not know the options. Any other error recurs in the line below.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return lowered.compile(CPU_OPTIONS)
    return lowered.compile()


def _monitor(run: _Run, batch: Any) -> Monitor:
    def on_report(step: int, values: Mapping[str, float]) -> None:
        _check_finite(values, step)
        run.checkpoints.check()

    return Monitor(
        run.tracker,
        every=run.flags.logging_steps,
        first=run.first,
        total=run.total,
        batch_size=jax.tree.leaves(batch)[0].shape[0],
        on_report=on_report,
        watchdog=Watchdog(run.flags.hang_timeout),
    )


def _validate(state: Any, step: int, run: _Run, monitor: Monitor, profiler: Profiler) -> None:
    assert run.validate is not None
    with monitor.pause(), profiler.validation():
        run.tracker.pictures(run.validate(state, step), step)


def _exit_after_signal(step: int, number: int, run: _Run) -> None:
    """Ends the process after a signal, with the exit status that shells expect."""
    message = f"stopped by {signal.Signals(number).name} after step {step}"
    if run.flags.checkpointing_steps:
        run.checkpoints.wait()
        message += f" and saved checkpoint-{step}: resume with --resume_from_checkpoint latest"
    log(message)
    raise SystemExit(128 + number)


def _check_finite(values: Mapping[str, float], step: int) -> None:
    if values.get("skipped_in_a_row", 0) >= _MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"The last {int(values['skipped_in_a_row'])} steps up to {step} gave a loss or gradients that are not "
            "finite, and changed nothing. Resume from an earlier checkpoint with a lower --learning_rate or "
            "--max_grad_norm, or with --mixed_precision bf16 or no; --debug says where the first NaN comes from."
        )


def _configure_jax(flags: LoopFlags) -> None:
    keep_compiled_programs(flags.ccache)
    if flags.allow_tf32:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
