"""The images that models are compared on: a folder with ``metadata.jsonl`` or, from the data tools, ``meta.jsonl``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from codi_jax.data.avatars.vocabulary import Look
from codi_jax.data.table_files import METADATA_FILES
from codi_jax.io.images import open_image
from codi_jax.io.json_files import parse_lines, parse_object

_EDIT_COLUMNS = ("input_image", "edited_image", "edit_prompt")


@dataclass(frozen=True)
class Samples:
    """The models' inputs and the wanted outputs; every present field has one entry per image.

    Attributes:
      prompts: captions, or edit instructions.
      truth: the real images, or the images after the edit.
      conditions: the ControlNets' conditions.
      inputs: the images before the edit.
      variants: for each edit, all images that could have been made from its input, including the input.
      wanted: the index of the right one among them.
      looks: the attributes that each image should show, if the data names them.
    """

    prompts: list[str]
    truth: UInt8[np.ndarray, "n h w 3"]
    conditions: UInt8[np.ndarray, "n h w 3"] | None = None
    inputs: UInt8[np.ndarray, "n h w 3"] | None = None
    variants: list[UInt8[np.ndarray, "_v h w 3"]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


def read_samples(folder: Path, most: int | None = None) -> Samples:
    """Reads a folder: captions with or without edges, or edits.

    Args:
      folder: the images' folder.
      most: use at most this many samples, evenly spread over the folder. Default: all.

    Raises:
      ValueError: if there is no such file, a column is missing, or the images differ in size.
      FileNotFoundError: if an image is missing.
    """
    path, rows = _read_rows(folder)
    if most is not None and most < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]
    has_edits = "edited_image" in rows[0]
    image = "image" if "image" in rows[0] else "file_name"
    _require_columns(path, rows, _EDIT_COLUMNS if has_edits else (image, "text"))
    samples = _edits(folder, rows) if has_edits else _captioned(folder, rows, image)
    return replace(samples, looks=_looks(path, rows, "edited_attributes" if has_edits else "attributes"))


def _require_columns(path: Path, rows: Sequence[Mapping[str, Any]], needed: Sequence[str]) -> None:
    for row in rows:
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{path} has a line without {absent[0]}.")


def _looks(path: Path, rows: Sequence[Mapping[str, Any]], column: str) -> list[Look]:
    if any(column not in row for row in rows):
        return []
    return [parse_object(row[column], f"the {column} in {path}", "draw the avatars again") for row in rows]


def _captioned(folder: Path, rows: Sequence[Mapping[str, Any]], image: str) -> Samples:
    captions = [text if isinstance(text := row["text"], str) else text[0] for row in rows]
    read = _reader(folder)
    edges = read([row["conditioning_image"] for row in rows]) if "conditioning_image" in rows[0] else None
    return Samples(captions, read([row[image] for row in rows]), edges)


def _edits(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Samples:
    read = _reader(folder)
    prompts, truth = [row["edit_prompt"] for row in rows], read([row["edited_image"] for row in rows])
    inputs = read([row["input_image"] for row in rows])
    if "variants" not in rows[0]:
        return Samples(prompts, truth, inputs=inputs)
    variants = [read(row["variants"]) for row in rows]
    wanted = [row["variants"].index(row["edited_image"]) for row in rows]
    return Samples(prompts, truth, inputs=inputs, variants=variants, wanted=wanted)


def _reader(folder: Path) -> Callable[[Sequence[str]], UInt8[np.ndarray, "n h w 3"]]:
    """Reads images by name, each file once."""
    files: dict[str, np.ndarray] = {}

    def read(names: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        for name in names:
            if name not in files:
                files[name] = np.asarray(open_image(folder / name))
        if len({files[name].shape for name in names}) > 1:
            raise ValueError(f"the pictures of {folder} differ in size: scale them first.")
        return np.stack([files[name] for name in names])

    return read


def _read_rows(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    path = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"--data {folder} has neither {' nor '.join(METADATA_FILES)}: draw the data with dataset_tools/avatars.py."
        )
    lines = path.read_bytes().split(b"\n")
    rows = [row for _, row in parse_lines(lines, str(path), "write one object a line")]
    if len(rows) < 2:
        raise ValueError(f"{path} names {len(rows)} pictures: metrics need at least two.")
    return path, rows
