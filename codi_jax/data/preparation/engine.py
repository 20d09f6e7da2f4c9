"""The engines that run the work: local processes by `datasets`, or a cluster by Ray Data.

Both get the same tasks and the same function.
"""

import gc
import logging
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets
from datasets import Dataset

from codi_jax.cli.flags import Flags, Topic
from codi_jax.cli.messages import first_line

Function = Callable[[Any], Any]
"""Maps a task to a small result. Both are sent between processes, and a task may be computed twice."""

_OUT_OF_MEMORY = "one of the processes was killed, perhaps for lack of memory: run the same command again to resume"


@dataclass(frozen=True, kw_only=True)
class EngineFlags(Flags):
    """Which machines do the work."""

    topic: ClassVar[Topic] = Topic.MACHINES

    engine: Literal["datasets", "ray"] = "datasets"
    """datasets: processes of this machine. ray: a Ray cluster, or a local one that is started for the work."""
    num_proc: int | None = None
    """Number of processes, by default one per core; with --ray_address, of concurrent tasks, by default all that
    fit."""
    ray_address: str | None = None
    """Address of a running Ray cluster, or auto. Its machines must see the same input and output folders."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_proc")
        self.require("ray_address", self.ray_address is None or self.engine == "ray", "omitted, or add --engine ray")

    @property
    def processes(self) -> int:
        """The number of processes on this machine."""
        return self.num_proc or len(os.sched_getaffinity(0))


def run(function: Function, tasks: Sequence[Any], flags: EngineFlags) -> list[Any]:
    """Calls the function with each task, in no particular order.

    Args:
      function: see `Function`.
      tasks: its arguments, which are pickled.
      flags: the user's flags.

    Returns:
      The results, in any order.

    Raises:
      ChildProcessError: if a process was killed and its work is not done elsewhere.
      ConnectionError: if no Ray cluster can be reached.
      ValueError: if Ray is not installed.
    """
    packed = [pickle.dumps(task) for task in tasks]
    if flags.engine == "ray":
        return list(_with_ray(_Packed(function), packed, flags))
    return _with_datasets(_Packed(function), packed, flags.processes)


@dataclass(frozen=True)
class _Packed:
    """The function of a task's row in a table, where both the task and its result are bytes."""

    function: Function

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        return {"result": pickle.dumps(self.function(pickle.loads(row["task"])))}


def _with_datasets(function: _Packed, tasks: Sequence[bytes], processes: int) -> list[Any]:
    rows = Dataset.from_dict({"task": list(tasks)})
    processes = min(processes, len(tasks))
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    # Memory that the processes share with this one is copied when touched, which their garbage collectors would do.
    gc.collect()
    gc.freeze()
    try:
        done = rows.map(
            function,
            remove_columns="task",
            num_proc=processes if processes > 1 else None,  # one is this process
            keep_in_memory=True,
            load_from_cache_file=False,
            # Otherwise `datasets` would hash the function and everything it refers to.
            new_fingerprint=secrets.token_hex(8),
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise ChildProcessError(_OUT_OF_MEMORY) from error
    finally:
        gc.unfreeze()
        if not shown:
            datasets.enable_progress_bars()
    return [pickle.loads(result) for result in done["result"]]


def _with_ray(function: _Packed, tasks: Sequence[bytes], flags: EngineFlags) -> Iterator[Any]:
    """Ray reassigns a task whose process or machine is lost."""
    ray = _start_ray(flags)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    done = rows.map(function, num_cpus=1, concurrency=flags.num_proc)
    for row in done.iter_rows():
        yield pickle.loads(row["result"])


def _start_ray(flags: EngineFlags) -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError('--engine ray needs Ray: pip install "codi_jax[data]".') from None
    if not ray.is_initialized():
        cores = None if flags.ray_address else flags.processes
        try:
            ray.init(address=flags.ray_address, num_cpus=cores, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConnectionError(
                f"--ray_address {flags.ray_address}: no Ray cluster was reached ({first_line(error)})."
            ) from None
    return ray
