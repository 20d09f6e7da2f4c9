"""The formats of a data set: a folder of images, save_to_disk's output, parquet files, WebDataset tars.

Each first stages a shard in a separate folder, where an interruption does no harm, and later makes the data set from
the accepted shards. The same samples give the same bytes.
"""

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
import pyarrow.parquet as pq
from datasets import Dataset

from codi_jax.data.files import Folder
from codi_jax.data.preparation.pictures import Encoded
from codi_jax.data.preparation.samples import Sample

FormatName = Literal["folder", "save_to_disk", "parquet", "webdataset"]

META = "meta.jsonl"
# Names of the original preprocessing, and matching ones; any other column is a folder with its name.
_FOLDERS = {
    "image": "images", "conditioning_image": "processed_images", "input_image": "input_images",
    "edited_image": "edited_images",
}  # fmt: skip
_PLAIN: dict[str, list[str]] = {"image": [], "text": []}  # columns whose files in a tar have only an extension
_FILES, _PARQUET, _TAR = "files.json", "samples.parquet", "samples.tar"  # in a staged shard


@dataclass(frozen=True)
class StagedShard:
    """A staged shard, whose first samples are used.

    Attributes:
      folder: the folder where it is staged.
      size: the number of samples.
      count: the number of samples to use, at least one.
    """

    folder: Folder
    size: int
    count: int


@runtime_checkable
class Format(Protocol):
    """One of the formats."""

    def stage(self, folder: Folder, samples: Sequence[Sample]) -> None:
        """Writes the samples of a shard."""
        ...

    def publish(self, shards: Sequence[StagedShard], target: Folder) -> None:
        """Makes the data set from the shards; may be interrupted and called again with the same shards."""
        ...


def format_of(name: FormatName) -> Format:
    """The format with that name."""
    formats: dict[str, Format] = {
        "folder": ImageFolder(),
        "save_to_disk": SaveToDisk(),
        "parquet": Parquet(),
        "webdataset": WebDataset(),
    }
    return formats[name]


class ImageFolder:
    """Picture files in one folder per column, and a meta.jsonl that links them to the texts."""

    def stage(self, folder: Folder, samples: Sequence[Sample]) -> None:
        named = [
            {column: f"{_FOLDERS.get(column, column)}/{sample.key}.{each.ending}" for column, each in _pictures(sample)}
            for sample in samples
        ]
        files = {
            paths[column]: each.data for paths, sample in zip(named, samples) for column, each in _pictures(sample)
        }
        rows = [{**paths, **sample.texts} for paths, sample in zip(named, samples, strict=True)]
        files[META] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        files[_FILES] = json.dumps([list(paths.values()) for paths in named]).encode()
        folder.write_all(files)

    def publish(self, shards: Sequence[StagedShard], target: Folder) -> None:
        with target.staged(META) as meta:
            for shard in shards:
                meta.writelines(shard.folder.read(META).splitlines(keepends=True)[: shard.count])
                paths = json.loads(shard.folder.read(_FILES))[: shard.count]
                target.take([path for sample_paths in paths for path in sample_paths], shard.folder)


class Parquet:
    """Parquet files with the pictures inside, as `datasets` writes and reads them."""

    def stage(self, folder: Folder, samples: Sequence[Sample]) -> None:
        _write_parquet(Dataset.from_list([_row(sample) for sample in samples], _features(samples[0])), folder, _PARQUET)

    def publish(self, shards: Sequence[StagedShard], target: Folder) -> None:
        for number, shard in enumerate(shards):
            name = f"train-{number:05}.parquet"
            if shard.count < shard.size:
                with shard.folder.open(_PARQUET) as file:
                    table = pq.read_table(file).slice(0, shard.count)
                _write_parquet(Dataset(table), target, name)
            else:
                _take_as(target, name, shard.folder, _PARQUET)


class SaveToDisk(Parquet):
    """The output of ``save_to_disk`` of `datasets`."""

    def publish(self, shards: Sequence[StagedShard], target: Folder) -> None:
        files = [shard.folder.url(_PARQUET) for shard in shards]
        digest = hashlib.sha256()
        for shard in shards:
            digest.update(shard.folder.read(_PARQUET))
        count = sum(shard.count for shard in shards)
        with tempfile.TemporaryDirectory(dir=shards[0].folder.locate() if target.is_local else None) as cache:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
            assert isinstance(rows, Dataset)
            # The fingerprint that `datasets` computes depends on times.
            rows = Dataset(rows.data, info=rows.info, fingerprint=f"{digest.hexdigest()[:16]}-{count}")
            rows.take(count).save_to_disk(target.path)


class WebDataset:
    """Tar files that are read as a stream: the files of a sample are consecutive, and their extensions are columns."""

    def stage(self, folder: Folder, samples: Sequence[Sample]) -> None:
        with folder.open(_TAR, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                for name, data in _members(sample):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    def publish(self, shards: Sequence[StagedShard], target: Folder) -> None:
        for number, shard in enumerate(shards):
            name = f"train-{number:05}.tar"
            if shard.count < shard.size:
                self._write_first(shard, target, name)
            else:
                _take_as(target, name, shard.folder, _TAR)

    @staticmethod
    def _write_first(shard: StagedShard, target: Folder, name: str) -> None:
        seen: dict[str, None] = {}
        with (
            shard.folder.open(_TAR) as source,
            target.staged(name) as file,
            tarfile.open(fileobj=source, mode="r|") as staged,
            tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for entry in staged:
                seen[entry.name.split(".")[0]] = None
                if len(seen) > shard.count:
                    break
                tar.addfile(entry, staged.extractfile(entry))


def _pictures(sample: Sample) -> list[tuple[str, Encoded]]:
    return list(sample.pictures.items())


def _row(sample: Sample) -> dict[str, Any]:
    pictures = {c: {"bytes": each.data, "path": f"{sample.key}.{each.ending}"} for c, each in _pictures(sample)}
    return {**pictures, **sample.texts}


def _features(sample: Sample) -> datasets.Features:
    pictures = {column: datasets.Image() for column in sample.pictures}
    return datasets.Features({**pictures, **{column: datasets.Value("string") for column in sample.texts}})


def _write_parquet(rows: Dataset, folder: Folder, name: str) -> None:
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    folder.write(name, buffer.getvalue())


def _take_as(target: Folder, name: str, source: Folder, staged: str) -> None:
    """Like `Folder.take`, for one file, which is renamed."""
    if source.has(staged):
        (target.fs.mv if target.is_local else target.fs.copy)(source.locate(staged), target.locate(name))
    elif not target.has(name):
        raise FileNotFoundError(f"{source.url(staged)} is gone: start over with another --train_data_dir.")


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    for column, each in _pictures(sample):
        yield ".".join([sample.key, *_PLAIN.get(column, [column]), each.ending]), each.data
    for column, text in sample.texts.items():
        yield ".".join([sample.key, *_PLAIN.get(column, [column]), "txt"]), text.encode()
