"""Latents and text features of a complete data set, computed once and kept on disk as memory-mapped arrays.

A cache is a folder named after a fingerprint of everything that it depends on, so that an outdated one is never used;
it is not deleted. It is built in a folder next to it, which is renamed when it is complete: an interrupted build is
resumed. Several machines can build a cache in parts of consecutive rows and texts; the last one joins the parts into
the same files.

    moments.npy        float16 [rows, flips, h, w, 2c]  mean and log-variance of the VAE's posterior
    conditioning.npy   uint8 [rows, H, W, 3]            or pixels.npy, if conditions are random and made on demand
    conditioning_moments.npy  as moments.npy            instead, if conditions are encoded too
    time_ids.npy       float32 [rows, 6]                SDXL's sizes
    context.npy        float16 [texts, S, D]            the empty text, then every different caption
    pooled.npy         float16 [texts, P]               of SDXL
    text.npy           int64 [captions]                 the text of each caption
    first_caption.npy  int64 [rows + 1]                 where the captions of a row start
    *.crc32.npy        uint32                           checksums of the rows
    manifest.json
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from filelock import FileLock
from jaxtyping import Int, UInt8

from codi_jax.data.images import is_random
from codi_jax.data.latent_encoding import TOKEN_IDS, VIEWS, Encoders, LatentEncoder, Part
from codi_jax.data.loader import Tokenize
from codi_jax.data.row_files import DamagedRowsError, RowFile, create, open_rows
from codi_jax.data.samples import MAX_IN_A_ROW, Batch, Choices, Reader, substitute
from codi_jax.data.sources import files_fingerprint
from codi_jax.io.atomic import staged_folder, write_json
from codi_jax.io.decoding import MAX_MEGAPIXELS
from codi_jax.io.json_files import JsonError, read_object

_VERSION = 1
_MANIFEST = "manifest.json"
_SHARED = ("text", "first_caption")  # arrays that every part has in full

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedReader:
    """Reads batches from a cache, with the random choices of `codi_jax.data.samples.Reader`.

    Attributes:
      arrays: the cache's arrays, by file name.
      reasons: why images are missing, by row.
      reader: the reader of the samples that the cache was made from.
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
        encoded = [name for name in VIEWS if name in self.arrays]
        batch = {name: self.arrays[name].take(rows, flips.astype(int)) for name in encoded}
        batch |= {name: self.arrays[name].take(texts) for name in ("context", "pooled") if name in self.arrays}
        ids = {
            name.removeprefix(TOKEN_IDS): self.arrays[name].take(texts)
            for name in self.arrays
            if name.startswith(TOKEN_IDS)
        }
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
    """Opens the cache of a data set, building it first unless a valid one exists.

    Several processes may call it at once: one builds what is missing, and the others wait.

    Args:
      root: folder of all caches.
      reader: the reader of the samples.
      tokenize: tokenizes captions.
      encoders: the networks whose outputs are cached.
      workers: number of processes that read images.
      max_unreadable_share: abort if a larger share of the images cannot be read.

    Raises:
      ValueError: if an image is not square and crops are random, if too many images cannot be read, or if the encoders
        produce numbers that are not finite.
    """
    description = _describe(reader, encoders)
    folder = _folder(root, description)
    with FileLock(f"{folder}.lock"):
        if (cached := _open_whole(folder, reader)) is not None:
            _log.info("Using the latents in %s.", folder)
            return cached
        _report_stale(root, folder, description)
        _build(folder, description, LatentEncoder(reader, tokenize, encoders, workers, max_unreadable_share))
        shutil.rmtree(folder.with_suffix(".parts"), ignore_errors=True)  # of processes without this folder
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
    """Computes one part of the cache of a data set; the process that finishes the last part joins them.

    Args:
      root: folder of all caches, which all processes share.
      reader: of the samples.
      tokenize: for captions.
      encoders: the networks whose results are cached.
      part: which part.
      workers: number of processes that read images.
      max_unreadable_share: abort if a larger share of the images cannot be read.

    Returns:
      The folder of the cache; ``None`` as long as other parts are missing.

    Raises:
      ValueError: under the conditions of `open_cache`.
    """
    description = _describe(reader, encoders)
    folder = _folder(root, description)
    if part.count == 1:  # nothing to join or copy
        open_cache(root, reader, tokenize, encoders, workers=workers, max_unreadable_share=max_unreadable_share)
        return folder
    parts = [folder.with_suffix(".parts") / f"{index:05}-of-{part.count:05}" for index in range(part.count)]
    part_folder = parts[part.index]
    with FileLock(f"{folder}-{part_folder.name}.lock"):
        if not (folder / _MANIFEST).is_file() and not (part_folder / _MANIFEST).is_file():
            encoder = LatentEncoder(reader, tokenize, encoders, workers, max_unreadable_share, part)
            _build(part_folder, description, encoder)
    with FileLock(f"{folder}.lock"):
        if not (folder / _MANIFEST).is_file():
            if not all((each / _MANIFEST).is_file() for each in parts):
                return None
            _join(parts, folder, description)
        shutil.rmtree(folder.with_suffix(".parts"), ignore_errors=True)
    return folder


def _build(folder: Path, description: Mapping[str, Any], encoder: LatentEncoder) -> None:
    """Computes the missing parts of a cache, whose folder appears once it is complete."""
    building = folder.with_suffix(".building")
    building.mkdir(parents=True, exist_ok=True)
    try:
        unreadable = encoder.encode(building)
    except ValueError:  # other flags or data will be needed, which makes the arrays useless
        shutil.rmtree(building)
        raise
    _write_manifest(building, description, unreadable)
    for file in building.glob("*.progress"):
        file.unlink()
    building.rename(folder)


def _open_whole(folder: Path, reader: Reader) -> CachedReader | None:
    """Opens the cache if it exists; a damaged one is removed."""
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
        manifest = read_object(folder / _MANIFEST, "remove the folder to compute its latents again")
    except (OSError, JsonError) as error:
        raise DamagedRowsError(f"{folder / _MANIFEST} cannot be read ({error})") from None
    if isinstance(manifest.get("unreadable"), dict) and isinstance(manifest.get("description"), dict):
        return manifest
    raise DamagedRowsError(f"{folder / _MANIFEST} lacks its description or its list of unreadable images")


def _write_manifest(folder: Path, description: Mapping[str, Any], unreadable: Mapping[str, str]) -> None:
    contents = {"description": description, "unreadable": unreadable, "arrays": sorted(open_rows(folder))}
    write_json(folder / _MANIFEST, contents)


def _folder(root: Path, description: Mapping[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return root / hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _join(parts: list[Path], folder: Path, description: Mapping[str, Any]) -> None:
    """Joins the parts into a cache, which appears once it is complete."""
    with staged_folder(folder) as joined:
        _join_arrays(parts, joined)
        manifests = [_read_manifest(part) for part in parts]
        unreadable = {row: reason for manifest in manifests for row, reason in manifest["unreadable"].items()}
        _write_manifest(joined, description, unreadable)


def _join_arrays(parts: list[Path], joined: Path) -> None:
    """Concatenates the parts' arrays; arrays of all captions are the same in every part."""
    for name in sorted({file.name for part in parts for file in part.glob("*.npy")}):
        if name.partition(".")[0] in _SHARED:
            shutil.copyfile(parts[0] / name, joined / name)
            continue
        arrays = [np.load(part / name, mmap_mode="r") for part in parts if (part / name).is_file()]
        whole = create(joined / name, arrays[0].dtype, (sum(map(len, arrays)), *arrays[0].shape[1:]))
        end = 0
        for array in arrays:
            whole[end : end + len(array)] = array
            end += len(array)
        whole.flush()


def _describe(reader: Reader, encoders: Encoders) -> dict[str, Any]:
    """Everything that the contents of a cache depend on."""
    condition = reader.condition and ("made when wanted" if is_random(reader.condition) else reader.condition.__name__)
    # Default values are omitted, so that caches from before these options existed still fit.
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
    """Warns about other caches of this data set, and says what differs."""
    for manifest in sorted(root.glob(f"*/{_MANIFEST}")):
        try:
            other = _read_manifest(manifest.parent)["description"]
        except DamagedRowsError:
            continue
        if other.get("data set") == description["data set"]:
            differing = ", ".join(key for key in description if other.get(key) != description[key])
            _log.warning(
                "The latents in %s are of the same data set but do not fit (they differ in %s). They are kept, and "
                "new ones are written to %s.",
                manifest.parent,
                differing,
                folder,
            )


def prefetch(batches: Any) -> grain.IterDataset:
    """Gathers batches in threads, which is enough for cached ones.

    Args:
      batches: a sequence of batches.
    """
    return grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
