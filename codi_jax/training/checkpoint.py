"""Checkpoints, from which a run resumes as if it had never stopped.

A checkpoint is a folder ``checkpoint-<step>`` that Orbax writes: the training state, the position in the data, and the
settings that the next run must share. It is written in the background and appears atomically when it is complete, with
the checksums of its files. It does not contain frozen networks.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import step as step_lib

from codi_jax.cli.flags import Flags, Operational, Topic
from codi_jax.cli.messages import first_line
from codi_jax.cli.progress import heartbeat
from codi_jax.io import processes
from codi_jax.io.checksums import DamagedError, verify_checksums, write_checksums
from codi_jax.io.json_files import read_object

State = TypeVar("State")

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STATE, _DATA, _RUN = "state", "data", "run_config"
_POSITIONS = "of_processes"
_ORBAX_TIMES = "_CHECKPOINT_METADATA"  # written last, and not needed for restoring
_ASIDE = ".damaged"  # suffix of the folder that a damaged checkpoint is renamed to


class CheckpointError(ValueError):
    """A checkpoint is missing, or does not fit the run."""


@dataclass(frozen=True)
class CheckpointFlags(Flags):
    """Flags about checkpoints."""

    topic: ClassVar[Topic] = Topic.CHECKPOINTS

    checkpointing_steps: Operational[int] = 5000
    """Steps between checkpoints; 0 writes none, not even at the end."""
    checkpoints_total_limit: Operational[int | None] = None
    """How many checkpoints to keep; an old one is deleted when a new one is complete. Default: all."""
    resume_from_checkpoint: Operational[str | None] = None
    """Resume from a checkpoint: "latest" (the newest intact one; from the start if there is none), the name of one in
    --output_dir, or a folder."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "checkpointing_steps")
        self.require_at_least(1, "checkpoints_total_limit")


def list_checkpoints(output_dir: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    names = (_NAME.fullmatch(path.name) for path in (output_dir.iterdir() if output_dir.is_dir() else ()))
    return sorted(int(name[1]) for name in names if name)


def step_of(checkpoint: Path) -> int:
    """The number of steps done when a checkpoint was made, from its folder's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The folder of the checkpoint that ``--resume_from_checkpoint`` means; ``None`` to start from scratch.

    Raises:
      CheckpointError: if it does not exist, or if ``output_dir`` holds checkpoints that the run would overwrite.
    """
    steps = list_checkpoints(output_dir)
    latest = output_dir / f"checkpoint-{steps[-1]}" if steps else None
    if resume is None:
        if latest is not None:
            raise CheckpointError(
                f"{output_dir} holds {latest.name} of an earlier run: resume from it with --resume_from_checkpoint "
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
            f"--resume_from_checkpoint {resume} is not a checkpoint: give latest, or a folder checkpoint-<step>; "
            f"{output_dir} holds {known}."
        )
    if latest is not None and latest.resolve() != folder.resolve():
        raise CheckpointError(
            f"--resume_from_checkpoint {resume} would write over {latest}: move the later checkpoints away, or choose "
            "another --output_dir and give the full path of the checkpoint."
        )
    return folder


def require_whole(checkpoint: Path) -> None:
    """Compares the files of a checkpoint with their checksums; a checkpoint without checksums passes.

    Raises:
      CheckpointError: naming the missing or differing file.
    """
    try:
        verify_checksums(checkpoint)
    except DamagedError as error:
        raise CheckpointError(
            f"{checkpoint} is damaged ({error}): --resume_from_checkpoint latest resumes from the newest intact one."
        ) from None


def set_damaged_aside(output_dir: Path) -> list[str]:
    """Renames the newest checkpoints of a folder as long as they are damaged, so that the newest left is intact.

    Returns:
      A line about each renamed one, for the user.

    Raises:
      CheckpointError: if all checkpoints are damaged; none is renamed then.
      OSError: if one cannot be renamed.
    """
    damaged: dict[Path, DamagedError] = {}
    for step in reversed(list_checkpoints(output_dir)):
        checkpoint = output_dir / f"checkpoint-{step}"
        try:
            verify_checksums(checkpoint)
        except DamagedError as error:
            damaged[checkpoint] = error
        else:
            break
    else:
        if damaged:
            reasons = "; ".join(f"{checkpoint.name}: {error}" for checkpoint, error in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {output_dir} is damaged ({reasons}): restore one from a copy, or move them away "
                "to train from the start."
            )
    for checkpoint in damaged:
        checkpoint.rename(_free_name(checkpoint))
    return [f"{checkpoint} is damaged and was set aside: {error}" for checkpoint, error in damaged.items()]


def check_run_config(checkpoint: Path, run_config: Mapping[str, Any], if_both: Collection[str] = ()) -> None:
    """Compares a run's settings with a checkpoint's.

    Args:
      checkpoint: the checkpoint's folder.
      run_config: the run's settings, JSON.
      if_both: names of settings that are compared only if both have them.

    Raises:
      CheckpointError: naming the first setting that differs, and both values.
    """
    saved = saved_run_config(checkpoint)
    # Tuples become lists on the way through JSON.
    given = json.loads(json.dumps(run_config))
    one_sided = (saved.keys() ^ given.keys()) & set(if_both)
    for name in sorted((saved.keys() | given.keys()) - one_sided):
        if saved.get(name) != given.get(name):
            raise CheckpointError(
                f"{checkpoint} was made with {name} = {json.dumps(saved.get(name))}, but this run has "
                f"{json.dumps(given.get(name))}: give the same to resume, or start in another --output_dir."
            )


def saved_run_config(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint is from.

    Raises:
      CheckpointError: if they cannot be read.
    """
    try:
        return read_object(checkpoint / _RUN / "metadata", "resume from another")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint of codi_jax, or incomplete: {error}") from None


class Checkpoints:
    """The checkpoints of one run.

    Args:
      output_dir: the run's folder; leftovers of an unfinished checkpoint are removed.
      total_limit: how many to keep.
    """

    def __init__(self, output_dir: Path, total_limit: int | None = None) -> None:
        self._folder = output_dir.absolute()
        self._saving = 0
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_name_format=_Names(),
                max_to_keep=total_limit,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                # Called by the first process, when all files exist but the folder does not have its final name yet.
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def save(self, step: int, state: Any, data: Mapping[str, Any], run_config: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns as soon as ``state`` may be donated.

        Args:
          step: the number of updates done.
          state: a tree of arrays.
          data: this process's position in the data, JSON.
          run_config: the settings that the next run must share, JSON.

        Raises:
          OSError: if this checkpoint cannot be written, or writing the last one failed.
        """
        with self._explained(step):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(state),
                        _DATA: ocp.args.JsonSave({_POSITIONS: processes.gather(dict(data))}),
                        _RUN: ocp.args.JsonSave(dict(run_config)),
                    }
                ),
                force=True,
            )

    def restore(self, checkpoint: Path, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          checkpoint: the checkpoint's folder, from `find_checkpoint`.
          like: the state as a tree of `jax.ShapeDtypeStruct` with the shardings that the arrays should have.

        Returns:
          The state and this process's position in the data; the first process's if the processes were different.

        Raises:
          CheckpointError: if the state's arrays differ from ``like``, or cannot be read.
        """
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(like), _DATA: ocp.args.JsonRestore()})
        try:
            _check_arrays(checkpoint, like)
            directory = checkpoint.absolute().parent
            restored = self._manager.restore(step_of(checkpoint), args=args, directory=directory)
            positions = restored[_DATA][_POSITIONS]
        except (CheckpointError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint} cannot be read ({_reason(error)}): move it away to resume from the one before."
            ) from error
        return restored[_STATE], positions[jax.process_index() if len(positions) == jax.process_count() else 0]

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
          OSError: if it could not be written; the one before still exists.
        """
        with self._explained(None), heartbeat("writing the last checkpoint"):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises `wait`'s error if the last checkpoint has already failed, without waiting."""
        if not self._manager.is_saving_in_progress():
            with self._explained(None):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, and ends Orbax's threads."""
        with self._explained(None), heartbeat("writing the last checkpoint"):
            self._manager.close()

    def _seal(self) -> None:
        names = (f"checkpoint-{self._saving}.orbax-checkpoint-tmp*", f"checkpoint-{self._saving}")
        folder = next(folder for name in names for folder in self._folder.glob(name))
        write_checksums(folder, leave_out=(_ORBAX_TIMES,))

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            steps = list_checkpoints(self._folder)
            whole = f"checkpoint-{steps[-1]} is complete" if steps else "there is no earlier one"
            raise OSError(
                f"Writing a checkpoint in {self._folder} failed ({_reason(error)}); {whole}. Make room, or choose "
                "fewer with --checkpoints_total_limit, then resume with --resume_from_checkpoint latest."
            ) from error


class _Names(step_lib.NameFormat[step_lib.Metadata]):
    """``checkpoint-<step>``, as in diffusers' scripts; Orbax's own prefixes end with an underscore."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        return iter([self.find_step(base_path, step) for step in list_checkpoints(Path(base_path))])

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not path.is_dir():
            raise ValueError(f"{path} does not exist.")
        return step_lib.Metadata(step=step, path=path)


def _free_name(checkpoint: Path) -> Path:
    names = (checkpoint.with_name(f"{checkpoint.name}{_ASIDE}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _check_arrays(checkpoint: Path, like: Any) -> None:
    """Compares the names and shapes of the arrays in a checkpoint with a state's."""
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint.absolute() / _STATE)).tree)
    # A key is stored as its numbers.
    wanted = _shapes(jax.eval_shape(partial(jax.tree.map, _numbers), like))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{checkpoint} does not fit: its state has {name} with shape {saved.get(name)}, this run's has "
                f"{wanted.get(name)} (None: no such array); give the flags that it was made with."
            )


def _numbers(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _reason(error: Exception) -> str:
    """The innermost cause, in one line."""
    if any(words in str(error) for words in ("No space left", "ENOSPC")):
        return "no space left on the device"
    return first_line(error)
