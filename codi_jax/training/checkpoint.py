"""Checkpoints, from which a run resumes as if it had never stopped.

A checkpoint is a folder ``checkpoint-<step>`` that Orbax writes: the training state, the position in the data, and the
settings that the next run must share. It is written in the background and appears atomically when it is complete, with
the checksums of its files. It does not contain frozen networks.

The folder of checkpoints may be on Google Cloud Storage, where Orbax writes each array directly. Nothing can be renamed
there: a checkpoint is complete when it contains ``commit_success.txt``. It has no checksums, which would take reading
all of it again; the store has its own.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import os
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
from codi_jax.io.json_files import parse_object

State = TypeVar("State")

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STATE, _DATA, _RUN = "state", "data", "run_config"
_POSITIONS = "of_processes"
_ORBAX_TIMES = "_CHECKPOINT_METADATA"  # written last, and not needed for restoring
_COMMITTED = "commit_success.txt"  # written last by Orbax where a folder cannot be renamed
_ASIDE = ".damaged"  # suffix of the folder that a damaged checkpoint is renamed to


class CheckpointError(ValueError):
    """A checkpoint is missing, or does not fit the run."""


@dataclass(frozen=True)
class CheckpointFlags(Flags):
    """Flags about checkpoints."""

    topic: ClassVar[Topic] = Topic.CHECKPOINTS

    checkpoint_dir: Operational[str | None] = None
    """Folder for checkpoints, also on Google Cloud Storage (gs://bucket/folder). Default: --output_dir."""
    checkpointing_steps: Operational[int] = 5000
    """Steps between checkpoints; 0 writes none, not even at the end."""
    checkpoints_total_limit: Operational[int | None] = None
    """How many checkpoints to keep; an old one is deleted when a new one is complete. Default: all."""
    resume_from_checkpoint: Operational[str | None] = None
    """Resume from a checkpoint: "latest" (the newest intact one; from the start if there is none), the name of one in
    --checkpoint_dir, or a folder."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "checkpointing_steps")
        self.require_at_least(1, "checkpoints_total_limit")
        _require_store(self.checkpoint_dir, "--checkpoint_dir")
        _require_store(self.resume_from_checkpoint, "--resume_from_checkpoint")

    def checkpoint_folder(self, output_dir: epath.PathLike) -> epath.Path:
        """The folder that the checkpoints of a run are in, given its ``--output_dir``."""
        return epath.Path(self.checkpoint_dir or output_dir).expanduser()


def is_remote(folder: epath.PathLike) -> bool:
    """Whether a folder is on an object store."""
    return "://" in os.fspath(folder)


def list_checkpoints(folder: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    folder = epath.Path(folder)
    names = filter(None, map(_NAME.fullmatch, _names_in(folder)))
    # On a disk they get their name when they are complete.
    return sorted(int(name[1]) for name in names if not is_remote(folder) or _COMMITTED in _names_in(folder / name[0]))


def step_of(checkpoint: epath.Path) -> int:
    """The number of steps done when a checkpoint was made, from its folder's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(resume: str | None, folder: epath.PathLike) -> epath.Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; ``None`` to start from scratch.

    Args:
      resume: the flag.
      folder: the folder of the run's checkpoints.

    Raises:
      CheckpointError: if it does not exist, or if ``folder`` holds checkpoints that the run would overwrite.
    """
    folder = epath.Path(folder)
    steps = list_checkpoints(folder)
    latest = folder / f"checkpoint-{steps[-1]}" if steps else None
    if resume is None:
        if latest is not None:
            raise CheckpointError(
                f"{folder} holds {latest.name} of an earlier run: resume from it with --resume_from_checkpoint "
                "latest, or choose another folder."
            )
        return None
    if resume == "latest":
        return latest
    named = folder / resume
    checkpoint = named if _NAME.fullmatch(resume) and named.is_dir() else epath.Path(resume).expanduser()
    if not checkpoint.is_dir() or not _NAME.fullmatch(checkpoint.name):
        known = ", ".join(f"checkpoint-{step}" for step in steps) or "no checkpoints"
        raise CheckpointError(
            f"--resume_from_checkpoint {resume} is not a checkpoint: give latest, or a folder checkpoint-<step>; "
            f"{folder} holds {known}."
        )
    if latest is not None and not _are_same(latest, checkpoint):
        raise CheckpointError(
            f"--resume_from_checkpoint {resume} would write over {latest}: move the later checkpoints away, or choose "
            "another folder and give the full path of the checkpoint."
        )
    return checkpoint


@contextlib.contextmanager
def store_errors(folder: epath.Path) -> Iterator[None]:
    """Turns what an object store answers, or that it does not, into one sentence.

    Raises:
      OSError: naming the folder and the reason.
    """
    try:
        yield
    except Exception as error:
        # What the libraries of a store raise is of their own classes, or plain OSErrors.
        if not is_remote(folder) or isinstance(error, CheckpointError):
            raise
        raise OSError(
            f"{folder} cannot be used ({first_line(error)}): check the name of the bucket, and that this machine may "
            "read and write it."
        ) from error


def require_whole(checkpoint: epath.PathLike) -> None:
    """Compares the files of a checkpoint with their checksums; a checkpoint without checksums passes.

    Raises:
      CheckpointError: naming the missing or differing file.
    """
    try:
        _verify(epath.Path(checkpoint))
    except DamagedError as error:
        raise CheckpointError(
            f"{checkpoint} is damaged ({error}): --resume_from_checkpoint latest resumes from the newest intact one."
        ) from None


def set_damaged_aside(folder: epath.PathLike) -> list[str]:
    """Renames the newest checkpoints of a folder as long as they are damaged, so that the newest left is intact.

    Returns:
      A line about each renamed one, for the user.

    Raises:
      CheckpointError: if all checkpoints are damaged; none is renamed then.
      OSError: if one cannot be renamed.
    """
    folder = epath.Path(folder)
    damaged: dict[epath.Path, DamagedError] = {}
    for step in reversed(list_checkpoints(folder)):
        checkpoint = folder / f"checkpoint-{step}"
        try:
            _verify(checkpoint)
        except DamagedError as error:
            damaged[checkpoint] = error
        else:
            break
    else:
        if damaged:
            reasons = "; ".join(f"{checkpoint.name}: {error}" for checkpoint, error in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {folder} is damaged ({reasons}): restore one from a copy, or move them away "
                "to train from the start."
            )
    for checkpoint in damaged:
        checkpoint.rename(_free_name(checkpoint))
    return [f"{checkpoint} is damaged and was set aside: {error}" for checkpoint, error in damaged.items()]


def check_run_config(checkpoint: epath.PathLike, run_config: Mapping[str, Any], if_both: Collection[str] = ()) -> None:
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


def saved_run_config(checkpoint: epath.PathLike) -> dict[str, Any]:
    """The settings of the run that a checkpoint is from.

    Raises:
      CheckpointError: if they cannot be read.
    """
    try:
        path = epath.Path(checkpoint) / _RUN / "metadata"
        return parse_object(path.read_bytes(), str(path), "resume from another")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint of codi_jax, or incomplete: {error}") from None


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: their folder, on a disk or ``gs://``; leftovers of an unfinished checkpoint are removed.
      total_limit: how many to keep.
    """

    def __init__(self, folder: epath.PathLike, total_limit: int | None = None) -> None:
        self._folder = _absolute(folder)
        self._saving = 0
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_name_format=_Names(),
                max_to_keep=total_limit,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                # Called by the first process, when all files exist but the folder does not have its final name yet.
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=None if is_remote(self._folder) else self._seal
                ),
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

    def restore(self, checkpoint: epath.PathLike, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          checkpoint: the checkpoint's folder, from `find_checkpoint`.
          like: the state as a tree of `jax.ShapeDtypeStruct` with the shardings that the arrays should have.

        Returns:
          The state and this process's position in the data; the first process's if the processes were different.

        Raises:
          CheckpointError: if the state's arrays differ from ``like``, or cannot be read.
        """
        checkpoint = _absolute(checkpoint)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(like), _DATA: ocp.args.JsonRestore()})
        try:
            _check_arrays(checkpoint, like)
            restored = self._manager.restore(step_of(checkpoint), args=args, directory=checkpoint.parent)
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
        folder = next(folder for name in names for folder in Path(self._folder).glob(name))
        write_checksums(folder, leave_out=(_ORBAX_TIMES,))

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            steps = list_checkpoints(self._folder)
            whole = f"checkpoint-{steps[-1]} is complete" if steps else "there is no earlier one"
            remedy = (
                "See that this machine may write there"
                if is_remote(self._folder)
                else "Make room, or choose fewer with --checkpoints_total_limit"
            )
            raise OSError(
                f"Writing a checkpoint in {self._folder} failed ({_reason(error)}); {whole}. {remedy}, then resume "
                "with --resume_from_checkpoint latest."
            ) from error


class _Names(step_lib.NameFormat[step_lib.Metadata]):
    """``checkpoint-<step>``, as in diffusers' scripts; Orbax's own prefixes end with an underscore."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        return iter([self.find_step(base_path, step) for step in list_checkpoints(base_path)])

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not path.is_dir():
            raise ValueError(f"{path} does not exist.")
        return step_lib.Metadata(step=step, path=path)


def _require_store(path: str | None, flag: str) -> None:
    """Raises `ValueError` if a path is on an object store that Orbax does not write to, or needs a missing package."""
    if path is None or not is_remote(path):
        return
    if not path.startswith("gs://"):
        raise ValueError(
            f"{flag} {path} has to be a folder or on Google Cloud Storage (gs://bucket/folder): mount other stores as "
            "a folder."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{flag} {path} needs the package gcsfs: python3 -m pip install 'codi_jax[gcs]'.")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs, and that ends in one sentence


def _names_in(folder: epath.Path) -> list[str]:
    """The names of what is in a folder, which need not exist.

    For fsspec, what cannot be asked for does not exist. A store that does not answer is not an empty one, from which a
    run would start over: listing is the question whose errors are raised.
    """
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _verify(checkpoint: epath.Path) -> None:
    if not is_remote(checkpoint):
        verify_checksums(Path(checkpoint))


def _absolute(folder: epath.PathLike) -> epath.Path:
    """Orbax needs absolute paths."""
    return epath.Path(folder) if is_remote(folder) else epath.Path(Path(folder).absolute())


def _are_same(one: epath.Path, other: epath.Path) -> bool:
    if is_remote(one) or is_remote(other):
        return one == other
    return Path(one).resolve() == Path(other).resolve()  # follows links, which that of `epath` does not


def _free_name(checkpoint: epath.Path) -> epath.Path:
    names = (checkpoint.with_name(f"{checkpoint.name}{_ASIDE}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _check_arrays(checkpoint: epath.Path, like: Any) -> None:
    """Compares the names and shapes of the arrays in a checkpoint with a state's."""
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(checkpoint / _STATE).tree)
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
    return first_line(error).partition(" [tensorstore_spec=")[0]
