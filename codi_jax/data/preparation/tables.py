"""Rows of the input: tables of URLs or images with captions, on the hub or in files, and folders of images.

Tables are read as Arrow batches, one after another: columns are filtered as a unit, memory does not depend on the
number of rows, and nothing is copied to a cache.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from codi_jax.cli.flags import Flags, Topic
from codi_jax.cli.messages import first_line, listed
from codi_jax.data.access import Access, is_web, names_own_files
from codi_jax.data.files import Folder
from codi_jax.data.images import file_of
from codi_jax.data.picture_folders import caption_path, images_in
from codi_jax.data.preparation.rows import Cell, File, InputRow, Skipped, Url, clean_text
from codi_jax.data.table_files import METADATA_FILES, SAVED, text_options
from codi_jax.io.decoding import RejectedError

_BATCH = 1000
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
# Usual names of a column, tried in this order if the flag is not given.
_URLS = ("url", "URL", "image_url", "IMAGE_URL")
_IMAGES = ("image", "jpg", "png", "file_name", "original_image")
_CAPTIONS = ("text", "TEXT", "caption", "generated_caption", "top_caption", "prompt", "txt")
_IDS = ("id", "ID", "SAMPLE_ID", "key", "hash")


@dataclass(frozen=True, kw_only=True)
class TableFlags(Flags):
    """The flags of the input."""

    topic: ClassVar[Topic] = Topic.INPUT

    input: str | None = None
    """Parquet, CSV, TSV or JSON lines of URLs and captions (files, patterns such as part-*.parquet, or URLs), a data
    set on the hub, what save_to_disk wrote, or a folder of images, whose captions are in .txt files of the same names
    or in a metadata.jsonl."""
    dataset_config_name: str | None = None
    """Configuration of a data set on the hub that has several."""
    split: str = "train"
    """Split of a data set on the hub."""
    cache_dir: str | None = None
    """Folder for downloaded tables."""
    url_column: str | None = None
    """Column of the addresses of images. Default: url, or another usual name."""
    image_column: str | None = None
    """Column of the images themselves or of paths to them, for tables without addresses."""
    caption_column: str | None = None
    """Column of the captions; for lists, the first one is used. Default: text, or another usual name."""
    id_column: str | None = None
    """Column of the ids, which random choices depend on. Default: id, or another usual name, or the row's number."""
    seed: int = 0
    """Seed of all random choices, together with the id of a sample."""
    allow_outside_paths: bool = False
    """Also read images that the table names outside of its folder, on this machine or on other storage. By default a
    table from elsewhere cannot copy your files into the data set."""


@dataclass(frozen=True)
class Filter:
    """Keeps rows by the number in one of their columns.

    Attributes:
      name: the score's name, for the summary.
      columns: names of the column in different data sets.
      limit: the limit of the numbers that are kept.
      at_least: whether it is a lower limit, not an upper one.
    """

    name: str
    columns: tuple[str, ...]
    limit: float | int
    at_least: bool = True

    def column(self, names: Sequence[str]) -> str | None:
        """The column that the filter reads, if the table has one."""
        return next((column for column in self.columns if column in names), None)

    def rejects(self, table: pa.Table, column: str) -> np.ndarray:
        """Whether each row is rejected, as rows without a number are."""
        values = _numbers(table[column])
        return ~(values >= self.limit if self.at_least else values <= self.limit)

    @property
    def reason(self) -> str:
        """The reason that is recorded for the rows that it rejects."""
        return f"{self.name} {'below' if self.at_least else 'above'} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(Flags):
    """Which rows are used, by score columns of web data sets; a missing column rejects nothing."""

    topic: ClassVar[Topic] = Topic.INPUT

    min_clip_similarity: float | None = None
    """Least similarity of image and caption in CLIP's space."""
    max_watermark_score: float | None = None
    """Largest probability of a watermark."""
    min_aesthetic_score: float | None = None
    """Least score of LAION's aesthetic predictor."""

    def check(self) -> None:
        super().check()
        self.require_in(-1, 1, "min_clip_similarity")
        self.require_in(0, 1, "max_watermark_score")

    @property
    def filters(self) -> tuple[Filter, ...]:
        """The filters that are requested, with the names of the columns in COYO and LAION."""
        similarity = ("clip_similarity_vitb32", "clip_similarity_vitl14", "similarity", "SIMILARITY")
        aesthetic = ("aesthetic_score_laion_v2", "aesthetic_score", "AESTHETIC_SCORE", "aesthetic")
        watermark = ("watermark_score", "pwatermark")
        found = []
        if self.min_clip_similarity is not None:
            found.append(Filter("clip similarity", similarity, self.min_clip_similarity))
        if self.max_watermark_score is not None:
            found.append(Filter("watermark score", watermark, self.max_watermark_score, at_least=False))
        if self.min_aesthetic_score is not None:
            found.append(Filter("aesthetic score", aesthetic, self.min_aesthetic_score))
        return tuple(found)


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table are read.

    Attributes:
      pictures: pairs of the written and the read column.
      texts: pairs of the written and the read column.
      id: column of the ids, if there is one.
      are_urls: whether pictures are addresses to download from.
    """

    pictures: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str], ...]
    id: str | None
    are_urls: bool


@dataclass(frozen=True)
class Table:
    """A table of samples.

    Attributes:
      rows: a table of `datasets`.
      columns: the columns that are read.
      filters: pairs of a filter and the column that it reads.
      access: which paths in the table are allowed.
    """

    rows: Dataset | IterableDataset
    columns: TableColumns
    filters: tuple[tuple[Filter, str], ...] = ()
    access: Access = field(default_factory=Access)

    def items(self) -> Iterator[InputRow | Skipped]:
        """The table's rows, in order, from the first."""
        position = 0
        for table in self.rows.with_format("arrow").iter(batch_size=_BATCH):
            assert isinstance(table, pa.Table)
            yield from self._batch_items(table, position)
            position += len(table)

    def _batch_items(self, table: pa.Table, first: int) -> Iterator[InputRow | Skipped]:
        reasons: list[str | None] = [None] * len(table)
        for each, column in self.filters:
            for index in np.flatnonzero(each.rejects(table, column)):
                reasons[index] = reasons[index] or each.reason
        kept = pa.array([index for index, reason in enumerate(reasons) if reason is None], pa.int64())
        rows = iter(self._rows(table.take(kept), kept.to_pylist(), first))
        for index, reason in enumerate(reasons):
            yield next(rows) if reason is None else Skipped(first + index, reason)

    def _rows(self, table: pa.Table, indices: Sequence[int], first: int) -> Iterator[InputRow | Skipped]:
        columns = self.columns
        pictures = {name: _cells(table[column]) for name, column in columns.pictures}
        texts = {name: _values(table[column]) for name, column in columns.texts}
        ids = _values(table[columns.id]) if columns.id else [None] * len(table)
        for number, index in enumerate(indices):
            position = first + index
            cells = {name: self._cell(values[number]) for name, values in pictures.items()}
            rejected = next((cell for cell in cells.values() if isinstance(cell, RejectedError)), None)
            if rejected is not None:
                yield Skipped(position, rejected.reason)
                continue
            row_texts = {name: _text(values[number]) for name, values in texts.items()}
            given = ids[number]
            row_id = str(position) if given is None else clean_text(given if isinstance(given, bytes) else str(given))
            yield InputRow(position, row_id, cells, {**row_texts, "id": row_id})  # type: ignore[arg-type]

    def _cell(self, value: Any) -> Cell | RejectedError:
        value = file_of(value)
        if isinstance(value, bytes) and not self.columns.are_urls:
            return value
        address = clean_text(value) if isinstance(value, bytes) else str(value or "").strip()
        if not address:
            return RejectedError("no address" if self.columns.are_urls else "no picture")
        if self.columns.are_urls or is_web(address):
            return Url(address)
        try:
            return File(self.access.locate(address))
        except RejectedError as error:
            return error


def open_table(
    flags: TableFlags,
    columns: Callable[[Sequence[str], str], TableColumns],
    *,
    default: str | None = None,
    filters: Sequence[Filter] = (),
    shuffle: bool = False,
) -> tuple[Callable[[], Iterable[InputRow | Skipped]], str]:
    """Opens the input.

    Args:
      flags: the user's flags.
      columns: called with the names of the columns and of the input, returns those to read; see `image_columns`.
      default: a data set on the hub. Default of ``--input``.
      filters: the filters, applied if the table has their columns.
      shuffle: whether to read the rows in an order that depends only on the seed.

    Returns:
      A function that iterates over the rows from the first on, and one line about what is read.

    Raises:
      ValueError: if the input does not exist, or a column is missing.
    """
    where = flags.input or default
    if where is None:
        raise ValueError("no input: give --input.")
    folder = Folder(where)
    if _is_folder_of_images(folder):
        paths = sorted(images_in(folder))
        if shuffle:
            np.random.default_rng(flags.seed % 2**64).shuffle(paths)
        return functools.partial(_items_of_images, folder, paths), f"{len(paths)} images in {where}"
    rows = _load(where, folder, flags, in_memory_order=shuffle)
    if shuffle:
        assert isinstance(rows, Dataset)
        rows = rows.shuffle(seed=flags.seed % 2**32, keep_in_memory=True)
    names = column_names(rows, where)
    read = columns(names, where)
    applied = tuple((each, column) for each in filters if (column := each.column(names)))
    chosen = [column for _, column in (*read.pictures, *read.texts, *applied)] + ([read.id] if read.id else [])
    rows = undecoded(rows.select_columns(list(dict.fromkeys(chosen))))
    left_out = [each.name for each in filters if not each.column(names)]
    line = f"{where}, columns {', '.join(dict.fromkeys(chosen))}"
    line += f"; not filtered by {' and '.join(left_out)}, for which it has no column" if left_out else ""
    return Table(rows, read, applied, _access(where, folder, rows, flags)).items, line


def _access(where: str, folder: Folder, rows: Dataset | IterableDataset, flags: TableFlags) -> Access:
    """Which files the table may name: those in its folder, and those that `datasets` itself has found or fetched."""
    if folder.is_dir():
        are_found = not any(folder.has(name) for name in SAVED) and names_own_files(rows)
        return Access(folder.path, anywhere=flags.allow_outside_paths or are_found)
    if _files(where, folder)[0]:  # paths are relative to the working directory
        return Access(None, Folder(where.rpartition("/")[0] or ".").path, flags.allow_outside_paths)
    return Access(anywhere=flags.allow_outside_paths or names_own_files(rows))


def image_columns(flags: TableFlags, condition: str | None, names: Sequence[str], where: str) -> TableColumns:
    """The columns of the image or its address, the caption and, if ``condition`` names it, the condition image.

    Raises:
      ValueError: if one of them is missing.
    """
    given = flags.image_column
    url = None if given else find_column(flags.url_column, _URLS, names, where, "--url_column", optional=True)
    image = url or find_column(given, _IMAGES, names, where, "--image_column or --url_column")
    pictures = [("image", image)]
    if condition is not None:
        flag = "--conditioning_image_column"
        pictures.append(("conditioning_image", find_column(condition, (), names, where, flag)))
    caption = find_column(flags.caption_column, _CAPTIONS, names, where, "--caption_column")
    return TableColumns(tuple(pictures), (("text", caption),), id_column(flags, names, where), bool(url))


def id_column(flags: TableFlags, names: Sequence[str], where: str) -> str | None:
    """The column of the ids, if the table has one; raises `ValueError` if it lacks the one that the flag names."""
    return find_column(flags.id_column, _IDS, names, where, "--id_column", optional=True) or None


def find_column(
    name: str | None, usual: Sequence[str], names: Sequence[str], where: str, flag: str, optional: bool = False
) -> str:
    """The column that a flag names or, without the flag, the first usual one that exists.

    Returns:
      Its name; the empty text if an optional column does not exist.

    Raises:
      ValueError: if the column does not exist.
    """
    if name is not None and name not in names:
        raise ValueError(f"{where} has no column {name!r}: set {flag} to one of {listed(list(names))}.")
    found = name or next((each for each in usual if each in names), None)
    if found is None and not optional:
        raise ValueError(
            f"{where} has none of the columns {', '.join(usual)}: set {flag} to one of {listed(list(names))}."
        )
    return found or ""


def column_names(rows: Dataset | IterableDataset, where: str) -> list[str]:
    """The names of the columns of a table.

    Raises:
      ValueError: if it has no rows.
    """
    names = rows.column_names
    if not names:
        first = next(iter(rows), None)
        if first is None:
            raise ValueError(f"{where} has no rows.")
        names = list(first)
    return names


def undecoded(rows: Any) -> Any:
    """The table with pictures as the bytes of their files."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _load(where: str, folder: Folder, flags: TableFlags, in_memory_order: bool) -> Dataset | IterableDataset:
    """Any table, streamed unless it has to be shuffled."""
    options: dict[str, Any] = {"split": flags.split, "streaming": not in_memory_order, "cache_dir": flags.cache_dir}
    try:
        if any(folder.has(name) for name in SAVED):
            saved = datasets.load_from_disk(where)
            return saved[flags.split] if isinstance(saved, datasets.DatasetDict) else saved
        files, ending = _files(where, folder)
        if files:
            builder = _BUILDERS[ending]
            return datasets.load_dataset(builder, data_files={flags.split: files}, **options, **text_options(ending))
        return datasets.load_dataset(where, flags.dataset_config_name, **options)
    except Exception as error:
        raise ValueError(f"--input {where} could not be read: {first_line(error)}") from error


def _files(where: str, folder: Folder) -> tuple[list[str], str]:
    """The files of a table: those that match the pattern or lie in the folder; none for a data set on the hub."""
    parent, name = Folder(where.rpartition("/")[0] or "."), PurePosixPath(where).name
    if folder.is_dir():
        listed_in = [name for name in METADATA_FILES if folder.has(name)]
        inside = listed_in or [name for name in folder.names() if PurePosixPath(name).suffix in _BUILDERS]
        files = [folder.url(name) for name in inside]
    elif "*" in name:
        files = [parent.url(each) for each in parent.names() if PurePosixPath(each).match(name)]
    else:
        files = [where] if parent.has(name) else []
    endings = sorted({PurePosixPath(file).suffix for file in files})
    if not files:
        if PurePosixPath(name).suffix in _BUILDERS or "*" in name:
            raise FileNotFoundError("there is no such file")
        return [], ""
    if len(endings) > 1 or endings[0] not in _BUILDERS:
        raise ValueError(f"it has files of the kinds {', '.join(endings)}: name those of one of {', '.join(_BUILDERS)}")
    return files, endings[0]


def _is_folder_of_images(folder: Folder) -> bool:
    if not folder.is_dir():
        return False
    names = folder.names()
    return not any(PurePosixPath(name).suffix in _BUILDERS or name in SAVED for name in names)


def _items_of_images(folder: Folder, paths: Sequence[str]) -> Iterator[InputRow]:
    for position, path in enumerate(paths):
        text = caption_path(path)
        caption = clean_text(folder.read(text)) if folder.has(text) else ""
        yield InputRow(position, path, {"image": File(folder.url(path))}, {"text": caption, "id": path})


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numbers, with NaN for missing ones; a column with "NA" in it is a text column."""
    try:
        return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    except pa.ArrowInvalid:
        return np.array([_number(value) for value in column.to_pylist()], np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python objects of a column; texts as bytes, because they may not be valid UTF-8."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    return column.to_pylist()


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """The cells of a column of pictures: texts as `str`, and files as `bytes`."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [value and value.decode("utf-8", "surrogateescape") for value in _values(column)]
    return column.to_pylist()


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    return clean_text(value if isinstance(value, str | bytes) or value is None else str(value))
