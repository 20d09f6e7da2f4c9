"""Measures what the start of a training run takes, from the command to the end of its first step, cold and warm.

    python3 benchmarks/warm_start.py --command "training_scripts/train_lcm_flax.py
        --pretrained_teacher_model assets/avatars --train_data_dir data/avatars/train --resolution 64"

Cold is a run without compiled programs in its cache, warm one that finds those of the run before.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags

ROOT = Path(__file__).resolve().parent.parent

# In the run's process: when its imports are done, and every duration that JAX reports.
RUN = """
import json, runpy, sys, time
from pathlib import Path
import jax.monitoring
file, sys.argv = Path(sys.argv[1]), sys.argv[2:]
events = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: events.append((name, seconds, time.time()))
)
from codi_jax.training import loop
train = loop.train
def timed(*args, **kwargs):
    events.append(("loaded", 0, time.time()))
    return train(*args, **kwargs)
loop.train = timed
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    file.write_text(json.dumps(events))
"""
TRACED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
COMPILED = "/jax/core/compile/backend_compile_duration"  # or read from the cache


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    """Times the start of a training run, without compiled programs and with them."""

    command: str
    """The run: a script and its flags, without those about its length and its output."""
    repeats: int = 3
    """Warm runs."""


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(args.command, Path(folder), index) for index in range(args.repeats + 1)]
    print(f"{'seconds':<32}{'cold':>8}{'warm':>8}")
    for name in runs[0]:
        print(f"{name:<32}{runs[0][name]:8.1f}{statistics.median(run[name] for run in runs[1:]):8.1f}")


def measure(command: str, folder: Path, index: int) -> dict[str, float]:
    """Seconds from the command on: when model and data are loaded, what the step takes to be had, and its first run."""
    flags = [
        "--max_train_steps", "1", "--logging_steps", "1", "--checkpointing_steps", "0", "--validation_steps", "0",
        "--num_validation_images", "1", "--report_to", "none", "--ccache", str(folder / "programs"),
        "--output_dir", str(folder / f"run-{index}"),
    ]  # fmt: skip
    events = folder / f"events-{index}.json"
    words = [sys.executable, "-c", RUN, str(events), *shlex.split(command), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.time()
    with subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr or ():
            said.append((line, time.time() - began))
    if process.returncode:
        sys.exit("".join(line for line, _ in said))
    compiled = next(at for line, at in said if line.startswith("compiled the step"))
    stepped = next(at for line, at in said if line.startswith("step 1/1"))
    durations = json.loads(events.read_text())
    loaded = next(at for name, _, at in durations if name == "loaded") - began
    # Programs within programs are traced, too: of the parts, the longest is the step's.
    ofs = [max(seconds for name, seconds, at in durations if name == kind and at - began > loaded) for kind in TRACED]
    read = max(seconds for name, seconds, at in durations if name == COMPILED and at - began > loaded)
    return {
        "model and data are loaded": loaded,
        "the step is traced": ofs[0],
        "the step is lowered": ofs[1],
        "the step is compiled or read": read,
        "the program is there": compiled,
        "the first step has ended": stepped,
    }


if __name__ == "__main__":
    command_line.run(Args, main)
