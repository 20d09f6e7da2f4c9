"""Reports of a run: metrics and images to TensorBoard, Weights & Biases and files; profiles; lines for the user."""

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from codi_jax.cli.flags import Flags, Operational, Topic
from codi_jax.io.atomic import write_text

METRICS_NAME = "metrics.jsonl"
_WARM_UP = 3  # steps before a profile starts


@dataclass(frozen=True)
class TrackingFlags(Flags):
    """Flags about what a run reports, and where."""

    topic: ClassVar[Topic] = Topic.LOGS

    logging_dir: Operational[str] = "logs"
    """Folder for TensorBoard's files, in --output_dir."""
    logging_steps: Operational[int] = 100
    """Steps between reports of the metrics."""
    report_to: Operational[Literal["tensorboard", "wandb", "none"]] = "tensorboard"
    """Where metrics and images go, besides metrics.jsonl and validation/ in --output_dir."""
    tracker_project_name: Operational[str] = "codi_jax"
    """Project on Weights & Biases."""
    wandb_entity: Operational[str | None] = None
    """User or team on Weights & Biases."""
    profile_steps: Operational[int] = 0
    """Number of steps to profile, after the first few; TensorBoard's profile plugin shows the result."""
    profile_validation: Operational[bool] = False
    """Profile the first validation."""
    profile_memory: Operational[bool] = False
    """Write memory profiles before and after training, memory_initial.prof and memory_final.prof, for pprof."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "logging_steps")
        self.require_at_least(0, "profile_steps")
        if self.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("--report_to wandb needs the package wandb: pip install wandb, or report to tensorboard.")


class _Backend(Protocol):
    def scalars(self, values: Mapping[str, float | int], step: int) -> None: ...

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "h w 3"]], step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes a run's metrics and images, in the first process only.

    Args:
      flags: the flags that say where to.
      output_dir: the run's folder.
      config: the run's arguments, for Weights & Biases.
      step: the step at which the run starts; entries of an earlier run for later steps are removed.
    """

    def __init__(self, flags: TrackingFlags, output_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self._backends: list[_Backend] = []
        if jax.process_index() != 0:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._backends.append(_Files(output_dir, step))
        if flags.report_to == "tensorboard":
            self._backends.append(_TensorBoard(output_dir / flags.logging_dir, step))
        elif flags.report_to == "wandb":
            self._backends.append(_Wandb(flags, output_dir, config))

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        """Writes metrics by name."""
        for backend in self._backends:
            backend.scalars(values, step)

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "h w 3"]], step: int) -> None:
        """Writes images by name."""
        for backend in self._backends:
            backend.pictures(values, step)

    def close(self) -> None:
        """Writes everything that has not been written yet."""
        for backend in self._backends:
            backend.close()


class Profiler:
    """Profiles what the flags ask for.

    Args:
      flags: what to profile.
      output_dir: the run's folder.
      first: the number of steps done when the run started.
      pause: lets the steps in flight finish.
    """

    def __init__(
        self,
        flags: TrackingFlags,
        output_dir: Path,
        first: int,
        pause: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._flags, self._output_dir, self._pause = flags, output_dir, pause
        self._start = first + 1 + _WARM_UP if flags.profile_steps else 0
        self._end = self._start + flags.profile_steps
        self._is_running = False
        self._validated = False

    def before(self, step: int) -> None:
        """Starts or ends the profile of steps if due."""
        if step == self._end:
            self.close()
        if step == self._start:
            with self._pause():
                jax.profiler.start_trace(self._folder)
            self._is_running = True

    def close(self) -> None:
        """Writes the profile of steps if one is running."""
        if self._is_running:
            self._is_running = False
            with self._pause():
                jax.profiler.stop_trace()
            log(f"wrote a profile to {self._folder}")

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """Profiles the first validation if requested."""
        asked, self._validated = self._flags.profile_validation and not self._validated, True
        # There can be only one profile at a time.
        with jax.profiler.trace(self._folder) if asked and not self._is_running else contextlib.nullcontext():
            yield

    def memory(self, when: str) -> None:
        """Writes a profile of the devices' memory if requested."""
        if self._flags.profile_memory and jax.process_index() == 0:
            jax.profiler.save_device_memory_profile(str(self._output_dir / f"memory_{when}.prof"))

    @property
    def _folder(self) -> str:
        return str(self._output_dir / self._flags.logging_dir)


def log(message: str) -> None:
    """Prints a line for the user on stderr, above the progress bar, in the first process."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


class _Files:
    """metrics.jsonl, one line per report, and validation/<name>-<step>.png."""

    def __init__(self, output_dir: Path, step: int) -> None:
        self._folder = output_dir / "validation"
        path = output_dir / METRICS_NAME
        kept = [line for line in _lines(path) if _step_of(line) <= step] if step else []
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        # JSON has no NaN.
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "h w 3"]], step: int) -> None:
        self._folder.mkdir(exist_ok=True)
        for name, picture in values.items():
            Image.fromarray(picture).save(self._folder / f"{name.replace('/', '_')}-{step}.png")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        # Not at the top: it imports protobuf, which is slow.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None, flush_secs=30)

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "h w 3"]], step: int) -> None:
        for name, picture in values.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, flags: TrackingFlags, output_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        # The id is the folder's, so that a resumed run continues the same curves.
        self._run = wandb.init(
            project=flags.tracker_project_name,
            entity=flags.wandb_entity,
            config=dict(config),
            dir=str(output_dir),
            id=output_dir.name,
            resume="allow",
        )

    def scalars(self, values: Mapping[str, float | int], step: int) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "h w 3"]], step: int) -> None:
        self._run.log({name: self._wandb.Image(picture) for name, picture in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _lines(path: Path) -> list[str]:
    """The lines that a previous run has written."""
    if not path.exists():
        return []
    return [line + "\n" for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity if the line is damaged, as the last one may be if the run was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
