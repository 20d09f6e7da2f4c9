"""A data set that is made shard by shard, and can be resumed after a kill.

The input's rows, in order, make shards of equal size. Each shard is the work of one task, wherever that runs. It writes
its samples to a separate folder and then, atomically, its counts to a record, so that a shard without a record is
remade. The data set consists of the shards in order, up to the requested number of samples: it is the same regardless
of interruptions and of the number of processes.

    .unfinished/job.json          the flags that it is made with
    .unfinished/00000012/         a staged shard: samples, and record.json
    summary.json                  written last: the number of samples, and why other rows were rejected
"""

import json
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import cv2

from codi_jax.cli.flags import Flags, Topic
from codi_jax.cli.progress import Progress
from codi_jax.data.files import Folder
from codi_jax.data.images import current_condition_name
from codi_jax.data.preparation.engine import EngineFlags, run
from codi_jax.data.preparation.formats import Format, FormatName, StagedShard, format_of
from codi_jax.data.preparation.rows import InputRow, Skipped
from codi_jax.data.preparation.samples import Prepare, prepare_rows
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags

SUMMARY = "summary.json"
_STAGING, _JOB, _RECORD = ".unfinished", "job.json", "record.json"
_TASKS = 16  # tasks of each process between two counts of the samples
_BYTES = 2**28  # limit of the pictures in memory that wait for a process


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    """The data set that is written."""

    topic: ClassVar[Topic] = Topic.OUTPUT

    train_data_dir: str
    """Folder to write, a path or a URL such as gs://bucket/folder: new, empty, or begun by the same command."""
    output_format: FormatName = "folder"
    """folder: images and a meta.jsonl. save_to_disk: for load_from_disk of `datasets`. parquet: files with the images
    inside. webdataset: tar files. Training reads all of them."""
    max_train_samples: int | None = None
    """Number of accepted images after which to stop. Default: all of the input."""
    shard_size: int = 1000
    """Rows of the input per task, which is also the largest number of samples in a parquet or tar file."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "max_train_samples", "shard_size")


@dataclass(frozen=True, kw_only=True)
class JobFlags(OutputFlags, EngineFlags):
    """The flags that this module reads; those of a tool include more."""

    essential: ClassVar[tuple[str, ...]] = (
        "input", "train_data_dir", "max_train_samples", "output_format", "resolution", "image_format", "num_proc",
        "engine", "seed",
    )  # fmt: skip


@dataclass(frozen=True)
class ShardTask:
    """The rows of one shard.

    Attributes:
      shard: the shard's number.
      rows: the rows to make samples from.
      skipped: rows before, between and after them that were already rejected.
    """

    shard: int
    rows: tuple[InputRow, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class ShardRecord:
    """The counts of a finished shard.

    Attributes:
      size: number of samples.
      rejected: for each reason, pairs of a number of samples and the number of rows that were rejected after them.
    """

    size: int
    rejected: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def rejections(self, count: int | None) -> Counter[str]:
        """Rejected rows by reason: all, or those before the sample with this number, counted from 1."""
        chosen: Counter[str] = Counter()
        for reason, runs in self.rejected.items():
            chosen[reason] += sum(number for before, number in runs if count is None or before < count)
        return +chosen


@dataclass(frozen=True)
class ShardWork:
    """The work on a shard, in any process.

    Attributes:
      staging: folder of the staged shards.
      output_format: the format of the data set.
      prepare: makes the samples of a row.
      downloads: how to download.
    """

    staging: Folder
    output_format: Format
    prepare: Prepare
    downloads: DownloadFlags

    def __call__(self, task: ShardTask) -> tuple[int, ShardRecord | str]:
        """Stages the shard.

        Returns:
          Its number, and its record, or the message of an error that does not belong to a sample.
        """
        try:
            return task.shard, self._stage(task)
        except OSError as error:  # not raised here: every engine wraps errors differently
            return task.shard, str(error)

    def _stage(self, task: ShardTask) -> ShardRecord:
        folder = self.staging / f"{task.shard:08}"
        folder.remove()
        results = prepare_rows(task.rows, self.prepare, self.downloads)
        samples = [sample for result in results if not isinstance(result, RejectedError) for sample in result]
        rejected = [(each.position, each.reason) for each in task.skipped]
        for row, result in zip(task.rows, results, strict=True):
            if isinstance(result, RejectedError):
                rejected.append((row.position, result.reason))
        record = ShardRecord(len(samples), _runs([sample.position for sample in samples], rejected))
        if samples:
            self.output_format.stage(folder, samples)
        folder.write(_RECORD, json.dumps({"size": record.size, "rejected": record.rejected}).encode())
        return record


def make_data_set(
    flags: JobFlags,
    items: Callable[[], Iterable[InputRow | Skipped]],
    prepare: Prepare,
    description: Mapping[str, Any],
    downloads: DownloadFlags | None = None,
) -> dict[str, Any]:
    """Makes the data set, or resumes the work on it.

    Args:
      flags: the tool's flags.
      items: opens the rows of the input, which are the same at every call.
      prepare: makes the samples of a row.
      description: everything that the samples depend on, as JSON; a data set begun with other values is refused.
      downloads: how to download the pictures of rows that have addresses.

    Returns:
      The summary: the number of "samples", and "rejected", the number of rows by reason.

    Raises:
      ValueError: if the folder holds something else, or no row gives a sample.
      OSError: if something cannot be read or written.
    """
    target = Folder(flags.train_data_dir)
    staging = target / _STAGING
    names = ("output_format", "max_train_samples", "shard_size")
    description = json.loads(json.dumps({**description, **{name: getattr(flags, name) for name in names}}))
    if begin(target, description):
        output_format = format_of(flags.output_format)
        work = ShardWork(staging, output_format, prepare, downloads or DownloadFlags())
        # A forked process would wait forever for threads that OpenCV started in its parent.
        cv2.setNumThreads(1)
        records = list(_records(flags, _tasks(items(), flags.shard_size), work))
        shards, rejected = _accepted(records, staging, flags.max_train_samples)
        samples = sum(shard.count for shard in shards)
        if not samples:
            staging.remove()  # other flags will be needed, which makes the shards useless
            raise ValueError(f"none of the {rejected.total()} rows gives a sample: {reasons(rejected) or 'no rows'}.")
        output_format.publish(shards, target)
        summary = {"samples": samples, "rejected": {reason: rejected[reason] for reason in sorted(rejected)}}
        target.write(SUMMARY, (json.dumps({**summary, "made_with": description}, indent=2) + "\n").encode())
    staging.remove()
    return _state(target, SUMMARY)


def begin(target: Folder, description: Mapping[str, Any]) -> bool:
    """Claims the folder, and returns whether work is left to do.

    Args:
      target: the folder of the data set.
      description: everything that the samples depend on.

    Raises:
      ValueError: if it holds something else, or cannot be written.
    """
    staging = target / _STAGING
    if target.has(SUMMARY):
        other = _state(target, SUMMARY).get("made_with")
        _refuse_another(target, other, description, "holds a finished data set")
        return False
    if staging.has(_JOB):
        _refuse_another(target, _state(staging, _JOB), description, "holds a data set that was begun")
        return True
    if held := [name for name in target.names() if name != _STAGING]:
        raise ValueError(f"--train_data_dir {target} holds something else ({held[0]}): name a new or an empty folder.")
    try:
        staging.write(_JOB, json.dumps(description, indent=2).encode())
    except OSError as error:
        raise ValueError(f"--train_data_dir {target} cannot be written: {error.strerror or error}.") from error
    return True


def reasons(rejected: Mapping[str, int]) -> str:
    """The numbers of rejected rows, the most frequent reason first."""
    ordered = sorted(rejected.items(), key=lambda each: (-each[1], each[0]))
    return ", ".join(f"{number} {reason}" for reason, number in ordered)


def describe(summary: Mapping[str, Any], flags: JobFlags) -> str:
    """The text that a tool prints at the end.

    Args:
      summary: from `make_data_set`.
      flags: the tool's flags.
    """
    samples, wanted = summary["samples"], flags.max_train_samples
    lines = [f"{samples} samples in {flags.train_data_dir}"]
    if summary["rejected"]:
        lines.append(f"rejected: {reasons(summary['rejected'])}")
    if wanted is not None and samples < wanted:
        lines.append(f"--max_train_samples asks for {wanted}, but the input has only {samples} that can be used")
    return "\n".join(lines)


def _state(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON object that an earlier start has written."""
    return folder.read_json(name, "name another --train_data_dir, or remove that folder to start over")


def _refuse_another(target: Folder, other: Any, description: Mapping[str, Any], what: str) -> None:
    if isinstance(other, dict) and isinstance(other.get("condition"), str):
        other = {**other, "condition": current_condition_name(other["condition"])}
    if other == description:
        return
    differing = [key for key in description if not isinstance(other, dict) or other.get(key) != description[key]]
    raise ValueError(
        f"--train_data_dir {target} {what} with other flags ({', '.join(differing) or 'more of them'}): name another "
        "folder, or use those."
    )


def _tasks(items: Iterable[InputRow | Skipped], size: int) -> Iterator[ShardTask]:
    """Shards of ``size`` rows that were not rejected yet; rejections after the last row make a shard without rows."""
    shard, rows, skipped = 0, [], []
    for item in items:
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        rows.append(item)
        if len(rows) == size:
            yield ShardTask(shard, tuple(rows), tuple(skipped))
            shard, rows, skipped = shard + 1, [], []
    if rows or skipped:
        yield ShardTask(shard, tuple(rows), tuple(skipped))


def _records(flags: JobFlags, tasks: Iterator[ShardTask], work: ShardWork) -> Iterator[ShardRecord]:
    """The records of the shards in their order, until there are enough samples."""
    wanted, samples, rows = flags.max_train_samples, 0, 0
    with Progress("preparing", wanted, "samples") as progress:
        while wanted is None or samples < wanted:
            most = _TASKS * flags.processes
            if wanted is not None:  # no more than needed at the present rejection rate
                needed = (wanted - samples) * max(rows, 1) / max(samples, 1) / flags.shard_size
                most = min(most, math.ceil(needed))
            wave = list(_wave(tasks, most))
            if not wave:
                return
            records = _run_wave(wave, work, flags)
            for task in wave:
                yield records[task.shard]
            rows += sum(len(task.rows) for task in wave)
            new = sum(record.size for record in records.values())
            samples += new
            progress.advance(new)


def _wave(tasks: Iterator[ShardTask], most: int) -> Iterator[ShardTask]:
    """The next tasks, as many as their pictures fit into memory."""
    waiting = 0
    for task in islice(tasks, most):
        yield task
        waiting += sum(len(cell) for row in task.rows for cell in row.pictures.values() if isinstance(cell, bytes))
        if waiting > _BYTES:
            return


def _run_wave(wave: Sequence[ShardTask], work: ShardWork, flags: JobFlags) -> dict[int, ShardRecord]:
    records = {task.shard: record for task in wave if (record := _kept(work.staging, task.shard)) is not None}
    missing = [task for task in wave if task.shard not in records]
    for shard, record in run(work, missing, flags) if missing else ():
        if isinstance(record, str):
            raise OSError(f"{record}. Fix this, and run the same command again to resume.")
        records[shard] = record
    return records


def _kept(staging: Folder, shard: int) -> ShardRecord | None:
    folder = staging / f"{shard:08}"
    try:
        return ShardRecord(**folder.read_json(_RECORD, "the shard is made again")) if folder.has(_RECORD) else None
    except (ValueError, TypeError):  # a damaged one, whose shard is remade
        return None


def _accepted(
    records: Sequence[ShardRecord], staging: Folder, wanted: int | None
) -> tuple[list[StagedShard], Counter[str]]:
    """The shards that are not empty, up to the wanted number of samples, and the rejections before that."""
    shards: list[StagedShard] = []
    rejected: Counter[str] = Counter()
    samples = 0
    for number, record in enumerate(records):
        if wanted is not None and samples >= wanted:
            break
        count = record.size if wanted is None else min(record.size, wanted - samples)
        samples += count
        rejected += record.rejections(count if samples == wanted else None)
        if count:
            shards.append(StagedShard(staging / f"{number:08}", record.size, count))
    return shards, rejected


def _runs(kept: Sequence[int], rejected: Iterable[tuple[int, str]]) -> dict[str, list[list[int]]]:
    """Rejections by reason, and by the number of samples before them."""
    counts = Counter((reason, bisect(kept, position)) for position, reason in rejected)
    runs: dict[str, list[list[int]]] = {}
    for (reason, before), number in sorted(counts.items()):
        runs.setdefault(reason, []).append([before, number])
    return runs
