"""Rows of WebDataset shards: tar files where the files of a sample are consecutive and their extensions are columns.

A shard is someone else's file: a truncated shard, a caption that is not UTF-8 or is missing, and a member that would
fill the memory cost no more than themselves, except for the sample right before damage, which may be incomplete. Only
requested members are read.
"""

import io
import lzma
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import datasets
import fsspec.compression
from datasets import Dataset, IterableDataset
from datasets.utils.file_utils import xopen

from codi_jax.data.access import is_web
from codi_jax.data.files import Folder

PROBLEM = "__problem__"
"""Column with the reason why a sample cannot be read, or ``None``."""

_PICTURES = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pnm")
_TEXTS = ("txt", "text", "caption")
_USUAL = {"image": ("file_name", *_PICTURES), "text": ("caption", "txt")}  # for columns with their default names
_COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd", "lz4": "lz4"}
_LOOKED_AT = 20  # samples to look at for finding columns
_LARGEST = 2**26  # bytes of a member
_RATIO = 100  # compressed data may unpack to this many times its size,
_FREE = 2**16, 2**26  # or to this many bytes: of a member and of a shard
_LARGEST_HEADER = 2**20
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def endings_for(column: str) -> tuple[str, ...]:
    """The extensions of the members that a column with this name is read from; the first existing one counts."""
    name = _plain(column.lower())
    return tuple(dict.fromkeys([name, *_USUAL.get(name, ()), *(f"{name}.{each}" for each in (*_PICTURES, *_TEXTS))]))


def endings_in(files: Sequence[str]) -> list[str]:
    """The endings of the first samples.

    Raises:
      ValueError: if no shard can be read.
    """
    reason = "there is none"
    for file in files:
        found: dict[str, None] = {}
        try:
            for sample in islice(_samples(file, None), _LOOKED_AT):
                found |= dict.fromkeys(sample.files)
        except _BROKEN as error:
            reason = str(error)
        if found:
            return list(found)
    raise ValueError(reason)


def stream(files: Sequence[str], pictures: Sequence[str], texts: Sequence[str]) -> IterableDataset:
    """The samples of shards, one after another.

    Args:
      files: the shards, paths or URLs.
      pictures: columns of pictures: dicts of "bytes" and "path".
      texts: columns of texts.
    """
    options = {"shards": [(file, "") for file in files], "pictures": tuple(pictures), "texts": tuple(texts)}
    return IterableDataset.from_generator(_rows, gen_kwargs=options)


def table(files: Sequence[str], pictures: Sequence[str], texts: Sequence[str], cache_dir: str | None) -> Dataset:
    """The samples of shards as a table with random access, which is rebuilt when a file changes; see `stream`."""
    shards = [(file, Folder(file).fs.ukey(Folder(file).locate())) for file in files]
    options = {"shards": shards, "pictures": tuple(pictures), "texts": tuple(texts)}
    picture = {"bytes": datasets.Value("large_binary"), "path": datasets.Value("string")}
    columns = {**dict.fromkeys(pictures, picture), **dict.fromkeys((*texts, PROBLEM), datasets.Value("string"))}
    made = Dataset.from_generator(
        _rows,
        datasets.Features(columns),
        cache_dir,  # type: ignore[arg-type]
        gen_kwargs=options,
    )
    assert isinstance(made, Dataset)
    return made


@dataclass
class _Sample:
    """The wanted members of a sample, by ending, with their names; or why it cannot be read."""

    key: str
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    problem: str | None = None


def _rows(shards: list[tuple[str, str]], pictures: tuple[str, ...], texts: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """`datasets` divides the list of shards, and counts the rows of each to resume where it was."""
    for file, _ in shards:
        yield from _rows_of(file, pictures, texts)


def _rows_of(file: str, pictures: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    blank = dict.fromkeys((*pictures, *texts, PROBLEM))
    wanted = {column: endings_for(column) for column in (*pictures, *texts)}
    number, missing, wrong = 0, 0, []
    try:
        for sample in _samples(file, {ending for endings in wanted.values() for ending in endings}):
            number += 1
            found = {column: _first(sample, endings) for column, endings in wanted.items()}
            cells: dict[str, Any] = {
                column: cell and {"path": cell[0], "bytes": cell[1]} for column, cell in found.items()
            }
            for column in texts:
                cells[column] = _text(found[column], wrong)
            absent = next((column for column in pictures if found[column] is None), None)
            problem = sample.problem or (absent and f"there is no picture for the column {absent}")
            missing += not problem and any(found[column] is None for column in texts)
            yield {**blank, PROBLEM: f"{sample.key} in {file}: {problem}"} if problem else {**blank, **cells}
    except _BROKEN as error:
        yield {
            **blank,
            PROBLEM: f"the shard {file} ends after {number} samples, where it is cut off or damaged: {error}",
        }
    if missing:
        _warn(f"{missing} of the {number} samples in {file} have no caption: theirs is the empty text.")
    if wrong:
        _warn(f"{len(wrong)} captions in {file} are not UTF-8, the first {wrong[0]}: invalid bytes become U+FFFD.")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _first(sample: _Sample, endings: Sequence[str]) -> tuple[str, bytes] | None:
    return next((sample.files[ending] for ending in endings if ending in sample.files), None)


def _text(found: tuple[str, bytes] | None, wrong: list[str]) -> str | None:
    if found is None:
        return None
    name, data = found
    text = data.decode("utf-8", "replace")
    if "\ufffd" in text and "\ufffd".encode() not in data:
        wrong.append(name)
    return text


def _samples(file: str, wanted: set[str] | None) -> Iterator[_Sample]:
    """The samples of a shard with their requested members, or without contents but with all extensions."""
    options = {"encoded": True}  # URLs are signed as they are
    config = datasets.DownloadConfig(storage_options={"http": options, "https": options} if is_web(file) else {})
    with xopen(file, "rb", download_config=config) as opened:
        raw = _Counted(opened)
        with tarfile.open(fileobj=raw, mode="r|*", tarinfo=_Member) as tar:  # type: ignore[call-overload]
            sample = _Sample("")
            for member in tar:
                tar.members = []  # otherwise it would collect them
                key, ending = _split(member.name)
                if not member.isreg() or member.issparse() or not ending:
                    continue
                if sample.key != key:
                    if sample.files or sample.problem:
                        yield sample
                    sample = _Sample(key)
                if wanted is None or ending in wanted:
                    _add(sample, ending, member, None if wanted is None else tar)
                if tar.fileobj.tell() > max(_FREE[1], _RATIO * raw.count):  # type: ignore[union-attr]
                    raise tarfile.ReadError(f"it unpacks to more than {_RATIO} times its size")
            if sample.files or sample.problem:
                yield sample


def _add(sample: _Sample, ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile | None) -> None:
    if ending in sample.files:
        sample.problem = f"there are two files that end with .{ending}"
    elif member.size > _LARGEST:
        sample.problem = f"{member.name} is larger than {_LARGEST >> 20} MiB"
    elif tar is None:
        sample.files[ending] = member.name, b""
    else:
        data = tar.extractfile(member).read()  # type: ignore[union-attr]
        try:
            sample.files[ending] = member.name, _unpacked(member.name, data)
        except (*_BROKEN, KeyError) as error:
            sample.problem = f"{member.name} cannot be unpacked: {error}"


def _split(name: str) -> tuple[str, str]:
    """The key of a member's sample and its extension, which starts at the first dot; empty if it is in no sample."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    if not stem or stem.startswith("__"):
        return "", ""
    return str(path.with_name(stem)), _plain(ending.lower())


def _plain(ending: str) -> str:
    """The extension without a compression suffix."""
    front, _, last = ending.rpartition(".")
    return front if front and last in _COMPRESSIONS else ending


def _unpacked(name: str, data: bytes) -> bytes:
    method: Any = _COMPRESSIONS.get(name.rpartition(".")[2].lower())
    if method is None:
        return data
    most = max(_FREE[0], _RATIO * len(data))
    with fsspec.compression.compr[method](io.BytesIO(data), mode="rb") as file:
        unpacked = file.read(most + 1)
    if len(unpacked) > most:
        raise ValueError(f"it unpacks to more than {_RATIO} times its size")
    return unpacked


class _Counted:
    """A file that counts how much was read from it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error, not the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"it has a header of {member.size} bytes")
        return member
