"""Where samples come from: the hub, folders of images with a meta.jsonl, parquet, data saved by `datasets`, tar files.

A folder may lie on an object store: wherever a path is meant, a URL that `fsspec` opens will do.
Images stay encoded here, and are opened by whoever wants the sample: see `codi_jax.data.images`.
"""

import csv
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from codi_jax.cli.messages import first_line, listed
from codi_jax.data import shards
from codi_jax.data.access import Access, names_own_files
from codi_jax.data.files import Folder, is_url
from codi_jax.data.images import describe_cell
from codi_jax.data.picture_folders import captions_in
from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags

Rows = Dataset | IterableDataset

_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}

METADATA_FILES = ("meta.jsonl", "metadata.jsonl")
"""The file that lists the samples of a folder."""

_FALLBACKS = {"image": ("file_name", "jpg", "png", "jpeg", "webp"), "text": ("caption", "txt")}
"""Other names of a column, tried where the column has its default name."""

_ENDINGS = (".jpg", ".png", ".jpeg", ".webp", ".txt")  # of the files of a WebDataset's samples, which are its columns

_PROBED = 64  # rows that tell one data set from another


@dataclass(frozen=True)
class Shards:
    """A WebDataset.

    Attributes:
      files: the tar files, paths or URLs.
      is_table: whether to read all of them first, for random access.
      cache_dir: of `datasets`, for that.
    """

    files: tuple[str, ...]
    is_table: bool = False
    cache_dir: str | None = None


SAVED = ("dataset_dict.json", "state.json")
"""What save_to_disk leaves in a folder."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read.

    Attributes:
      image: pictures to generate; ``None`` if they are not read.
      caption: their texts, one or a list for each; ``None`` if they are not read.
      condition: pictures that they are conditioned on, if the data has them.
    """

    image: str | None
    caption: str | None
    condition: str | None = None

    def names(self) -> list[str]:
        """All of them."""
        return [name for name in (self.image, self.caption, self.condition) if name is not None]


@dataclass(frozen=True)
class Source:
    """The samples of a data set, not decoded.

    Attributes:
      rows: of the columns below; images as bytes or paths.
      columns: their names.
      access: what paths and addresses in them may be.
      name: of the data set, for messages.
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
        """One of the rows, of a source that is not a stream."""
        assert isinstance(self.rows, Dataset)
        return self.rows[number]

    def content_digest(self) -> str:
        """SHA-256 of some rows and their number, the same wherever the data lies; of a stream, of its columns alone."""
        digest = hashlib.sha256(json.dumps(self.columns.names()).encode())
        if isinstance(self.rows, Dataset):
            digest.update(f"{len(self)}".encode())
            for number in np.linspace(0, len(self) - 1, min(_PROBED, len(self))).astype(int).tolist():
                row = {name: _essence(cell) for name, cell in self.row(number).items()}
                digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def is_streaming(self) -> bool:
        """Whether rows come one after the other only, and their number is not known."""
        return isinstance(self.rows, IterableDataset)


def _essence(cell: Any) -> Any:
    """What stays of a cell when the data moves to another folder: of an image file its contents, or else its name."""
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
      dataset_name: id on the hub, or a folder.
      dataset_config_name: its configuration.
      train_data_dir: a folder.
      train_shards: tar files of a WebDataset.
      train_prompts: a file of nothing but texts, one a line, or of parquet.
      load_from_disk: the folder was made by `datasets`' save_to_disk; which is found out without it, too.
      streaming: read row after row.
      cache_dir: of `datasets`.
      image_column: name of a column; ``None`` for training on texts alone.
      caption_column: name of a column; ``None`` for training without text.
      condition_column: name of a column; ``None`` for a task without conditions.
      condition_is_optional: do without the condition column where it is missing.
      max_train_samples: take the first ones only.
      allow_outside_paths: paths in tables may lead out of the folder.
      allow_private_addresses: addresses in tables may be of this machine and its own network.

    Raises:
      ValueError: if there is no such data set, a column is missing, or it has no rows.
    """
    where = train_prompts or train_data_dir or train_shards or dataset_name
    if where is None:
        raise ValueError("there is no data to train on: give --dataset_name or --train_data_dir.")
    wanted = Columns(image_column, caption_column, condition_column)
    folder = Folder(where)
    if train_data_dir is not None:
        require_folder(train_data_dir)
    is_table = train_shards is not None or train_prompts is not None
    downloads = DownloadFlags(allow_private_addresses=allow_private_addresses)
    own = folder.path if not is_table and folder.is_dir() else None
    access = Access(own, anywhere=allow_outside_paths, downloads=downloads)
    metadata = None if is_table else next((name for name in METADATA_FILES if folder.has(name)), None)
    captions = _captions_beside(folder, wanted) if metadata is None and not is_table else {}
    if metadata is not None:
        source = _from_metadata(folder, metadata, wanted, condition_is_optional, access)
    elif captions:
        source = _from_captions(folder, captions, wanted, condition_is_optional, access)
    else:
        if train_prompts is not None:
            loaded = _load_prompts(Path(where).expanduser(), wanted)
        elif train_shards is not None:
            loaded = _find_shards(train_shards)
        else:
            loaded = _load(where, folder, dataset_config_name, load_from_disk, streaming, cache_dir)
            if not _was_saved(folder) and names_own_files(loaded):
                access = replace(access, anywhere=True)
        if isinstance(loaded, Shards):
            source = _from_shards(loaded, wanted, condition_is_optional, where)
        else:
            source = _from_rows(loaded, wanted, condition_is_optional, access, where)
    rows = source.rows
    if (metadata is not None or captions) and streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset()
    if max_train_samples is not None:
        rows = rows.take(min(max_train_samples, len(rows)) if isinstance(rows, Dataset) else max_train_samples)
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"{where} holds no samples.")
    return Source(rows, source.columns, source.access, where, f"{source.fingerprint}-{max_train_samples}")


def require_folder(path: str) -> None:
    """Raises `ValueError` if the folder of ``--train_data_dir`` is not there."""
    if not Folder(path).is_dir():
        raise ValueError(f"there is no folder {path}: check --train_data_dir.")


def files_fingerprint(source: Source) -> str:
    """The data set's fingerprint, and the sizes and dates of the image files that it names.

    Args:
      source: not a stream.
    """
    digest = hashlib.sha256(source.fingerprint.encode())
    assert isinstance(source.rows, Dataset)
    folder = Folder(source.access.folder or "")
    if not folder.is_local:  # one request for all: what it tells of a file differs between object stores
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


def _was_saved(folder: Folder) -> bool:
    return any(folder.has(name) for name in SAVED)


def _load(
    where: str, folder: Folder, config: str | None, load_from_disk: bool, streaming: bool, cache_dir: str | None
) -> "Rows | Shards":
    """Whatever `datasets` can load, its training split; of a WebDataset the shards, which we read ourselves."""
    try:
        if _was_saved(folder):
            loaded = datasets.load_from_disk(folder.path)
            loaded = _training_split(loaded, where)
            return loaded.to_iterable_dataset() if streaming and isinstance(loaded, Dataset) else loaded
        if folder.is_local:
            name, files = (folder.path if folder.is_dir() else where), None
        else:
            name, files = _files_of(folder)
        builder = datasets.load_dataset_builder(
            name, config, data_files=files, cache_dir=cache_dir, **_options_of(folder)
        )
        if builder.name == "webdataset":
            files = _training_split(dict(builder.config.data_files or {}), where)
            return Shards(tuple(files), not streaming, cache_dir)
        if streaming:
            loaded = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    except Exception as error:
        raise ValueError(_explained(error, where, folder, load_from_disk)) from error
    return _training_split(loaded, where)


def _options_of(folder: Folder) -> dict[str, Any]:
    """How `datasets` reads the files of a folder, where they are tables that are texts, all of one kind."""
    paths = folder.fs.find(folder.locate()) if folder.is_dir() and folder.is_local else ()
    endings = {PurePosixPath(path).suffix for path in paths} - {".md", ""}
    return text_options(*endings) if len(endings) == 1 else {}


def text_options(ending: str) -> dict[str, Any]:
    """How `datasets` reads tables that are texts, by the ending of their files."""
    if ending not in (".csv", ".tsv", ".json", ".jsonl"):
        return {}
    options: dict[str, Any] = {"encoding": "utf-8-sig", "encoding_errors": "replace"}
    if ending in (".csv", ".tsv"):  # "NA", "null" and "None" are captions, and only what is empty is none
        options |= {"keep_default_na": False, "na_values": [""]}
    # A TSV has no quotes: one that is in a caption would take the rows up to the next with it.
    return options | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {})


def _load_prompts(file: Path, wanted: Columns) -> Dataset:
    """The texts of a file: its lines, empty ones left out, or the columns of parquet."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: check --train_prompt_path.")
    if file.suffix == ".parquet":
        try:
            return Dataset.from_parquet(str(file))  # pyright: ignore[reportReturnType]
        except Exception as error:
            raise ValueError(f"--train_prompt_path {file} could not be read as parquet: {error}.") from error
    try:
        # Not str.splitlines, which cuts at U+2028, U+0085 and vertical tabs, too: they stand in captions of the web.
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise ValueError(
            f"--train_prompt_path {file} is no text: give a prompt a line, or a .parquet file (texts are UTF-8)."
        ) from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--train_prompt_path {file} is empty: write a prompt a line.")
    return Dataset.from_dict({wanted.caption or "text": prompts})


def _files_of(folder: Folder) -> tuple[str, dict[str, list[str]]]:
    """What reads the files of a folder on an object store, and their URLs: `datasets` finds that out on disks only."""
    for ending, builder in _BUILDERS.items():
        if files := [folder.url(name) for name in folder.names() if name.endswith(ending)]:
            return builder, {"train": files}
    raise ValueError(f"no file ends with {' or '.join(_BUILDERS)}")


def _find_shards(pattern: str) -> Shards:
    """The tar files of a pattern, to be read as a stream."""
    files = [file if is_url(file) else str(Path(file).expanduser()) for file in _expanded(pattern)]
    missing = [file for file in files if not is_url(file) and not Path(file).is_file()]
    if missing:
        raise ValueError(f"there is no shard {missing[0]}: check --train_shards_path_or_url.")
    return Shards(tuple(files))


def _expanded(pattern: str) -> list[str]:
    """The files of a pattern with ranges: ``a{08..11}`` is a08, a09, a10, a11."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [file for number in numbers for file in _expanded(f"{before}{number:0{len(first)}}{after}")]


def _training_split(loaded: Any, where: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ValueError(f"{where} has no split named train, but {', '.join(loaded)}.")


def _explained(error: Exception, where: str, folder: Folder, load_from_disk: bool) -> str:
    reason = first_line(error)
    if folder.is_dir():
        if isinstance(error, ValueError) and reason.startswith(where):
            return reason
        made = ", nor what save_to_disk writes" if load_from_disk else ""
        return (
            f"{folder} holds no data set: it has no {' or '.join(METADATA_FILES)}{made}, and `datasets` says: {reason} "
            f"(it holds {listed(folder.names())})."
        )
    return (
        f"the data set {where} could not be loaded: {reason} "
        "(check --dataset_name and --dataset_config_name, or run `hf auth login` if it is private)."
    )


def _from_rows(rows: Rows, wanted: Columns, optional: bool, access: Access, where: str) -> Source:
    # select_columns and casts change the fingerprint by hashes of code: that of the data is taken first.
    fingerprint = f"{where} {rows._fingerprint}" if isinstance(rows, Dataset) else where
    names = rows.column_names
    if names is None:
        first = next(iter(rows), None)
        names = list(first) if first is not None else []
    columns = _find_columns(wanted, names, where, optional)
    rows = rows.select_columns(columns.names())
    if columns.caption is not None:
        _check_captions(columns.caption, rows.features, where)
    for name in (columns.image, columns.condition):
        if name and rows.features is not None and isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Source(rows, columns, access, where, fingerprint)


def _from_shards(loaded: Shards, wanted: Columns, optional: bool, where: str) -> Source:
    """The columns have the names that they are asked for by, whatever the endings are that they are read from."""
    try:
        endings = shards.endings_in(loaded.files)
    except ValueError as error:
        hint = ' (for URLs: pip install "codi_jax[data]")' if isinstance(error.__context__, ImportError) else ""
        raise ValueError(f"the shards {where} could not be read: {error}{hint}") from None
    there = [name for name in wanted.names() if set(shards.endings_for(name)) & set(endings)]
    columns = _find_columns(wanted, [*there, *endings], where, optional)
    pictures = [name for name in (columns.image, columns.condition) if name is not None]
    texts = [] if columns.caption is None else [columns.caption]
    if loaded.is_table:
        rows = shards.table(loaded.files, pictures, texts, loaded.cache_dir)
        return Source(rows, columns, Access(), where, f"{where} {rows._fingerprint}")
    return Source(shards.stream(loaded.files, pictures, texts), columns, Access(), where, where)


def _check_captions(name: str, features: datasets.Features | None, where: str) -> None:
    feature = features[name] if features is not None else None
    kind = getattr(feature, "feature", feature)  # of a list, that of its elements
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"column {name!r} of {where} holds {feature}, not texts or lists of texts: set --caption_column to another."
        )


def _from_metadata(folder: Folder, name: str, wanted: Columns, optional: bool, access: Access) -> Source:
    file = folder.url(name)
    with folder.open(name) as opened:
        lines = list(_read_lines(file, opened))
    if not lines:
        raise ValueError(f"{file} is empty: it needs one JSON object for each image.")
    names = list(dict.fromkeys(name for _, row in lines for name in row))
    columns = _find_columns(wanted, names, file, optional)
    for number, row in lines:
        for name in columns.names():
            _check_value(file, number, name, row.get(name), is_caption=name == columns.caption)
            if name != columns.caption:
                _check_path(file, number, row[name], access)
    values: dict[str, list[Any]] = {name: [row.get(name) for _, row in lines] for name in columns.names()}
    if columns.caption is not None and (missing := sum(not row.get(columns.caption) for _, row in lines)):
        text = f"{missing} of the {len(lines)} samples in {file} have no caption: theirs is the empty text."
        warnings.warn(text, stacklevel=2)
    if columns.caption is not None and any(isinstance(caption, list) for caption in values[columns.caption]):
        values[columns.caption] = [captions_of(caption) for caption in values[columns.caption]]
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    where = str(Path(file).absolute()) if folder.is_local else file
    return Source(Dataset.from_dict(values), columns, access, file, f"{where} {digest}")


def _captions_beside(folder: Folder, wanted: Columns) -> dict[str, str | None]:
    """The captions of a folder of pictures, if it is one and they are asked for by the usual name."""
    if wanted.caption not in ("text", *_FALLBACKS["text"]) or any(folder.has(name) for name in SAVED):
        return {}
    return captions_in(folder)


def _from_captions(
    folder: Folder, captions: Mapping[str, str | None], wanted: Columns, optional: bool, access: Access
) -> Source:
    values = {"image": list(captions), "text": [caption or "" for caption in captions.values()]}
    asked = replace(wanted, caption="text", image=wanted.image and "image")
    columns = _find_columns(asked, list(values), folder.path, optional)
    if missing := sum(not caption for caption in captions.values()):
        text = f"{missing} of the {len(captions)} pictures in {folder} have no caption: theirs is the empty text."
        warnings.warn(text, stacklevel=2)
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    rows = Dataset.from_dict({name: values[name] for name in columns.names()})
    where = str(Path(folder.path).absolute()) if folder.is_local else folder.path
    return Source(rows, columns, access, folder.path, f"{where} {digest}")


def _read_lines(file: str, lines: Iterable[bytes]) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not valid JSON ({error}): mend or delete it.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} holds no JSON object but {row!r:.40}: mend or delete it.")
        yield number, row


def _check_value(file: str, number: int, name: str, value: Any, is_caption: bool) -> None:
    if isinstance(value, str) or (is_caption and value is None):
        return
    if is_caption and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return
    kind = "text or list of texts" if is_caption else "path of an image"
    found = f"{value!r:.40} under {name!r}, which is no {kind}" if value is not None else f"no {name!r}"
    raise ValueError(f"{file}, line {number} has {found}: mend or delete it.")


def _check_path(file: str, number: int, path: str, access: Access) -> None:
    try:
        access.locate(path)
    except RejectedError as error:
        raise ValueError(f"{file}, line {number} names {path}: {error}.") from None


def captions_of(cell: Any) -> list[str]:
    """The texts of a sample: those of a list, or the one; an empty one if there is none.

    Raises:
      ValueError: if it is neither text nor list of texts.
    """
    texts = [cell] if isinstance(cell, str) else [] if cell is None else cell
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a text or a list of texts, not {cell!r:.40}: check --caption_column.")
    return list(texts) or [""]


def _find_columns(wanted: Columns, names: Sequence[str], where: str, condition_is_optional: bool) -> Columns:
    condition = wanted.condition
    if condition is not None and condition_is_optional and condition not in names:
        condition = None
    return Columns(
        None if wanted.image is None else _find_column(wanted.image, names, where, "--image_column"),
        None if wanted.caption is None else _find_column(wanted.caption, names, where, "--caption_column"),
        condition and _find_column(condition, names, where, "--conditioning_image_column"),
    )


def _find_column(name: str, names: Sequence[str], where: str, flag: str) -> str:
    others = (*_FALLBACKS.get(name, ()), *(f"{name}{ending}" for ending in _ENDINGS))
    found = next((column for column in (name, *others) if column in names), None)
    if found is None:
        raise ValueError(f"{where} has no column {name!r}: set {flag} to one of {listed(list(names))}.")
    return found


def describe_row(source: Source, row: Mapping[str, Any], number: int) -> str:
    """The name of a sample, for messages."""
    image = source.columns.image
    return f"row {number} of {source.name}" + ("" if image is None else f" ({describe_cell(row[image])})")
