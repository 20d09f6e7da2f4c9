"""Batches of data that can only be read in order.

The state is the rows' state, which `datasets` keeps, at the start of the window that is being shuffled; to resume, the
window is read again. So the batches after a resume equal those of an uninterrupted run, as long as the data is the
same. A window may span two epochs, whose rows are then shuffled together.
"""

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from codi_jax.data.images import UnreadableImageError
from codi_jax.data.loader import ProcessShard
from codi_jax.data.samples import MAX_IN_A_ROW, Batch, Reader, stack

WINDOW = 1000
"""The number of samples that are shuffled at a time."""

_MIN_THREADS = 4

StreamRow = tuple[int, int, dict[str, Any]]
"""Index in the epoch, epoch, and columns."""


class StreamBatches(grain.IterDataset):
    """Batches of one process, whose images are read in threads; unreadable ones are skipped.

    Args:
      reader: the reader of a stream source.
      shard: this process's shard. It reads whole files if their number is a multiple of the number of processes,
        otherwise some rows of every file.
      threads: number of threads that read images, at least four.
      window: number of samples that are shuffled at a time. Default: `WINDOW`.
    """

    def __init__(self, reader: Reader, shard: ProcessShard, threads: int = 0, window: int | None = None) -> None:
        super().__init__()
        rows, window = _Rows(reader, shard), window or WINDOW
        ahead = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=window)
        # grain adds the window's number to the seed, so the seeds for seed 0 and seed 1 must be further apart.
        mixed = int(np.random.SeedSequence(reader.seed).generate_state(1)[0]) // 2
        self._rows = grain.experimental.WindowShuffleIterDataset(ahead, window_size=window, seed=mixed)
        self._reader = reader
        self._size = shard.size
        self._threads = max(_MIN_THREADS, threads)

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(iter(self._rows), self._reader, self._size, self._threads)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, rows: grain.DatasetIterator, reader: Reader, size: int, threads: int) -> None:
        super().__init__(rows)
        self._rows = rows
        self._reader = reader
        self._size = size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-images")

    def __next__(self) -> Batch:
        samples: list[Batch] = []
        unreadable: list[tuple[str, str]] = []
        failures = 0
        while len(samples) < self._size:
            rows = [next(self._rows) for _ in range(self._size - len(samples))]
            for (number, _, _), result in zip(rows, self._pool.map(self._read, rows), strict=True):
                if isinstance(result, UnreadableImageError):
                    failures += 1
                    unreadable.append((str(number), f"row {number} of {self._reader.source.name}, {result}"))
                else:
                    failures = 0
                    samples.append(result)
                if failures == MAX_IN_A_ROW:
                    reason = unreadable[-1][1]
                    raise ValueError(f"{MAX_IN_A_ROW} images in a row could not be read; the last was {reason}.")
        return {**stack(samples), "unreadable": unreadable, "cursor": json.dumps(self.get_state())}

    def get_state(self) -> dict[str, Any]:
        return self._rows.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.set_state(state)

    def close(self) -> None:
        self._rows.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, row: StreamRow) -> Batch | UnreadableImageError:
        number, epoch, columns = row
        try:
            return self._reader.sample(columns, number, epoch)
        except UnreadableImageError as error:
            return error


class _Rows(grain.IterDataset):
    """Rows of one process, epoch after epoch."""

    def __init__(self, reader: Reader, shard: ProcessShard) -> None:
        super().__init__()
        self._reader = reader
        self._shard = shard

    def __iter__(self) -> grain.DatasetIterator:
        rows = self._reader.source.rows
        assert isinstance(rows, IterableDataset)
        # The position in the data is kept in the object: each iterator needs its own.
        rows = split_dataset_by_node(copy.deepcopy(rows), rank=self._shard.index, world_size=self._shard.count)
        return _RowIterator(rows, self._shard, self._reader.source.name)


class _RowIterator(grain.DatasetIterator):
    def __init__(self, rows: IterableDataset, shard: ProcessShard, name: str) -> None:
        super().__init__()
        self._rows = rows
        self._start = rows.state_dict()
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._shard = shard
        self._name = name
        self._epoch = 0
        self._read = 0  # rows of this epoch

    def __next__(self) -> StreamRow:
        if self._iterator is None:
            self._iterator = iter(self._rows)
        row = next(self._iterator, None)
        while row is None:
            self._begin_epoch()
            assert self._iterator is not None
            row = next(self._iterator, None)
        self._read += 1
        return (self._read - 1) * self._shard.count + self._shard.index, self._epoch, row

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._rows.state_dict(), "epoch": self._epoch, "read": self._read}

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state["rows"])
        self._epoch, self._read = state["epoch"], state["read"]
        self._iterator = None

    def _begin_epoch(self) -> None:
        if self._read < self._shard.size:
            raise ValueError(
                f"{self._name} has {self._read} samples for this process, fewer than the {self._shard.size} of one "
                "batch: lower --train_batch_size or --gradient_accumulation_steps."
            )
        self._rows.load_state_dict(self._start)
        self._iterator = iter(self._rows)
        self._epoch, self._read = self._epoch + 1, 0
