"""The iterator that training draws batches from, and its read-ahead.

A batch of a data set with random access is a function of its number, which is the complete state: it depends neither on
workers nor on the number of processes nor on interruptions. grain reads ahead.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grain
import jax
import numpy as np
from absl import flags as absl_flags
from jaxtyping import Int

from codi_jax.data.samples import Batch, Read

Tokenize = Callable[[list[str]], Mapping[str, Int[np.ndarray, "n s"]]]
"""Texts to token ids, for each text encoder."""

_MIN_UNREADABLE = 10  # unreadable images that are always tolerated, unless the share is 0
_MAX_BATCHES = 2**40  # grain needs a length
_THREADS = 4

_log = logging.getLogger(__name__)


class Loader:
    """Endless batches: epoch after epoch, each in a different order.

    Attributes:
      samples_per_epoch: samples per epoch, over all processes; ``None`` for a stream.
    """

    def __init__(
        self,
        open_at: Callable[[Any], grain.DatasetIterator],
        identity: Mapping[str, Any],
        samples_per_epoch: int | None,
        max_unreadable_share: float | int,
    ) -> None:
        """Created by `codi_jax.data.load_data`.

        Args:
          open_at: opens an iterator of batches at a cursor, ``None`` for the start. Besides its arrays, each batch has
            "cursor", JSON of where the next one starts, and "unreadable", pairs of a key and a reason for each image
            that was replaced.
          identity: the values that a state must share to be restored.
          samples_per_epoch: the attribute.
          max_unreadable_share: abort above this share and above 10 images; 0 aborts at the first.
        """
        self.samples_per_epoch = samples_per_epoch
        self._open_at = open_at
        self._identity = dict(identity)
        self._share = max_unreadable_share
        self._iterator: grain.DatasetIterator | None = None
        self._cursor: Any = None
        self._tried = 0
        self._unreadable: dict[str, None] = {}  # an ordered set

    @property
    def unreadable(self) -> int:
        """The number of different images that could not be read so far."""
        return len(self._unreadable)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch of this process.

        Raises:
          ValueError: if too many images cannot be read, or a sample's images do not fit each other.
        """
        if self._iterator is None:
            self._iterator = iter(self._open_at(self._cursor))
        batch = next(self._iterator)
        self._cursor = json.loads(batch.pop("cursor"))
        unreadable = batch.pop("unreadable")
        size = max((len(leaf) for leaf in jax.tree.leaves(batch)), default=0)
        self._tried += size + len(unreadable)
        for key, reason in unreadable:
            self._count(key, reason)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state after the batches returned so far, as JSON.

        For a stream, each process has a separate state; otherwise one process's state serves any number of them.
        """
        return {
            **self._identity,
            "cursor": self._cursor,
            "tried": self._tried,
            "unreadable": list(self._unreadable),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where a loader of the same data was when `get_state` was called.

        Raises:
          ValueError: if the state belongs to other data or another seed.
        """
        for name, value in self._identity.items():
            if state.get(name, value) != value:  # older checkpoints say less
                raise ValueError(
                    f"the data is not the checkpoint's: its {name.replace('_', ' ')} is {value}, "
                    f"and was {state.get(name)}; restore the flags, or start over without --resume_from_checkpoint."
                )
        self.close()
        self._cursor = state["cursor"]
        self._tried = state["tried"]
        self._unreadable = dict.fromkeys(state["unreadable"])

    def close(self) -> None:
        """Stops threads and processes. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _count(self, key: str, reason: str) -> None:
        if key in self._unreadable:
            return
        self._unreadable[key] = None
        _log.warning("Skipped, another image takes its place: %s", reason)
        tried = min(self._tried, self.samples_per_epoch or self._tried)
        refuse_too_many(self.unreadable, tried, self._share, reason)


def refuse_too_many(count: int, tried: int, share: float | int, last: str) -> None:
    """Checks that the number of unreadable images is plausible.

    Args:
      count: number of unreadable images.
      tried: number of all images so far.
      share: the tolerated fraction, besides 10 images; 0 tolerates none.
      last: the problem with the last one.

    Raises:
      ValueError: if too many images are unreadable.
    """
    if count > (max(_MIN_UNREADABLE, share * tried) if share else 0):
        raise ValueError(
            f"{count} of the first {tried} images could not be read, more than --max_unreadable_share {share} allows; "
            f"the last was {last}."
        )


@dataclass(frozen=True)
class ProcessShard:
    """The part of every batch that one process reads.

    Attributes:
      batch_size: the batch size over all processes.
      index: the process's index.
      count: the number of processes.

    Raises:
      ValueError: if the batch cannot be divided.
    """

    batch_size: int
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.count:
            raise ValueError(f"a batch of {self.batch_size} samples cannot be divided among {self.count} processes.")

    @property
    def size(self) -> int:
        """Samples in the part."""
        return self.batch_size // self.count

    def positions(self, first: int) -> Int[np.ndarray, "b"]:
        """The positions of its samples, in the batch that starts at position ``first``.

        They are consecutive, as on the devices. So several processes together read the same batch as a single one, and
        the noise, which belongs to positions in the batch, meets the same samples.
        """
        return first + self.index * self.size + np.arange(self.size)


@dataclass(frozen=True)
class Order:
    """The sample at each position of the endless sequence of epochs, every one of which is shuffled differently.

    An epoch takes eight bytes per sample. grain's shuffle takes none, but is slow on small data: its cipher of 16 bits
    is repeated until the result is within the data.

    Attributes:
      length: the length of an epoch.
      seed: the seed of the order.
    """

    length: int
    seed: int

    def __call__(self, positions: Int[np.ndarray, "b"]) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "b"]]:
        """The samples at these positions, and the epochs of the positions."""
        epochs, places = np.divmod(positions, self.length)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = _permutation(self.length, self.seed, epoch)[places[chosen]]
        return rows, epochs


@lru_cache(maxsize=2)  # a batch can span two epochs
def _permutation(length: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    return np.random.default_rng((seed, epoch)).permutation(length)


@dataclass(frozen=True)
class Batches:
    """All batches of a run by number, a sequence that grain reads in any order, in threads or processes.

    Attributes:
      order: the order of samples.
      read: makes a batch.
      shard: this process's shard.
      start: position of the first sample of the first batch.
    """

    order: Order
    read: Read
    shard: ProcessShard
    start: int = 0

    def __len__(self) -> int:
        return _MAX_BATCHES

    def __getitem__(self, index: int) -> Batch:
        first = self.start + int(index) * self.shard.batch_size
        batch = self.read(*self.order(self.shard.positions(first)))
        return {**batch, "cursor": json.dumps({"samples": first + self.shard.batch_size})}


def read_ahead(batches: Any, workers: int) -> grain.IterDataset:
    """Reads batches ahead, in order.

    Args:
      batches: a sequence of batches.
      workers: number of processes; 0 reads in threads.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    if not workers:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    elif not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # grain asks absl, which fails before a command line was parsed
    read = grain.MapDataset.source(batches).to_iter_dataset(options)
    return read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))


def tokenized(batches: grain.IterDataset, tokenize: Tokenize | None) -> grain.IterDataset:
    """Replaces captions by token ids, in a thread of this process: the tokenizer need not be sent to others.

    Args:
      batches: batches with "captions", unless there is no tokenizer.
      tokenize: maps texts to ids; ``None`` for data without texts.
    """

    def replace(batch: Batch) -> Batch:
        if tokenize is None:
            return batch
        ids = {name: np.asarray(array, np.int32) for name, array in tokenize(batch["captions"]).items()}
        return {**{name: value for name, value in batch.items() if name != "captions"}, "input_ids": ids}

    return grain.experimental.ThreadPrefetchIterDataset(batches.map(replace), prefetch_buffer_size=2)
