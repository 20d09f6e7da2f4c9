"""The data that models are compared on, read when it is needed: images with captions, edits, or captions alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import UInt8

from codi_jax.data.avatars.vocabulary import Look
from codi_jax.data.columns import Columns, captions_of
from codi_jax.data.images import UnreadableImageError, crop, place, read_image
from codi_jax.data.sources import open_source
from codi_jax.data.table_files import METADATA_FILES, load_prompts
from codi_jax.io.images import open_image
from codi_jax.io.json_files import parse_lines, parse_object, read_object

_EDIT_COLUMNS = ("input_image", "edited_image", "edit_prompt")
_CAPTION_COLUMNS = ("original_prompt", "edited_prompt")
_CAPTION_FILES = (".txt", ".parquet", ".json")


@dataclass(frozen=True)
class Samples:
    """The models' inputs and the wanted outputs; every present field has one entry per image.

    Attributes:
      prompts: captions, or edit instructions.
      truth: the real images, or the images after the edit; ``None`` if there are only captions.
      conditions: the ControlNets' conditions.
      inputs: the images before the edit.
      variants: for each edit, all images that could have been made from its input, including the input.
      wanted: the index of the right one among them.
      looks: the attributes that each image should show, if the data names them.
      captions: for each edit, captions of the images before and after, if the data has them.
    """

    prompts: list[str]
    truth: UInt8[np.ndarray, "n h w 3"] | None = None
    conditions: UInt8[np.ndarray, "n h w 3"] | None = None
    inputs: UInt8[np.ndarray, "n h w 3"] | None = None
    variants: list[UInt8[np.ndarray, "_v h w 3"]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    captions: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Data:
    """Samples by their numbers.

    Attributes:
      name: the data's name, for messages.
      count: how many there are.
      read: reads the samples with these numbers; raises `ValueError` if the images differ in size.
    """

    name: str
    count: int
    read: Callable[[Sequence[int]], Samples]

    def evenly_spread(self, most: int | None) -> "Data":
        """At most this many of the samples."""
        if most is None or most >= self.count:
            return self
        numbers = np.linspace(0, self.count - 1, most).round().astype(int).tolist()
        return Data(self.name, most, lambda chosen: self.read([numbers[i] for i in chosen]))


def open_samples(where: str, resolution: int | None = None) -> Data:
    """Opens the data to compare models on.

    Args:
      where: a folder with ``metadata.jsonl`` or ``meta.jsonl``, with captions, edges or edits; any other images with
        captions that training accepts, as a folder or an id on the hub; or a file of captions: lines of text, parquet
        with a column ``text``, or the JSON of COCO's captions.
      resolution: images are resized and center-cropped to squares of this side. Default: as they are.

    Raises:
      ValueError: if it does not exist, or a column is missing.
    """
    path = Path(where).expanduser()
    if path.suffix in _CAPTION_FILES and path.is_file():
        return _captions_alone(path)
    if path.is_dir() and (table := next((path / name for name in METADATA_FILES if (path / name).is_file()), None)):
        data = _listed(table, resolution)
    elif path.is_dir() or (where.count("/") == 1 and not where.startswith((".", "/", "~"))):
        data = _of_training(where, path.is_dir(), resolution)
    else:
        raise ValueError(f"there is no data {where}: check --data, or draw some with dataset_tools/avatars.py.")
    if data.count < 2:
        raise ValueError(f"{where} has {data.count} pictures: metrics need at least two.")
    return data


# ---- Captions alone


def _captions_alone(path: Path) -> Data:
    if path.suffix == ".json":
        captions = _coco_captions(path)
    else:
        rows = load_prompts(path, Columns(None, "text"), "--data")
        if "text" not in rows.column_names:
            raise ValueError(f"{path} has no column 'text', only {', '.join(rows.column_names)}.")
        captions = [captions_of(cell)[0] for cell in rows["text"]]
    if len(captions) < 2:
        raise ValueError(f"{path} has {len(captions)} captions: metrics need at least two.")
    return Data(str(path), len(captions), lambda numbers: Samples([captions[i] for i in numbers]))


def _coco_captions(path: Path) -> list[str]:
    """The first caption of each image, in the order of the images' first captions."""
    annotations = read_object(path, "give the captions of COCO").get("annotations")
    first: dict[Any, str] = {}
    try:
        for annotation in annotations:  # type: ignore[union-attr]
            first.setdefault(annotation["image_id"], str(annotation["caption"]).strip())
    except (TypeError, KeyError):
        raise ValueError(f"{path} is not a file of COCO's captions: it has no annotations with captions.") from None
    return [*first.values()]


# ---- Folders with a table of the images


def _listed(table: Path, resolution: int | None) -> Data:
    rows = _read_rows(table)
    has_edits = "edited_image" in rows[0]
    image = "image" if "image" in rows[0] else "file_name"
    _require_columns(table, rows, _EDIT_COLUMNS if has_edits else (image, "text"))
    looks = _looks(table, rows, "edited_attributes" if has_edits else "attributes")
    stack = _Stack(str(table.parent), resolution)

    def images(names: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        """Images by name, each file read once."""
        files = {name: open_image(table.parent / name) for name in names}
        return stack([files[name] for name in names])

    def read(numbers: Sequence[int]) -> Samples:
        chosen = [rows[i] for i in numbers]
        samples = _edits(chosen, images) if has_edits else _captioned(chosen, image, images)
        return replace(samples, looks=[looks[i] for i in numbers] if looks else [])

    return Data(str(table.parent), len(rows), read)


def _captioned(rows: Sequence[Mapping[str, Any]], image: str, images: Callable[[Sequence[str]], Any]) -> Samples:
    captions = [captions_of(row["text"])[0] for row in rows]
    edges = images([row["conditioning_image"] for row in rows]) if "conditioning_image" in rows[0] else None
    return Samples(captions, images([row[image] for row in rows]), edges)


def _edits(rows: Sequence[Mapping[str, Any]], images: Callable[[Sequence[str]], Any]) -> Samples:
    samples = Samples(
        [row["edit_prompt"] for row in rows],
        images([row["edited_image"] for row in rows]),
        inputs=images([row["input_image"] for row in rows]),
    )
    if all(column in row for row in rows for column in _CAPTION_COLUMNS):
        samples = replace(samples, captions=[tuple(row[column] for column in _CAPTION_COLUMNS) for row in rows])
    if all("variants" in row for row in rows):
        wanted = [row["variants"].index(row["edited_image"]) for row in rows]
        samples = replace(samples, variants=[images(row["variants"]) for row in rows], wanted=wanted)
    return samples


def _read_rows(table: Path) -> list[dict[str, Any]]:
    lines = table.read_bytes().split(b"\n")
    rows = [row for _, row in parse_lines(lines, str(table), "write one object a line")]
    if len(rows) < 2:
        raise ValueError(f"{table} names {len(rows)} pictures: metrics need at least two.")
    return rows


def _require_columns(table: Path, rows: Sequence[Mapping[str, Any]], needed: Sequence[str]) -> None:
    for row in rows:
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{table} has a line without {absent[0]}.")


def _looks(table: Path, rows: Sequence[Mapping[str, Any]], column: str) -> list[Look]:
    if any(column not in row for row in rows):
        return []
    return [parse_object(row[column], f"the {column} in {table}", "draw the avatars again") for row in rows]


# ---- Whatever training reads


def _of_training(where: str, is_folder: bool, resolution: int | None) -> Data:
    source = open_source(
        dataset_name=None if is_folder else where,
        train_data_dir=where if is_folder else None,
        condition_column="conditioning_image",
        condition_is_optional=True,
    )
    if not isinstance(source.rows, Dataset):
        raise ValueError(f"{where} is a stream, whose samples have no numbers: save some to a folder first.")
    stack = _Stack(where, resolution)

    def images(rows: Sequence[Mapping[str, Any]], column: str) -> UInt8[np.ndarray, "n h w 3"]:
        try:
            return stack([read_image(row[column], source.access) for row in rows])
        except UnreadableImageError as error:
            raise ValueError(f"{where}: {error}") from error

    def read(numbers: Sequence[int]) -> Samples:
        columns, rows = source.columns, [source.row(i) for i in numbers]
        captions = [captions_of(row[columns.caption or ""])[0] for row in rows]
        conditions = images(rows, columns.condition) if columns.condition else None
        return Samples(captions, images(rows, columns.image or ""), conditions)

    return Data(where, len(source), read)


class _Stack:
    """Images as one array: squares of a side, or as they are if all have the size of the first.

    Args:
      where: the data, for messages.
      resolution: the squares' side; ``None`` leaves the images as they are.
    """

    def __init__(self, where: str, resolution: int | None) -> None:
        self._where, self._resolution = where, resolution
        self._size: tuple[int, int] | None = None

    def __call__(self, images: Sequence[Any]) -> UInt8[np.ndarray, "n h w 3"]:
        if self._resolution is not None:
            placed = [(each, place((each.height, each.width), self._resolution, center_crop=True)) for each in images]
            return np.stack([crop(*each) for each in placed])
        self._size = self._size or images[0].size
        if any(each.size != self._size for each in images):
            raise ValueError(f"the pictures of {self._where} differ in size: give --resolution.")
        return np.stack([np.asarray(each) for each in images])
