"""The sources of samples: the hub, folders of images with a meta.jsonl, parquet, data saved by `datasets`, tar files.

A folder may be on an object store: every path may also be a URL that `fsspec` opens. Images stay encoded here, and are
decoded when a sample is read: see `codi_jax.data.images`.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from codi_jax.data import shards
from codi_jax.data.access import Access, names_own_files
from codi_jax.data.avatars import samples as avatars
from codi_jax.data.columns import FALLBACKS, Columns, captions_of, check_captions, find_columns
from codi_jax.data.files import Folder
from codi_jax.data.images import describe_cell
from codi_jax.data.picture_folders import captions_in
from codi_jax.data.table_files import (
    METADATA_FILES,
    Rows,
    WebDatasetShards,
    find_shards,
    load_prompts,
    load_table,
    was_saved,
)
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags
from codi_jax.io.json_files import parse_lines

_PROBED = 64  # rows whose contents identify a data set


@dataclass(frozen=True)
class Source:
    """The samples of a data set, not decoded.

    Attributes:
      rows: rows with the columns below; images as bytes or paths.
      columns: the columns' names.
      access: which paths and addresses in the rows are allowed.
      name: the data set's name, for messages.
      fingerprint: changes when the data does.
    """

    rows: Rows
    columns: Columns
    access: Access
    name: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows) if isinstance(self.rows, Dataset) else 0

    def row(self, number: int) -> dict[str, Any]:
        """The row with this number, for a source that is not a stream."""
        assert isinstance(self.rows, Dataset)
        return self.rows[number]

    def content_digest(self) -> str:
        """SHA-256 of the number of rows and some of them, wherever the data is; for a stream, only of its columns."""
        digest = hashlib.sha256(json.dumps(self.columns.names()).encode())
        if isinstance(self.rows, Dataset):
            digest.update(f"{len(self)}".encode())
            for number in np.linspace(0, len(self) - 1, min(_PROBED, len(self))).astype(int).tolist():
                row = {name: _essence(cell) for name, cell in self.row(number).items()}
                digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def is_streaming(self) -> bool:
        """Whether rows can only be read in order, and their number is unknown."""
        return isinstance(self.rows, IterableDataset)


def _essence(cell: Any) -> Any:
    """What identifies a cell independent of the data's folder: the contents of an image file, or its name."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or Path(cell.get("path") or "").name
    return hashlib.sha256(cell).hexdigest() if isinstance(cell, bytes) else cell


def open_source(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    train_shards: str | None = None,
    train_prompts: str | None = None,
    load_from_disk: bool = False,
    streaming: bool = False,
    cache_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = "text",
    condition_column: str | None = None,
    condition_is_optional: bool = False,
    max_train_samples: int | None = None,
    allow_outside_paths: bool = False,
    allow_private_addresses: bool = False,
) -> Source:
    """Opens a data set; see the flags of these names in `codi_jax.data.DataFlags`.

    Args:
      dataset_name: id on the hub, a folder, or a stream of avatars, see `codi_jax.data.avatars.samples`.
      dataset_config_name: its configuration.
      train_data_dir: a folder.
      train_shards: tar files of a WebDataset.
      train_prompts: a file of texts only, one per line or as parquet.
      load_from_disk: whether the folder was written by `datasets`' save_to_disk, which is also recognized without it.
      streaming: whether rows are read in order, without downloading all first.
      cache_dir: the cache of `datasets`.
      image_column: name of a column; ``None`` for training on texts only.
      caption_column: name of a column; ``None`` for training without text.
      condition_column: name of a column; ``None`` for a task without conditions.
      condition_is_optional: whether the condition column may be missing.
      max_train_samples: number of the first samples to take. Default: all.
      allow_outside_paths: whether paths in tables may lead out of the folder.
      allow_private_addresses: whether tables may have addresses on this machine and its local network.

    Raises:
      ValueError: if the data set does not exist, lacks a column, or has no rows.
    """
    where = train_prompts or train_data_dir or train_shards or dataset_name
    if where is None:
        raise ValueError("there is no data to train on: give --dataset_name or --train_data_dir.")
    if train_data_dir is not None:
        require_folder(train_data_dir)
    is_folder = train_shards is None and train_prompts is None and Folder(where).is_dir()
    downloads = DownloadFlags(allow_private_addresses=allow_private_addresses)
    access = Access(Folder(where).path if is_folder else None, anywhere=allow_outside_paths, downloads=downloads)
    wanted = Columns(image_column, caption_column, condition_column)
    request = _Request(where, wanted, condition_is_optional, access)
    if dataset_name == where and avatars.names_avatars(where):
        source = _from_rows(avatars.stream(where), request)
    elif train_prompts is not None:
        source = _from_rows(load_prompts(Path(where).expanduser(), wanted), request)
    elif train_shards is not None:
        source = _from_shards(find_shards(train_shards), request)
    else:
        source = _from_listed_files(request, streaming)
        if source is None:
            source = _from_table(request, dataset_config_name, load_from_disk, streaming, cache_dir)
    return _limited(source, where, max_train_samples)


@dataclass(frozen=True)
class _Request:
    """What a caller of `open_source` asks for.

    Attributes:
      where: the data set: a folder, an id on the hub, a file or a pattern of files.
      columns: the names that the flags give.
      condition_is_optional: whether the data may lack the column of conditions.
      access: what paths and addresses in tables may be.
    """

    where: str
    columns: Columns
    condition_is_optional: bool
    access: Access

    @property
    def folder(self) -> Folder:
        return Folder(self.where)

    def find(self, names: Sequence[str], where: str) -> Columns:
        """The columns among those of ``where``."""
        return find_columns(self.columns, names, where, self.condition_is_optional)


def _limited(source: Source, where: str, max_train_samples: int | None) -> Source:
    """The first samples of a source, or all of them."""
    rows = source.rows
    if max_train_samples is not None:
        rows = rows.take(min(max_train_samples, len(rows)) if isinstance(rows, Dataset) else max_train_samples)
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"{where} holds no samples.")
    return Source(rows, source.columns, source.access, where, f"{source.fingerprint}-{max_train_samples}")


def require_folder(path: str) -> None:
    """Raises `ValueError` if the folder of ``--train_data_dir`` does not exist."""
    if not Folder(path).is_dir():
        raise ValueError(f"there is no folder {path}: check --train_data_dir.")


def files_fingerprint(source: Source) -> str:
    """A digest of the data set's fingerprint and of the sizes and dates of the image files that it names.

    Args:
      source: a source that is not a stream.
    """
    digest = hashlib.sha256(source.fingerprint.encode())
    assert isinstance(source.rows, Dataset)
    folder = Folder(source.access.folder or "")
    if not folder.is_local:  # one request for all files, whose answer differs between object stores
        listed_files = folder.fs.find(folder.locate(), detail=True)
        digest.update(json.dumps([listed_files[path] for path in sorted(listed_files)], default=str).encode())
        return digest.hexdigest()
    for name in (source.columns.image, source.columns.condition):
        for cell in source.rows[name] if name else ():
            path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
            if isinstance(path, str):
                file = Path(folder.url(path))
                stat = file.stat() if file.is_file() else None
                digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}".encode())
    return digest.hexdigest()


def _from_listed_files(request: _Request, streaming: bool) -> Source | None:
    """A folder of images listed in a meta.jsonl, or with captions next to them; ``None`` for any other data."""
    metadata = next((name for name in METADATA_FILES if request.folder.has(name)), None)
    captions = {} if metadata is not None else _captions_beside(request)
    if metadata is not None:
        source = _from_metadata(metadata, request)
    elif captions:
        source = _from_captions(captions, request)
    else:
        return None
    rows = source.rows
    return replace(source, rows=rows.to_iterable_dataset()) if streaming and isinstance(rows, Dataset) else source


def _from_table(
    request: _Request, config: str | None, load_from_disk: bool, streaming: bool, cache_dir: str | None
) -> Source:
    """Whatever `datasets` loads, by name or from a folder."""
    loaded = load_table(request.where, request.folder, config, load_from_disk, streaming, cache_dir)
    if not was_saved(request.folder) and names_own_files(loaded):
        request = replace(request, access=replace(request.access, anywhere=True))
    return _from_shards(loaded, request) if isinstance(loaded, WebDatasetShards) else _from_rows(loaded, request)


def _from_rows(rows: Rows, request: _Request) -> Source:
    where = request.where
    # select_columns and casts change the fingerprint by hashes of code: the data's own is taken first.
    fingerprint = f"{where} {rows._fingerprint}" if isinstance(rows, Dataset) else where
    names = rows.column_names
    if names is None:
        first = next(iter(rows), None)
        names = list(first) if first is not None else []
    columns = request.find(names, where)
    rows = rows.select_columns(columns.names())
    if columns.caption is not None:
        check_captions(columns.caption, rows.features, where)
    for name in (columns.image, columns.condition):
        if name and rows.features is not None and isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Source(rows, columns, request.access, where, fingerprint)


def _from_shards(loaded: WebDatasetShards, request: _Request) -> Source:
    """The columns have the names of the flags, whatever the extensions of the files that they are read from."""
    where = request.where
    try:
        endings = shards.endings_in(loaded.files)
    except ValueError as error:
        hint = ' (for URLs: pip install "codi_jax[data]")' if isinstance(error.__context__, ImportError) else ""
        raise ValueError(f"the shards {where} could not be read: {error}{hint}") from None
    there = [name for name in request.columns.names() if set(shards.endings_for(name)) & set(endings)]
    columns = request.find([*there, *endings], where)
    pictures = [name for name in (columns.image, columns.condition) if name is not None]
    texts = [] if columns.caption is None else [columns.caption]
    if loaded.is_table:
        rows = shards.table(loaded.files, pictures, texts, loaded.cache_dir)
        return Source(rows, columns, Access(), where, f"{where} {rows._fingerprint}")
    return Source(shards.stream(loaded.files, pictures, texts), columns, Access(), where, where)


def _from_metadata(name: str, request: _Request) -> Source:
    folder, access = request.folder, request.access
    file = folder.url(name)
    with folder.open(name) as opened:
        lines = list(parse_lines(opened, file, "fix or delete it"))
    if not lines:
        raise ValueError(f"{file} is empty: it needs one JSON object for each image.")
    names = list(dict.fromkeys(name for _, row in lines for name in row))
    columns = request.find(names, file)
    for number, row in lines:
        for name in columns.names():
            _check_value(file, number, name, row.get(name), is_caption=name == columns.caption)
            if name != columns.caption:
                _check_path(file, number, row[name], access)
    values: dict[str, list[Any]] = {name: [row.get(name) for _, row in lines] for name in columns.names()}
    if columns.caption is not None:
        captions = values[columns.caption]
        _warn_of_missing(captions, f"samples in {file}")
        if any(isinstance(caption, list) for caption in captions):
            values[columns.caption] = [captions_of(caption) for caption in captions]
    return _from_values(values, columns, access, file, folder)


def _from_values(
    values: Mapping[str, list[Any]], columns: Columns, access: Access, name: str, folder: Folder
) -> Source:
    """A source of columns in memory, whose fingerprint covers all ``values``."""
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    rows = Dataset.from_dict({column: values[column] for column in columns.names()})
    where = str(Path(name).absolute()) if folder.is_local else name
    return Source(rows, columns, access, name, f"{where} {digest}")


def _warn_of_missing(captions: Sequence[Any], what: str) -> None:
    if missing := sum(not caption for caption in captions):
        text = f"{missing} of the {len(captions)} {what} have no caption: the empty text is used."
        warnings.warn(text, stacklevel=2)


def _captions_beside(request: _Request) -> dict[str, str | None]:
    """The captions of a folder of pictures, if it is one and they are requested by the usual name."""
    if request.columns.caption not in ("text", *FALLBACKS["text"]) or was_saved(request.folder):
        return {}
    return captions_in(request.folder)


def _from_captions(captions: Mapping[str, str | None], request: _Request) -> Source:
    folder, wanted = request.folder, request.columns
    values = {"image": list(captions), "text": [caption or "" for caption in captions.values()]}
    asked = replace(request, columns=replace(wanted, caption="text", image=wanted.image and "image"))
    columns = asked.find(list(values), folder.path)
    _warn_of_missing(values["text"], f"pictures in {folder}")
    return _from_values(values, columns, request.access, folder.path, folder)


def _check_value(file: str, number: int, name: str, value: Any, is_caption: bool) -> None:
    if isinstance(value, str) or (is_caption and value is None):
        return
    if is_caption and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return
    kind = "text or list of texts" if is_caption else "path of an image"
    found = f"{value!r:.40} under {name!r}, which is not a {kind}" if value is not None else f"no {name!r}"
    raise ValueError(f"{file}, line {number} has {found}: fix or delete it.")


def _check_path(file: str, number: int, path: str, access: Access) -> None:
    try:
        access.locate(path)
    except RejectedError as error:
        raise ValueError(f"{file}, line {number} names {path}: {error}.") from None


def describe_row(source: Source, row: Mapping[str, Any], number: int) -> str:
    """A name for a sample, for messages."""
    image = source.columns.image
    return f"row {number} of {source.name}" + ("" if image is None else f" ({describe_cell(row[image])})")
