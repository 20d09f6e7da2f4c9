"""The only training loop: data, step, metrics, validation, checkpoints.

It does not know which method it trains. It is given a step, ``train_step(state, frozen, batch) -> (state, metrics)``,
and only knows that the state is a tree with a ``step``, and that the metrics are scalars by name.
"""

import contextlib
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

from codi_jax.cli.flags import Scope
from codi_jax.cli.progress import heartbeat
from codi_jax.io import processes
from codi_jax.models import sharding
from codi_jax.training import publish, run_folder
from codi_jax.training.buffers import forget, own_buffers
from codi_jax.training.checkpoint import (
    Checkpoints,
    find_checkpoint,
    step_of,
)
from codi_jax.training.monitor import Metrics, Monitor
from codi_jax.training.replicas import check_replicas
from codi_jax.training.signals import stop_signals
from codi_jax.training.starting import LoopFlags, check_resumed, complete_config, num_steps
from codi_jax.training.tracking import Profiler, Tracker, log
from codi_jax.training.watchdog import Watchdog

State = TypeVar("State")
Pictures = dict[str, UInt8[np.ndarray, "h w 3"]]
TrainStep = Callable[[State, Any, Any], tuple[State, Metrics]]

# Steps that may be in flight while the host prepares the next: enough to keep the device busy, few enough for accurate
# timing and a prompt stop.
_IN_FLIGHT = 2
_MAX_SKIPPED_IN_A_ROW = 25
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
    folder = flags.checkpoint_folder(output_dir)
    checkpoint = find_checkpoint(flags.resume_from_checkpoint, folder)
    if checkpoint is not None:
        check_resumed(checkpoint, run_config, flags)
    first = 0 if checkpoint is None else step_of(checkpoint)
    frozen = frozen if isinstance(frozen, Moving) else _Constant(sharding.put(mesh, frozen))
    with contextlib.closing(loader), contextlib.closing(frozen), contextlib.ExitStack() as stack:
        state = own_buffers(sharding.put(mesh, state), frozen.at(first))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder, flags.checkpoints_total_limit)))
        if checkpoint is not None:
            with heartbeat(f"reading {checkpoint}"):
                state, position = checkpoints.restore(checkpoint, forget(state))
            loader.set_state(position)
            log(f"resuming from {checkpoint}")
        tracker = Tracker(flags, output_dir, flags.values_within(Scope.PROCESS), first)
        stack.enter_context(contextlib.closing(tracker))
        if first < total:
            run = _Run(
                flags, mesh, first, total, tracker, checkpoints, validate, record, complete_config(run_config, flags),
                flags.steps_between_validations(loader.samples_per_epoch),
            )  # fmt: skip
            state = _loop(train_step, state, frozen, loader, run)
    if export is not None:
        with heartbeat("writing the model"):
            export(state, output_dir)
    if jax.process_index() == 0:
        if flags.push_to_hub:
            publish.upload(flags, output_dir)
        run_folder.unlock(output_dir)
        run_folder.unlock(Path(folder))
    processes.wait_for_all("the model is saved")
    return state


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
                with monitor.pause(), heartbeat("writing the model"):
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
    with heartbeat("compiling the step"):
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
    with monitor.pause(), profiler.validation(), heartbeat("making the validation images"):
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
