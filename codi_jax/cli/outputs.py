"""Where results go: what cannot be written is refused before the work, not after it."""

import errno
import os
import tempfile
from pathlib import Path


def obstacle(folder: Path) -> str | None:
    """What keeps a folder from being written to, or made with its parents; ``None`` if nothing does.

    It is tried out, since permissions do not tell of a file system that is read-only. No trace of that is left.
    """
    if file_in_place_of(folder) is not None:
        return os.strerror(errno.EEXIST)
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def file_in_place_of(folder: Path) -> Path | None:
    """The file that stands where a folder, or one of its parents, would have to be."""
    nearest = _nearest(folder)
    return None if nearest.is_dir() else nearest


def _nearest(path: Path) -> Path:
    """The path itself if it is there, else the nearest parent that is."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.exists() or each.is_symlink())
