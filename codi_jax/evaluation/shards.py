"""What is observed of generated images, kept in shards, so that an interrupted evaluation goes on where it was.

The shards of one model at one number of steps with one seed are a folder: ``00000.npz`` holds the observations, the
images that the report shows, and the seconds; ``00000.tar``, with ``--save_images``, all images and their texts.
Several processes share the work by shards, and the folder.
"""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from codi_jax.io.atomic import staged_file
from codi_jax.io.images import encode_image

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shards:
    """The shards of one run.

    Attributes:
      folder: where they are.
      count: images in all.
      size: images in a shard.
    """

    folder: Path
    count: int
    size: int

    def numbers(self, process: int = 0, processes: int = 1) -> list[range]:
        """The images of each shard that a process makes."""
        starts = range(0, self.count, self.size)
        return [range(start, min(start + self.size, self.count)) for start in starts][process::processes]

    def ensure(
        self, numbers: range, make: Callable[[], Arrays], skip: Callable[[int], None] = lambda count: None
    ) -> None:
        """Makes and keeps a shard's arrays, unless they are there; ``skip`` is told how many images were."""
        path = self._path(numbers)
        if _read(path) is not None:
            skip(len(numbers))
            return
        found = make()
        with staged_file(path) as stage, stage.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]

    def read(self) -> Arrays:
        """All arrays, one shard after the other.

        Raises:
          ValueError: if a shard is missing, which another process should have made.
        """
        shards = []
        for numbers in self.numbers():
            found = _read(self._path(numbers))
            if found is None:
                raise ValueError(f"there is no {self._path(numbers)}: do all processes share --output_dir?")
            shards.append(found)
        return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}

    def save_images(self, numbers: range, images: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str]) -> None:
        """Keeps the images of a shard."""
        with staged_file(self._path(numbers).with_suffix(".tar")) as stage, tarfile.open(stage, "w") as tar:
            for number, image, text in zip(numbers, images, texts, strict=True):
                for ending, data in (("png", encode_image(image)), ("txt", text.encode("utf-8", "replace"))):
                    entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    def _path(self, numbers: range) -> Path:
        return self.folder / f"{numbers.start // self.size:05d}.npz"


def shards_of(parent: Path, name: str, identity: Mapping[str, Any], count: int, size: int) -> Shards:
    """The shards of a run, in a folder of its own.

    Args:
      parent: the folder of all runs.
      name: the start of the folder's name.
      identity: everything that the images depend on; another identity is another folder.
      count: images in all.
      size: images in a shard.
    """
    digest = hashlib.sha256(json.dumps([dict(identity), count, size], sort_keys=True, default=str).encode())
    readable = "".join(letter if letter.isalnum() else "-" for letter in name)[:80]
    return Shards(parent / f"{readable}-{digest.hexdigest()[:12]}", count, size)


def files_of(where: str | None) -> list[tuple[str, int, int]]:
    """What identifies files without reading them: their names, sizes and dates; nothing for those on the hub."""
    path = Path(where or "").expanduser()
    if where is None or not path.exists():
        return [(where or "", 0, 0)]
    files = (
        [path]
        if path.is_file()
        else [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    )
    return [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in sorted(files)]


def _read(path: Path) -> Arrays | None:
    """The arrays of a file; ``None`` if it does not exist or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
