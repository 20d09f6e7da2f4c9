"""A data set encoded in its own order: moments of images and features of captions, written to arrays row by row."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int, UInt8

from codi_jax.cli.progress import progress_over
from codi_jax.data.columns import captions_of
from codi_jax.data.images import UnreadableImageError, is_random
from codi_jax.data.loader import Tokenize, read_ahead, refuse_too_many
from codi_jax.data.row_files import RowWriter, save_rows
from codi_jax.data.samples import Batch, Choices, Reader
from codi_jax.data.sources import describe_row

TOKEN_IDS = "input_ids."
"""Prefix of the names of token id arrays, followed by the text encoder's name."""


VIEWS = ("moments", "conditioning_moments")
"""Arrays whose second axis has the picture and, if half of the samples are flipped, its mirror image."""


_BATCHES_TO_KEEP = 16  # batches after which results are flushed, so that an interruption cannot lose them


@dataclass(frozen=True)
class Encoders:
    """The frozen networks whose outputs are cached. Jitted by the caller; every call has the same batch size.

    Attributes:
      images: maps pictures to moments of the posterior, unscaled, [n, h, w, 2c].
      text: maps token ids, by encoder, to "context" [n, S, D] and for SDXL "pooled" [n, P]; ``None`` caches the token
        ids instead, for training the text encoder.
      fingerprint: changes when the networks or the tokenizers do.
      batch_size: the batch size of the calls.
      conditions_too: whether condition images are also encoded, for models that take their latents.
    """

    images: Callable[[UInt8[np.ndarray, "n h w 3"]], Any]
    text: Callable[[Mapping[str, Int[np.ndarray, "n s"]]], Mapping[str, Any]] | None
    fingerprint: str
    batch_size: int = 16
    conditions_too: bool = False


@dataclass(frozen=True)
class Part:
    """One of several parts of equal size.

    Attributes:
      index: the part's index, from 0.
      count: the number of parts.
    """

    index: int = 0
    count: int = 1

    def rows(self, length: int) -> range:
        """The rows of this part, out of ``length`` rows."""
        return range(length * self.index // self.count, length * (self.index + 1) // self.count)


@dataclass(frozen=True)
class LatentEncoder:
    """Computes the arrays of a cache, or of one part of it.

    Attributes:
      reader: the reader of the samples.
      tokenize: tokenizes captions.
      encoders: the networks whose outputs are cached.
      workers: number of processes that read images.
      max_unreadable_share: abort if a larger share of the images cannot be read.
      part: which rows and texts.
    """

    reader: Reader
    tokenize: Tokenize
    encoders: Encoders
    workers: int
    max_unreadable_share: float | int
    part: Part = Part()

    def encode(self, folder: Path) -> dict[str, str]:
        """Computes the arrays that the folder lacks; after an interruption, the next call resumes.

        Returns:
          Why images are missing, by row.

        Raises:
          ValueError: if an image is not square and crops are random, if too many images cannot be read, or if the
            encoders produce numbers that are not finite.
        """
        self._texts(folder)
        return self._images(folder)

    def _texts(self, folder: Path) -> None:
        rows = self.reader.source.rows
        assert isinstance(rows, Dataset)
        column = self.reader.source.columns.caption
        assert column is not None
        captions = [captions_of(cell) for cell in rows[column]]
        texts = list(dict.fromkeys(["", *(text for each in captions for text in each)]))
        number = {text: index for index, text in enumerate(texts)}
        save_rows(folder / "text.npy", np.array([number[text] for each in captions for text in each]))
        save_rows(folder / "first_caption.npy", np.cumsum([0, *map(len, captions)]))
        part = self.part.rows(len(texts))
        texts = texts[part.start : part.stop]
        table = RowWriter(folder, "texts", len(texts))
        size = self.encoders.batch_size
        starts = range(table.rows, len(texts), size)
        for step, start in enumerate(progress_over(starts, "encoding captions", len(starts), "batches")):
            some = texts[start : start + size]
            ids = self.tokenize(some + [""] * (size - len(some)))
            if self.encoders.text is None:
                table.append({TOKEN_IDS + name: array[: len(some)] for name, array in ids.items()})
            else:
                table.append(_as_float16(self.encoders.text(ids), len(some), "the text encoder"))
            if step % _BATCHES_TO_KEEP == 0:
                table.keep()
        table.keep()

    def _images(self, folder: Path) -> dict[str, str]:
        part = self.part.rows(len(self.reader.source))
        table = RowWriter(folder, "images", len(part), VIEWS)
        rows = _Pictures(self.reader, part[table.rows :], self.encoders.batch_size)
        for step, (arrays, reasons) in enumerate(_progress(rows, self.workers)):
            table.append(self._encoded(arrays))
            table.notes.update(reasons)
            last = next(reversed(table.notes.values()), "")
            refuse_too_many(len(table.notes), table.rows, self.max_unreadable_share, last)
            if step % _BATCHES_TO_KEEP == 0:
                table.keep()
        table.keep()
        return table.notes

    def _encoded(self, arrays: Batch) -> Batch:
        encoded = {"pixels": "moments"}
        if self.encoders.conditions_too and "conditioning" in arrays:
            encoded["conditioning"] = "conditioning_moments"
        keeps_pixels = self.reader.condition is not None and is_random(self.reader.condition)
        dropped = encoded.keys() - ({"pixels"} if keeps_pixels else set())
        kept = {name: array for name, array in arrays.items() if name not in dropped}
        return {**kept, **{moments: self._moments(arrays[name]) for name, moments in encoded.items()}}

    def _moments(self, pixels: UInt8[np.ndarray, "n h w 3"]) -> np.ndarray:
        """Moments of the pictures and, if half of them are flipped, of their mirror images: [n, flips, h, w, 2c]."""
        count = len(pixels)
        views = [pixels, pixels[:, :, ::-1]] if self.reader.transform.random_flip else [pixels]
        padding = [(0, self.encoders.batch_size - count), (0, 0), (0, 0), (0, 0)]
        moments = [
            _as_float16({"moments": self.encoders.images(np.pad(view, padding))}, count, "the VAE")["moments"]
            for view in views
        ]
        return np.stack(moments, axis=1)


@dataclass(frozen=True)
class _Pictures:
    """Consecutive pictures of a data set, in batches, and the reasons why some are missing."""

    reader: Reader
    numbers: range
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / self.size)

    def __getitem__(self, index: int) -> tuple[Batch, dict[str, str]]:
        rows = self.numbers[int(index) * self.size : (int(index) + 1) * self.size]
        read, reasons = {}, {}
        for number in rows:
            try:
                read[number] = self._pictures(number)
            except UnreadableImageError as error:
                reasons[str(number)] = f"row {number} of {self.reader.source.name}, {error}"
        blank = self._blank(next(iter(read.values()), None))
        samples = [read.get(number, blank) for number in rows]
        return {name: np.stack([sample[name] for sample in samples]) for name in blank}, reasons

    def _blank(self, like: Batch | None) -> Batch:
        if like is not None:
            return {name: np.zeros_like(array) for name, array in like.items()}
        side = self.reader.transform.resolution
        pixels = np.zeros((side, side, 3), np.uint8)
        has_condition = self.reader.source.columns.condition is not None or self.reader.condition is not None
        conditioning = {"conditioning": pixels} if has_condition else {}
        return {"pixels": pixels, **conditioning, "time_ids": np.zeros(6, np.float32)}

    def _pictures(self, number: int) -> Batch:
        row = self.reader.source.row(number)
        arrays, placement = self.reader.pictures(row, number, Choices(self.reader.seed, number, 0))
        assert placement is not None  # data without images is not cached
        if placement.is_random and not self.reader.transform.center_crop:
            raise ValueError(
                f"--cache_latents keeps one crop of each image, and {describe_row(self.reader.source, row, number)} is "
                "not square: add --center_crop, or remove --cache_latents."
            )
        return {**arrays, "time_ids": self.reader.transform.time_ids(placement)}


def _progress(rows: _Pictures, workers: int) -> Iterator[tuple[Batch, dict[str, str]]]:
    """Reads ahead, with a progress bar."""
    if rows.reader.condition is not None and is_random(rows.reader.condition):
        rows = replace(rows, reader=replace(rows.reader, condition=None))
    if not len(rows):
        return
    batches = iter(read_ahead(rows, workers))
    try:
        yield from progress_over(batches, "encoding images", len(rows), "batches")
    finally:
        batches.close()


def _as_float16(arrays: Mapping[str, Any], count: int, network: str) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):  # detected below
        kept = {name: np.asarray(array)[:count].astype(np.float16) for name, array in arrays.items()}
    for name, array in kept.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{network} produced {name} that float16 cannot hold: check its weights, or remove --cache_latents."
            )
    return kept
