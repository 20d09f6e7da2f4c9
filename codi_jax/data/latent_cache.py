"""Latents and text features of a whole data set, computed once and kept on disk as memory-mapped arrays.

A cache is a folder named after a fingerprint of all that it depends on, so one that no longer fits is never used, and
stays. It is built in a folder beside, which is renamed when all is there: an interrupted build goes on where it was.
Several machines build one in parts, each of consecutive rows and texts, which the last of them joins: the same files.

    moments.npy        float16 [rows, flips, h, w, 2c]  mean and log-variance of the VAE's posterior
    conditioning.npy   uint8 [rows, H, W, 3]            or pixels.npy, if conditions are random and made when wanted
    conditioning_moments.npy  as moments.npy            instead, if conditions are encoded too
    time_ids.npy       float32 [rows, 6]                SDXL's sizes
    context.npy        float16 [texts, S, D]            the empty text, then every different caption
    pooled.npy         float16 [texts, P]               of SDXL
    text.npy           int64 [captions]                 the text of each caption
    first_caption.npy  int64 [rows + 1]                 where the captions of a row start
    *.crc32.npy        uint32                           checksums of what is read at once
    manifest.json
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np
from datasets import Dataset
from filelock import FileLock
from jaxtyping import Int, UInt8
from tqdm import tqdm

from codi_jax.data.images import UnreadableImageError, is_random
from codi_jax.data.loader import Tokenize, read_ahead, refuse_too_many
from codi_jax.data.row_files import DamagedRowsError, RowFile, RowWriter, create, open_rows, save_rows
from codi_jax.data.samples import MAX_IN_A_ROW, Batch, Choices, Reader, substitute
from codi_jax.data.sources import captions_of, describe_row, files_fingerprint
from codi_jax.io.decoding import MAX_MEGAPIXELS

_VERSION = 1
_MANIFEST = "manifest.json"
_IDS = "input_ids."  # and the name of the text encoder: the file name of its token ids
_OF_ALL = ("text", "first_caption")  # and not of one part
_VIEWS = ("moments", "conditioning_moments")  # as the picture is, and mirrored
_BATCHES_TO_KEEP = 16  # after so many, what was computed is safe from an interruption

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoders:
    """The frozen networks whose results are kept. Jitted by the caller; every call has the same batch size.

    Attributes:
      images: pictures to moments of the posterior, unscaled, [n, h, w, 2c].
      text: token ids, by encoder, to "context" [n, S, D] and for SDXL "pooled" [n, P]; ``None`` keeps the token ids,
        for when the text encoder is trained.
      fingerprint: changes when the networks or the tokenizers do.
      batch_size: of the calls.
      conditions_too: whether condition images are encoded as well, for models that take their latents.
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
      index: from 0 on.
      count: of parts.
    """

    index: int = 0
    count: int = 1

    def of(self, length: int) -> range:
        """What of so many rows lies in it."""
        return range(length * self.index // self.count, length * (self.index + 1) // self.count)


@dataclass(frozen=True)
class CachedReader:
    """Reads batches from a cache: the choices of `codi_jax.data.samples.Reader`, without its work.

    Attributes:
      arrays: of the cache, by file name.
      reasons: why images are missing, by row.
      reader: of the samples that the cache was made of.
    """

    arrays: Mapping[str, RowFile]
    reasons: Mapping[str, str]
    reader: Reader

    def batch(self, rows: Int[np.ndarray, "b"], epochs: Int[np.ndarray, "b"]) -> Batch:
        """Gathers a batch, see `codi_jax.data.samples.Read`."""
        unreadable: list[tuple[str, str]] = []
        pairs = list(zip(rows.tolist(), epochs.tolist(), strict=True))
        if self.reasons:
            pairs = [(self._readable(row, epoch, unreadable), epoch) for row, epoch in pairs]
        choices = [Choices(self.reader.seed, row, epoch) for row, epoch in pairs]
        rows = np.array([row for row, _ in pairs])
        flips = np.array([choice.flips(self.reader.transform) for choice in choices])
        texts = self._texts(rows, choices)
        encoded = [name for name in _VIEWS if name in self.arrays]
        batch = {name: self.arrays[name].take(rows, flips.astype(int)) for name in encoded}
        batch |= {name: self.arrays[name].take(texts) for name in ("context", "pooled") if name in self.arrays}
        ids = {name.removeprefix(_IDS): self.arrays[name].take(texts) for name in self.arrays if name.startswith(_IDS)}
        batch |= {"input_ids": ids} if ids else {}
        batch |= self._conditioning(rows, flips, choices)
        if self.reader.time_ids:
            batch["time_ids"] = self.arrays["time_ids"].take(rows)
        return {**batch, "unreadable": unreadable}

    def _readable(self, row: int, epoch: int, unreadable: list[tuple[str, str]]) -> int:
        found = row
        for attempt in range(1, MAX_IN_A_ROW + 1):
            if str(found) not in self.reasons:
                return found
            unreadable.append((str(found), self.reasons[str(found)]))
            found = substitute(self.reader.seed, row, epoch, attempt, len(self.reader.source))
        raise ValueError(f"{MAX_IN_A_ROW} images in a row could not be read; the last was {unreadable[-1][1]}.")

    def _texts(self, rows: Int[np.ndarray, "b"], choices: list[Choices]) -> Int[np.ndarray, "b"]:
        first = self.arrays["first_caption"].take(rows).tolist()
        after = self.arrays["first_caption"].take(rows + 1).tolist()
        chosen = [c.caption(b - a, self.reader.transform) for c, a, b in zip(choices, first, after, strict=True)]
        captions = [start + (index or 0) for start, index in zip(first, chosen, strict=True)]
        return np.where([index is None for index in chosen], 0, self.arrays["text"].take(np.array(captions)))

    def _conditioning(
        self, rows: Int[np.ndarray, "b"], flips: np.ndarray, choices: list[Choices]
    ) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
        if "pixels" in self.arrays:
            condition = self.reader.condition
            assert condition is not None
            pictures = zip(self.arrays["pixels"].take(rows), choices, strict=True)
            pixels = np.stack([condition(pixels, choice.rng) for pixels, choice in pictures])
        elif "conditioning" in self.arrays:
            pixels = self.arrays["conditioning"].take(rows)
        else:
            return {}
        pixels[flips] = pixels[flips, :, ::-1]
        return {"conditioning": pixels}


def open_cache(
    root: Path,
    reader: Reader,
    tokenize: Tokenize,
    encoders: Encoders,
    *,
    workers: int = 0,
    max_unreadable_share: float | int = 0.01,
) -> CachedReader:
    """Opens the cache of a data set, and builds it first if there is none that fits.

    Several processes may do so at once: one builds in a folder, the others wait.

    Args:
      root: where caches are.
      reader: of the samples.
      tokenize: for captions.
      encoders: what to compute.
      workers: processes that read images.
      max_unreadable_share: give up above it.

    Raises:
      ValueError: if an image is not square and crops are random, if too many images cannot be read, or if the encoders
        give numbers that are not finite.
    """
    description = _describe(reader, encoders)
    folder = _folder(root, description)
    with FileLock(f"{folder}.lock"):
        if (cached := _open_whole(folder, reader)) is not None:
            _log.info("Using the latents in %s.", folder)
            return cached
        _report_stale(root, folder, description)
        _Builder(folder, reader, tokenize, encoders, workers, max_unreadable_share).build(description)
        return _open(folder, reader)


def cache_part(
    root: Path,
    reader: Reader,
    tokenize: Tokenize,
    encoders: Encoders,
    part: Part,
    *,
    workers: int = 0,
    max_unreadable_share: float | int = 0.01,
) -> Path | None:
    """Computes one part of the cache of a data set; the process that finishes the last one joins them.

    Args:
      root: where caches are, one folder for all processes.
      reader: as of `open_cache`, and so on.
      tokenize: for captions.
      encoders: what to compute.
      part: which part.
      workers: processes that read images.
      max_unreadable_share: give up above it.

    Returns:
      The folder of the cache, ``None`` as long as other parts are missing.

    Raises:
      ValueError: as `open_cache`.
    """
    description = _describe(reader, encoders)
    folder = _folder(root, description)
    if part.count == 1:  # nothing to join, nor to copy
        open_cache(root, reader, tokenize, encoders, workers=workers, max_unreadable_share=max_unreadable_share)
        return folder
    parts = [folder.with_suffix(".parts") / f"{index:05}-of-{part.count:05}" for index in range(part.count)]
    own = parts[part.index]
    with FileLock(f"{folder}-{own.name}.lock"):
        if not (folder / _MANIFEST).is_file() and not (own / _MANIFEST).is_file():
            _Builder(own, reader, tokenize, encoders, workers, max_unreadable_share, part).build(description)
    with FileLock(f"{folder}.lock"):
        if not (folder / _MANIFEST).is_file():
            if not all((each / _MANIFEST).is_file() for each in parts):
                return None
            _join(parts, folder, description)
        shutil.rmtree(folder.with_suffix(".parts"), ignore_errors=True)
    return folder


def _open_whole(folder: Path, reader: Reader) -> CachedReader | None:
    """Opens a cache that is there; a damaged one is removed, as if it had never been."""
    if not folder.is_dir():
        return None
    try:
        return _open(folder, reader)
    except DamagedRowsError as error:
        _log.warning("The latents in %s are damaged and are computed again: %s.", folder, error)
        shutil.rmtree(folder)
        return None


def _open(folder: Path, reader: Reader) -> CachedReader:
    manifest, arrays = _read_manifest(folder), open_rows(folder)
    if missing := sorted(set(manifest.get("arrays", ())) - arrays.keys()):
        raise DamagedRowsError(f"{folder / missing[0]}.npy is missing")
    return CachedReader(arrays, manifest["unreadable"], reader)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if isinstance(manifest["unreadable"], dict) and isinstance(manifest["description"], dict):
            return manifest
        reason = "it lacks what it must hold"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise DamagedRowsError(f"{folder / _MANIFEST} cannot be read ({reason})")


def _write_manifest(folder: Path, description: Mapping[str, Any], unreadable: Mapping[str, str]) -> None:
    contents = {"description": description, "unreadable": unreadable, "arrays": sorted(open_rows(folder))}
    (folder / _MANIFEST).write_text(json.dumps(contents, indent=2))


def _folder(root: Path, description: Mapping[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return root / hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _join(parts: list[Path], folder: Path, description: Mapping[str, Any]) -> None:
    """Puts the arrays of the parts one behind the other; those of all captions are in every part."""
    joined = folder.with_suffix(".joined")
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    for name in sorted({file.name for part in parts for file in part.glob("*.npy")}):
        if name.partition(".")[0] in _OF_ALL:
            shutil.copyfile(parts[0] / name, joined / name)
            continue
        arrays = [np.load(part / name, mmap_mode="r") for part in parts if (part / name).is_file()]
        whole = create(joined / name, arrays[0].dtype, (sum(map(len, arrays)), *arrays[0].shape[1:]))
        end = 0
        for array in arrays:
            whole[end : end + len(array)] = array
            end += len(array)
        whole.flush()
    manifests = [_read_manifest(part) for part in parts]
    unreadable = {row: reason for manifest in manifests for row, reason in manifest["unreadable"].items()}
    _write_manifest(joined, description, unreadable)
    joined.rename(folder)


def _describe(reader: Reader, encoders: Encoders) -> dict[str, Any]:
    """All that the contents of a cache depend on."""
    condition = reader.condition and ("made when wanted" if is_random(reader.condition) else reader.condition.__name__)
    # What is as ever is left out, so that caches from before there was a choice still fit.
    special = {
        "conditions": "encoded" if encoders.conditions_too else None,
        "interpolation": reader.transform.interpolation if reader.transform.interpolation != "lanczos" else None,
        "time_ids": "fixed" if reader.transform.fixed_sizes else None,
        "largest": reader.transform.max_megapixels if reader.transform.max_megapixels != MAX_MEGAPIXELS else None,
    }
    return {
        "version": _VERSION,
        "data": files_fingerprint(reader.source),
        "data set": reader.source.name,
        "columns": reader.source.columns.names(),
        "condition": condition,
        "resolution": reader.transform.resolution,
        "center_crop": reader.transform.center_crop,
        "random_flip": reader.transform.random_flip,
        "model": encoders.fingerprint,
        "captions": "token ids" if encoders.text is None else "features",
        **{key: value for key, value in special.items() if value is not None},
    }


def _report_stale(root: Path, folder: Path, description: dict[str, Any]) -> None:
    """Says what differs from other caches of this data set."""
    for manifest in sorted(root.glob(f"*/{_MANIFEST}")):
        try:
            other = _read_manifest(manifest.parent)["description"]
        except DamagedRowsError:
            continue
        if other.get("data set") == description["data set"]:
            differing = ", ".join(key for key in description if other.get(key) != description[key])
            _log.warning(
                "The latents in %s are of the same data set but do not fit (other %s): they are left alone, and new "
                "ones go to %s.",
                manifest.parent,
                differing,
                folder,
            )


@dataclass(frozen=True)
class _Builder:
    """Computes a cache."""

    folder: Path
    reader: Reader
    tokenize: Tokenize
    encoders: Encoders
    workers: int
    max_unreadable_share: float | int
    part: Part = Part()

    def build(self, description: dict[str, Any]) -> None:
        """Computes what is missing, and makes the folder appear when all is there."""
        building = self.folder.with_suffix(".building")
        building.mkdir(parents=True, exist_ok=True)
        try:
            self._texts(building)
            unreadable = self._images(building)
        except ValueError:  # other flags or other data will be needed, and then this is of no use
            shutil.rmtree(building)
            raise
        _write_manifest(building, description, unreadable)
        for file in building.glob("*.progress"):
            file.unlink()
        building.rename(self.folder)

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
        part = self.part.of(len(texts))
        texts = texts[part.start : part.stop]
        table = RowWriter(folder, "texts", len(texts))
        size = self.encoders.batch_size
        starts = range(table.rows, len(texts), size)
        for step, start in enumerate(tqdm(starts, "encoding captions", disable=None)):
            some = texts[start : start + size]
            ids = self.tokenize(some + [""] * (size - len(some)))
            if self.encoders.text is None:
                table.append({_IDS + name: array[: len(some)] for name, array in ids.items()})
            else:
                table.append(_as_float16(self.encoders.text(ids), len(some), "the text encoder"))
            if step % _BATCHES_TO_KEEP == 0:
                table.keep()
        table.keep()

    def _images(self, folder: Path) -> dict[str, str]:
        part = self.part.of(len(self.reader.source))
        table = RowWriter(folder, "images", len(part), _VIEWS)
        rows = _InOrder(self.reader, part[table.rows :], self.encoders.batch_size)
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
        """Of the pictures and, if half of them are mirrored, of their mirror images: [n, flips, h, w, 2c]."""
        count = len(pixels)
        views = [pixels, pixels[:, :, ::-1]] if self.reader.transform.random_flip else [pixels]
        padding = [(0, self.encoders.batch_size - count), (0, 0), (0, 0), (0, 0)]
        moments = [
            _as_float16({"moments": self.encoders.images(np.pad(view, padding))}, count, "the VAE")["moments"]
            for view in views
        ]
        return np.stack(moments, axis=1)


@dataclass(frozen=True)
class _InOrder:
    """Consecutive pictures of a data set in its own order, in batches, with the reasons why some are missing."""

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
                "not square: add --center_crop, or leave --cache_latents out."
            )
        return {**arrays, "time_ids": self.reader.transform.time_ids(placement)}


def _progress(rows: _InOrder, workers: int) -> Iterator[tuple[Batch, dict[str, str]]]:
    """Reads ahead, and shows how far it is."""
    if rows.reader.condition is not None and is_random(rows.reader.condition):
        rows = replace(rows, reader=replace(rows.reader, condition=None))
    if not len(rows):
        return
    batches = iter(read_ahead(rows, workers))
    try:
        yield from tqdm(batches, "encoding images", len(rows), disable=None)
    finally:
        batches.close()


def _as_float16(arrays: Mapping[str, Any], count: int, network: str) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):  # found below
        kept = {name: np.asarray(array)[:count].astype(np.float16) for name, array in arrays.items()}
    for name, array in kept.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{network} gave {name} that float16 cannot hold: check its weights, or leave --cache_latents out."
            )
    return kept


def prefetch(batches: Any) -> grain.IterDataset:
    """Gathers batches in threads, which is all that cached ones need.

    Args:
      batches: a sequence of them.
    """
    return grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
