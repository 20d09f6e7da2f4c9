"""Tables as `datasets` loads them: from the hub, from folders and what save_to_disk wrote, prompt files, tar shards."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from codi_jax.cli.messages import first_line, listed
from codi_jax.data.columns import Columns
from codi_jax.data.files import Folder, is_url
from codi_jax.io import torch_pickle

Rows = Dataset | IterableDataset


_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


METADATA_FILES = ("meta.jsonl", "metadata.jsonl")
"""The file that lists the samples of a folder."""


@dataclass(frozen=True)
class WebDatasetShards:
    """The shards of a WebDataset.

    Attributes:
      files: the tar files, paths or URLs.
      is_table: whether all of them are read first, for random access.
      cache_dir: the cache of `datasets`, for such a table.
    """

    files: tuple[str, ...]
    is_table: bool = False
    cache_dir: str | None = None


SAVED = ("dataset_dict.json", "state.json")
"""The files that save_to_disk writes into a folder."""


def was_saved(folder: Folder) -> bool:
    """Whether the folder was written by save_to_disk."""
    return any(folder.has(name) for name in SAVED)


def load_table(
    where: str, folder: Folder, config: str | None, load_from_disk: bool, streaming: bool, cache_dir: str | None
) -> Rows | WebDatasetShards:
    """The training split of anything that `datasets` can load; for a WebDataset its shards, which we read ourselves.

    Raises:
      ValueError: if it cannot be loaded.
    """
    try:
        if was_saved(folder):
            loaded = datasets.load_from_disk(folder.path)
            loaded = _training_split(loaded, where)
            return loaded.to_iterable_dataset() if streaming and isinstance(loaded, Dataset) else loaded
        if folder.is_local:
            name, files = (folder.path if folder.is_dir() else where), None
        else:
            name, files = _remote_files(folder)
        builder = datasets.load_dataset_builder(
            name, config, data_files=files, cache_dir=cache_dir, **_text_table_options(folder)
        )
        if builder.name == "webdataset":
            files = _training_split(dict(builder.config.data_files or {}), where)
            return WebDatasetShards(tuple(files), not streaming, cache_dir)
        if streaming:
            loaded = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    except Exception as error:
        raise ValueError(_explained(error, where, folder, load_from_disk)) from error
    return _training_split(loaded, where)


def _text_table_options(folder: Folder) -> dict[str, Any]:
    """Options of `datasets` for a folder whose files are all CSV, TSV or JSON tables of one kind."""
    paths = folder.fs.find(folder.locate()) if folder.is_dir() and folder.is_local else ()
    endings = {PurePosixPath(path).suffix for path in paths} - {".md", ""}
    return text_options(*endings) if len(endings) == 1 else {}


def text_options(ending: str) -> dict[str, Any]:
    """Options of `datasets` for CSV, TSV and JSON tables, by the extension of their files."""
    if ending not in (".csv", ".tsv", ".json", ".jsonl"):
        return {}
    options: dict[str, Any] = {"encoding": "utf-8-sig", "encoding_errors": "replace"}
    if ending in (".csv", ".tsv"):  # "NA", "null" and "None" are captions; only an empty cell is missing
        options |= {"keep_default_na": False, "na_values": [""]}
    # A TSV has no quotes: one in a caption would swallow the rows up to the next.
    return options | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {})


def load_prompts(file: Path, wanted: Columns, flag: str = "--train_prompt_path") -> Dataset:
    """The texts of a file: its non-empty lines, the columns of parquet, or a list that was pickled.

    Raises:
      ValueError: if the file does not exist, cannot be read, or is empty.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}: check {flag}.")
    if file.suffix == ".parquet":
        try:
            return Dataset.from_parquet(str(file))  # pyright: ignore[reportReturnType]
        except Exception as error:
            raise ValueError(f"{flag} {file} could not be read as parquet: {error}.") from error
    if file.suffix in (".pkl", ".pickle"):
        return Dataset.from_dict({wanted.caption or "text": _pickled_texts(file, flag)})
    try:
        # Not str.splitlines, which also splits at U+2028, U+0085 and vertical tabs: web captions contain them.
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise ValueError(
            f"{flag} {file} is not UTF-8 text: write one prompt per line, or give a .parquet file."
        ) from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{flag} {file} is empty: write one prompt per line.")
    return Dataset.from_dict({wanted.caption or "text": prompts})


def _pickled_texts(file: Path, flag: str) -> list[str]:
    """The texts of a pickled list, as DMD2's files of prompts are; nothing in the pickle is executed."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            content, _ = torch_pickle.load(opened, size, limit=size)
    except Exception as error:  # a damaged file can make the interpreter fail in any way
        raise ValueError(f"{flag} {file} is no pickled list of texts: {first_line(error)}.") from error
    if not isinstance(content, list) or not all(text is None or isinstance(text, str) for text in content):
        raise ValueError(f"{flag} {file} holds something other than a list of texts.")
    if not content:
        raise ValueError(f"{flag} {file} is empty.")
    return [text or "" for text in content]


def _remote_files(folder: Folder) -> tuple[str, dict[str, list[str]]]:
    """The builder and the URLs of the files of a folder on an object store, which `datasets` detects only on disks."""
    for ending, builder in _BUILDERS.items():
        if files := [folder.url(name) for name in folder.names() if name.endswith(ending)]:
            return builder, {"train": files}
    raise ValueError(f"no file ends with {' or '.join(_BUILDERS)}")


def find_shards(pattern: str) -> WebDatasetShards:
    """The tar files of a pattern, to read as a stream."""
    files = [file if is_url(file) else str(Path(file).expanduser()) for file in _expanded(pattern)]
    missing = [file for file in files if not is_url(file) and not Path(file).is_file()]
    if missing:
        raise ValueError(f"there is no shard {missing[0]}: check --train_shards_path_or_url.")
    return WebDatasetShards(tuple(files))


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
