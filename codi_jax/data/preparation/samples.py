"""The samples of the data set, ready to be written, and how the rows of a shard become samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2

from codi_jax.data.access import read_file
from codi_jax.data.preparation.pictures import Encoded
from codi_jax.data.preparation.rows import File, InputRow, Url
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags, download


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      position: the position of the row that it was made from.
      key: the name of its files, without extension.
      pictures: pictures by column.
      texts: other columns.
    """

    position: int
    key: str
    pictures: Mapping[str, Encoded]
    texts: Mapping[str, str]


Prepare = Callable[[InputRow, Mapping[str, bytes]], Sequence[Sample]]
"""Makes the samples of a row, usually one, from its pictures' files, or raises `RejectedError`."""


def prepare_rows(
    rows: Sequence[InputRow], prepare: Prepare, flags: DownloadFlags
) -> list[Sequence[Sample] | RejectedError]:
    """Reads or downloads the pictures of some rows, and makes samples from each.

    Args:
      rows: rows of the input.
      prepare: makes the samples of one row.
      flags: the flags of downloads.

    Returns:
      For each row its samples, or the reason why it was rejected.

    Raises:
      OSError: if a user's file exists but cannot be read.
    """
    cv2.setNumThreads(1)  # the processes share the cores
    done: dict[int, Sequence[Sample] | RejectedError] = {}
    files: list[dict[str, Any]] = [{} for _ in rows]

    def collect(number: int, column: str, data: bytes | RejectedError) -> None:
        files[number][column] = data
        finish(number)

    def finish(number: int) -> None:
        if len(files[number]) == len(rows[number].pictures):
            done[number] = _prepare_one(rows[number], files[number], prepare)
            files[number] = {}

    urls = []
    for number, row in enumerate(rows):
        for column, cell in row.pictures.items():
            if isinstance(cell, Url):
                urls.append((number, column, cell.address))
            else:
                collect(number, column, _read(cell))
        if not row.pictures:
            finish(number)
    if urls:
        download([address for *_, address in urls], flags, lambda i, data: collect(urls[i][0], urls[i][1], data))
    return [done[number] for number in range(len(rows))]


def _prepare_one(row: InputRow, files: dict[str, Any], prepare: Prepare) -> Sequence[Sample] | RejectedError:
    rejected = next((files[column] for column in row.pictures if isinstance(files[column], RejectedError)), None)
    if rejected is not None:
        return rejected
    try:
        return prepare(row, files)
    except RejectedError as error:
        return error


def _read(cell: File | bytes) -> bytes | RejectedError:
    if isinstance(cell, bytes):
        return cell
    try:
        return read_file(cell.path)
    except RejectedError as error:
        return error
