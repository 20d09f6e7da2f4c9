"""Folders of pictures without a table: captions are next to them, in .txt files with the same names."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from codi_jax.data.files import Folder

TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".arrow", ".tar")
"""Extensions of files that list samples: a folder with such a file is read from that list."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def images_in(folder: Folder) -> Iterator[str]:
    """The paths of all images in a folder, relative to it."""
    root = folder.locate().rstrip("/")
    for path in folder.fs.find(root):
        if PurePosixPath(path).suffix.lower() in PICTURES:
            yield path[len(root) + 1 :]


def captions_in(folder: Folder) -> dict[str, str | None]:
    """The path of each picture, sorted, and its caption, or ``None`` if it has none.

    The result is empty if the folder does not exist, holds a table, or has no captions.
    """
    if not folder.is_dir() or any(PurePosixPath(name).suffix in TABLES for name in folder.names()):
        return {}
    paths = sorted(images_in(folder))
    root = folder.locate().rstrip("/")
    texts = {path[len(root) + 1 :] for path in folder.fs.find(root) if path.endswith(".txt")}
    captions = {path: caption_path(path) for path in paths}
    if not texts & set(captions.values()):
        return {}
    return {path: caption_text(folder.read(name)) if name in texts else None for path, name in captions.items()}


def caption_path(path: str) -> str:
    """The path of a picture's caption."""
    return str(PurePosixPath(path).with_suffix(".txt"))


def caption_text(content: bytes) -> str:
    """The text of a caption file, on one line; invalid UTF-8 becomes U+FFFD."""
    return " ".join(content.decode("utf-8-sig", "replace").replace("\0", " ").split())
