"""Output folders: unwritable ones are rejected before the work, not after it."""

import errno
import os
import tempfile
from pathlib import Path


def obstacle(folder: Path) -> str | None:
    """What prevents writing to a folder, or creating it with its parents; ``None`` if nothing does.

    A temporary file is written to find out, because permissions do not reveal a read-only file system.
    """
    if file_in_place_of(folder) is not None:
        return os.strerror(errno.EEXIST)
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def file_in_place_of(folder: Path) -> Path | None:
    """The file at the path of a folder or of one of its parents, if there is one."""
    nearest = _nearest(folder)
    return None if nearest.is_dir() else nearest


def _nearest(path: Path) -> Path:
    """The path itself if it exists, otherwise its nearest existing parent."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.exists() or each.is_symlink())
