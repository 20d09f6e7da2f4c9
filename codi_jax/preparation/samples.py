"""What comes out: one sample of a data set, ready to be written, and the rows of a shard made into samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import fsspec

from codi_jax.preparation.download import DownloadFlags, download
from codi_jax.preparation.pictures import Encoded
from codi_jax.preparation.rows import File, RejectedError, Row, Url


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      position: of the row that it was made from.
      key: the name of its files, without an ending.
      pictures: by column.
      texts: other columns.
    """

    position: int
    key: str
    pictures: Mapping[str, Encoded]
    texts: Mapping[str, str]


Prepare = Callable[[Row, Mapping[str, bytes]], Sample]
"""Makes one sample of the files of its pictures, or raises `RejectedError`: what all engines run."""


def prepare_rows(rows: Sequence[Row], prepare: Prepare, flags: DownloadFlags) -> list[Sample | RejectedError]:
    """Reads or downloads the pictures of some rows, and makes a sample of each.

    Args:
      rows: of the input.
      prepare: makes a sample.
      flags: of downloads.

    Returns:
      For each row its sample, or why there is none.

    Raises:
      OSError: if a file of the user's cannot be read for another reason than that it is not there.
    """
    cv2.setNumThreads(1)  # the processes are what shares the cores
    wanted = [(number, column) for number, row in enumerate(rows) for column in row.pictures]
    urls = [(place, cell.address) for place in wanted if isinstance(cell := _cell(rows, place), Url)]
    done: list[Sample | RejectedError | None] = [None] * len(rows)
    files: dict[int, dict[str, Any]] = {number: {} for number, _ in wanted}

    def collect(place: tuple[int, str], data: bytes | RejectedError) -> None:
        number, column = place
        files[number][column] = data
        if len(files[number]) == len(rows[number].pictures):
            done[number] = _prepare_one(rows[number], files.pop(number), prepare)

    for place in wanted:
        if not isinstance(cell := _cell(rows, place), Url):
            collect(place, _read(cell))
    if urls:
        download([address for _, address in urls], flags, lambda i, data: collect(urls[i][0], data))
    return [RejectedError("no picture") if sample is None else sample for sample in done]


def _cell(rows: Sequence[Row], place: tuple[int, str]) -> Any:
    return rows[place[0]].pictures[place[1]]


def _prepare_one(row: Row, files: dict[str, Any], prepare: Prepare) -> Sample | RejectedError:
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
        with fsspec.open(cell.path, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except (FileNotFoundError, IsADirectoryError):
        return RejectedError("no such file")
