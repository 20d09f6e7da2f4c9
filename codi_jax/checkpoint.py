"""Checkpoints, from which a run goes on as if it had never stopped.

A checkpoint is a folder ``checkpoint-<step>`` that Orbax writes: the training state, the position in the data, and the
settings that the next run must share. It is written beside the training and appears at once when it is whole. Frozen
networks are not in it.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.path import step as step_lib

from codi_jax.flags import Flags
from codi_jax.hub import first_line

State = TypeVar("State")

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STATE, _DATA, _RUN = "state", "data", "run_config"
_POSITIONS = "of_processes"


class CheckpointError(ValueError):
    """A checkpoint that is not there, or does not fit the run."""


@dataclass(frozen=True)
class CheckpointFlags(Flags):
    """Flags about checkpoints."""

    checkpointing_steps: int = 5000
    """Steps between two checkpoints; 0 writes none, not even at the end."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints to keep; an old one goes when a new one is whole. If left out: all."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: "latest" (afresh if there is none), the name of one in --output_dir, or a folder."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "checkpointing_steps")
        self.require_at_least(1, "checkpoints_total_limit")


def list_checkpoints(output_dir: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, ascending."""
    names = (_NAME.fullmatch(path.name) for path in (output_dir.iterdir() if output_dir.is_dir() else ()))
    return sorted(int(name[1]) for name in names if name)


def step_of(checkpoint: Path) -> int:
    """The steps that were done when a checkpoint was made, from the name of its folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The folder of the checkpoint that ``--resume_from_checkpoint`` means; ``None`` to start afresh.

    Raises:
      CheckpointError: if it is not there, or if ``output_dir`` holds checkpoints that the run would run into.
    """
    steps = list_checkpoints(output_dir)
    latest = output_dir / f"checkpoint-{steps[-1]}" if steps else None
    if resume is None:
        if latest is not None:
            raise CheckpointError(
                f"{output_dir} holds {latest.name} of an earlier run: go on from it with --resume_from_checkpoint "
                "latest, or choose another --output_dir."
            )
        return None
    if resume == "latest":
        return latest
    named = output_dir / resume
    folder = named if _NAME.fullmatch(resume) and named.is_dir() else Path(resume).expanduser()
    if not folder.is_dir() or not _NAME.fullmatch(folder.name):
        known = ", ".join(f"checkpoint-{step}" for step in steps) or "no checkpoints"
        raise CheckpointError(
            f"--resume_from_checkpoint {resume} is no checkpoint: give latest, or a folder checkpoint-<step>; "
            f"{output_dir} holds {known}."
        )
    if latest is not None and latest.resolve() != folder.resolve():
        raise CheckpointError(
            f"--resume_from_checkpoint {resume} would write over {latest}: move the later checkpoints away, or choose "
            "another --output_dir and give the whole path of the checkpoint."
        )
    return folder


def check_run_config(checkpoint: Path, run_config: Mapping[str, Any]) -> None:
    """Compares the settings of a run with those that a checkpoint was made with.

    Raises:
      CheckpointError: naming the first that differs, and both values.
    """
    try:
        saved = json.loads((checkpoint / _RUN / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint of codi_jax, or incomplete: {error}.") from None
    # Tuples become lists on the way through JSON.
    given = json.loads(json.dumps(run_config))
    for name in sorted(saved.keys() | given.keys()):
        if saved.get(name) != given.get(name):
            raise CheckpointError(
                f"{checkpoint} was made with {name} = {json.dumps(saved.get(name))}, but this run has "
                f"{json.dumps(given.get(name))}: give the same to go on, or start in another --output_dir."
            )


class Checkpoints:
    """The checkpoints of one run.

    Args:
      output_dir: the run's folder; what is left of a checkpoint that was not finished is removed.
      total_limit: how many to keep.
    """

    def __init__(self, output_dir: Path, total_limit: int | None = None) -> None:
        self._folder = output_dir.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_name_format=_Names(),
                max_to_keep=total_limit,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

    def save(self, step: int, state: Any, data: Mapping[str, Any], run_config: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; returns as soon as ``state`` may be donated.

        Args:
          step: updates done.
          state: a tree of arrays.
          data: this process's position in the data, JSON.
          run_config: what the next run must share, JSON.

        Raises:
          OSError: if this one cannot be written, or the last one could not.
        """
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(state),
                        _DATA: ocp.args.JsonSave({_POSITIONS: _of_all_processes(dict(data))}),
                        _RUN: ocp.args.JsonSave(dict(run_config)),
                    }
                ),
                force=True,
            )

    def restore(self, checkpoint: Path, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          checkpoint: its folder, from `find_checkpoint`.
          like: the state as a tree of `jax.ShapeDtypeStruct` with the shardings that the arrays shall have.

        Returns:
          The state and this process's position in the data; the first one's if there were other processes.

        Raises:
          CheckpointError: if the state has other arrays than ``like``.
        """
        step = step_of(checkpoint)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(like), _DATA: ocp.args.JsonRestore()})
        _check_arrays(checkpoint, like)
        restored = self._manager.restore(step, args=args, directory=checkpoint.absolute().parent)
        positions = restored[_DATA][_POSITIONS]
        return restored[_STATE], positions[jax.process_index() if len(positions) == jax.process_count() else 0]

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
          OSError: if it could not be written; the one before is still there.
        """
        with self._explained(None):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what `wait` would raise if the last checkpoint has failed already, without waiting."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits like `wait`, and ends Orbax's threads."""
        with self._explained(None):
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            steps = list_checkpoints(self._folder)
            whole = f"checkpoint-{steps[-1]} is whole" if steps else "there is no earlier one"
            raise OSError(
                f"Writing a checkpoint in {self._folder} failed ({_reason(error)}); {whole}. Make room, or choose "
                "fewer with --checkpoints_total_limit, then go on with --resume_from_checkpoint latest."
            ) from error


class _Names(step_lib.NameFormat[step_lib.Metadata]):
    """``checkpoint-<step>``, as diffusers' scripts have it; Orbax's own prefixes end with an underscore."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        return iter([self.find_step(base_path, step) for step in list_checkpoints(Path(base_path))])

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not path.is_dir():
            raise ValueError(f"{path} does not exist.")
        return step_lib.Metadata(step=step, path=path)


def _check_arrays(checkpoint: Path, like: Any) -> None:
    """Compares the names and shapes of the arrays in a checkpoint with those of a state."""
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint.absolute() / _STATE)).tree)
    # A key is stored as the numbers that it consists of.
    wanted = _shapes(jax.eval_shape(partial(jax.tree.map, _numbers), like))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{checkpoint} does not fit: its state has {name} with shape {saved.get(name)}, that of this run "
                f"{wanted.get(name)} (None: no such array); give the flags that it was made with."
            )


def _numbers(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _of_all_processes(value: Any) -> list[Any]:
    """A JSON value of each process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - len(text))))
    return [json.loads(bytes(text[:size])) for text, size in zip(np.asarray(texts), sizes)]


def _reason(error: Exception) -> str:
    """The innermost cause, in one line."""
    if any(words in str(error) for words in ("No space left", "ENOSPC")):
        return "no space left on the device"
    return first_line(error)
