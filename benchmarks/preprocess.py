"""Compares the data tool with a simple pipeline of Pillow and PNG, in images per second, and measures its memory.

    python3 benchmarks/preprocess.py
    python3 benchmarks/preprocess.py --memory --count 50000 --side 64 --resolution 64

Both make pairs of a 512-pixel image and its edges from the same local JPEGs of 1024 pixels, in the same number of
processes that they start themselves, and alternate. The simple one opens, resizes (Lanczos) and saves both as PNG with
Pillow's defaults, like a script written in an hour. The tool does everything that it does for users, with shards,
records and the meta.jsonl. --memory tracks the memory of its processes over a long run instead.
"""

import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from PIL import Image

from codi_jax.cli import command_line

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts are side by side, and in no package
from dataset_tools import coyo_1m_dataset_preprocess as coyo

DRAWN = 100


@dataclass(frozen=True)
class Args:
    """Measures dataset_tools/coyo_1m_dataset_preprocess.py."""

    count: int = 400
    """Number of images."""
    side: int = 1024
    """Their side in pixels."""
    resolution: int = 512
    """Side of the pairs in pixels."""
    num_proc: int = 2
    """Number of processes of each."""
    runs: int = 5
    """Number of turns of each."""
    image_format: str = "jpeg"
    """The tool's image format; conditions are png. The simple pipeline writes png."""
    memory: bool = False
    """Measure memory over one run instead of speed."""


def draw(number: int, side: int) -> np.ndarray:
    """Smooth colors, shapes and a little noise: about as much detail as photographs have."""
    rng = np.random.default_rng(number)
    picture = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    for _ in range(60):
        center, color = rng.integers(0, side, 2).tolist(), rng.integers(0, 256, 3).tolist()
        cv2.circle(picture, center, int(rng.integers(2, max(3, side // 10))), color, -1, cv2.LINE_AA)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def make_images(folder: Path, args: Args) -> None:
    """Writes the JPEGs; beyond the first hundred they are links to those."""
    folder.mkdir()
    drawn = min(args.count, DRAWN)
    for number in range(drawn):
        options = [cv2.IMWRITE_JPEG_QUALITY, 90]
        cv2.imwrite(str(folder / f"{number:06}.jpg"), draw(number, args.side), options)
    for number in range(drawn, args.count):
        (folder / f"{number:06}.jpg").hardlink_to(folder / f"{number % drawn:06}.jpg")


def straight_one(job: tuple[Path, Path, int]) -> None:
    """One image of the simple pipeline."""
    source, target, side = job
    image = Image.open(source).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(image), 100, 200)
    image.save(target / "images" / f"{source.stem}.png")
    Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2)).save(target / "processed_images" / f"{source.stem}.png")


class Clock:
    """Seconds since its creation, wall time and CPU time of all cores."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def seconds(self) -> np.ndarray:
        """Both."""
        return np.subtract(self._now(), self._start)


def straight(source: Path, target: Path, args: Args) -> np.ndarray:
    """Seconds of the simple pipeline."""
    for name in ("images", "processed_images"):
        (target / name).mkdir(parents=True)
    jobs = [(file, target, args.resolution) for file in sorted(source.iterdir())]
    clock = Clock()
    with ProcessPoolExecutor(args.num_proc) as pool:
        list(pool.map(straight_one, jobs, chunksize=8))
    return clock.seconds()


def tool_flags(source: Path, target: Path, args: Args) -> dict[str, Any]:
    """The tool's flags."""
    size = max(10, min(1000, args.count // args.num_proc // 4))
    flags = {"num_proc": args.num_proc, "resolution": args.resolution, "shard_size": size}
    return {**flags, "image_format": args.image_format, "input": str(source), "train_data_dir": str(target)}


def tool(source: Path, target: Path, args: Args) -> np.ndarray:
    """Seconds of the tool."""
    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()):
        coyo.main(coyo.Args(**tool_flags(source, target, args)))
    return clock.seconds()


def speed(folder: Path, args: Args) -> None:
    """Prints images per second of both, and their ratio."""
    turns = []
    for turn in range(args.runs):
        theirs = straight(folder / "in", folder / f"straight{turn}", args)
        turns.append((theirs, tool(folder / "in", folder / f"tool{turn}", args)))
    seconds = np.array(turns)  # [turn, which, wall or CPU]
    for kind, unit in enumerate(("second", "second of a core")):
        for name, rates in zip(("straight", "codi_jax"), args.count / seconds[:, :, kind].T, strict=True):
            print(f"{name}: {np.median(rates):.1f} images a {unit} ({rates.min():.1f} to {rates.max():.1f})")
        ratios = seconds[:, 0, kind] / seconds[:, 1, kind]
        print(f"ratio: {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")


def memory(folder: Path, args: Args) -> None:
    """Prints the memory of the program and its processes, with shared pages divided among them (PSS)."""
    target = folder / "out"
    flags = [f"--{name}={value}" for name, value in tool_flags(folder / "in", target, args).items()]
    process = psutil.Popen([sys.executable, coyo.__file__, *flags], stdout=subprocess.DEVNULL)
    shown = 0
    while process.poll() is None:
        time.sleep(1)
        done = len(list((target / ".unfinished").glob("*/record.json")))
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes = [each.memory_full_info().pss / 1e6 for each in (process, *process.children(recursive=True))]
            if done >= shown:
                print(f"{done} shards: {sizes[0]:.0f} + {sum(sizes[1:]):.0f} = {sum(sizes):.0f} MB", flush=True)
                shown = done + 5


def main(args: Args) -> None:
    cv2.setNumThreads(1)  # in all processes, which share the cores
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_images(folder / "in", args)
        (memory if args.memory else speed)(folder, args)


if __name__ == "__main__":
    command_line.run(Args, main)
