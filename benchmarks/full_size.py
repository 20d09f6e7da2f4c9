"""Trains Stable Diffusion 1.5 at full size, from command line to pictures, and measures every phase of it.

    python3 benchmarks/full_size.py --work /tmp/full --method codi

The published architecture with random weights in float16, as the hub has it; 512 px, one sample, two steps with a
checkpoint after each. The run is killed with SIGKILL when the first checkpoint is on disk, and resumed. What it exports
draws a picture here, and one in diffusers if PyTorch is installed. Memory is the process's resident memory at its
peak within each phase; beside it is what the phase has to hold: the weights, or the step's inputs and temporaries.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from loading import random_model

from codi_jax import Model
from codi_jax.io.images import save_images
from codi_jax.training import loop, run, teacher
from codi_jax.training.checkpoint import Checkpoints, list_checkpoints

_HERE = Path(__file__).resolve().parent.parent
_SAMPLES = 2
_SCRIPTS = {
    "codi": ("train_codi_flax", "--task canny"),
    "bk-sdm": ("train_bk_sdm_flax", "--distill_level bk_small"),
}


@dataclass(frozen=True)
class Args:
    """Measures a run at full size."""

    work: Path
    """Folder for the model, the data and the run."""
    method: Literal["codi", "bk-sdm"] = "codi"
    """The method."""
    model: Path | None = None
    """Another model, for a trial. Default: SD 1.5 with random weights, in --work."""
    resolution: int = 512
    """Side of the pictures."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the computation."""
    child: Literal["train", "draw", "diffusers"] | None = None
    """Do one part; used by the benchmark itself."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    if args.child is not None:
        {"train": train, "draw": draw, "diffusers": draw_in_diffusers}[args.child](args)
        return
    prepare(args)
    killed = start("train", args)
    while killed.poll() is None and not list_checkpoints(output_of(args)):
        time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    print(f"killed: {killed.wait()}, checkpoints: {list_checkpoints(output_of(args))}", flush=True)
    for child in ("train", "draw", "diffusers"):
        if (status := start(child, args).wait()) != 0:
            sys.exit(f"{child} ended with {status}")
    print("| process | phase | seconds | peak, GB | it holds, GB | ratio |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for line in log_of(args).read_text().splitlines():
        found = json.loads(line)
        holds = found["holds"]
        shares = f"{holds / 1e9:.2f} | {found['peak'] / holds:.2f}" if holds else " | "
        print(
            f"| {found['process']} | {found['phase']} | {found['seconds']:.1f} | {found['peak'] / 1e9:.2f} | {shares} |"
        )


def start(child: str, args: Args) -> subprocess.Popen[bytes]:
    words = ["--work", args.work, "--method", args.method, "--resolution", args.resolution, "--child", child]
    words += ["--mixed_precision", args.mixed_precision, *(("--model", args.model) if args.model else ())]
    return subprocess.Popen([sys.executable, __file__, *map(str, words)], env=os.environ | {"PYTHONPATH": str(_HERE)})


def output_of(args: Args) -> Path:
    return args.work / f"run-{args.method}"


def log_of(args: Args) -> Path:
    return args.work / f"phases-{args.method}.jsonl"


def prepare(args: Args) -> None:
    """The model and the data, unless they are there."""
    log_of(args).unlink(missing_ok=True)
    model, data = args.work / "model", args.work / "data"
    if args.model is None and not model.is_dir():
        random_model("sd-1.5").save_pretrained(model, dtype="float16")
    if not data.is_dir():
        noise = np.random.default_rng(0).integers(0, 255, (_SAMPLES, 1, args.resolution, args.resolution, 3), np.uint8)
        for number, picture in enumerate(noise):
            save_images(data / f"{number}.png", picture)
        rows = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(_SAMPLES)]
        (data / "metadata.jsonl").write_text("\n".join(rows))


class Phases:
    """Writes what phases of this process take."""

    def __init__(self, args: Args, process: str) -> None:
        self._log, self._process = log_of(args), process
        self.before = _memory("VmRSS")
        self.holds = 0  # bytes, of what is known already

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which waits for its results and is measured."""

        @functools.wraps(function)
        def measured(*given: Any, **named: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            began = time.perf_counter()
            result = jax.block_until_ready(function(*given, **named))
            self.write(phase, time.perf_counter() - began)
            return result

        return measured

    def write(self, phase: str, seconds: float) -> None:
        found = {"process": self._process, "phase": phase, "seconds": seconds, "holds": self.holds}
        with self._log.open("a") as log:
            log.write(json.dumps({**found, "peak": _memory("VmHWM") - self.before}) + "\n")


def _memory(kind: str) -> int:
    """Resident memory of this process in bytes: ``VmRSS``, or ``VmHWM``, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def train(args: Args) -> None:
    """The run, with its phases measured."""
    is_first = not list_checkpoints(output_of(args))
    phases = Phases(args, "first" if is_first else "resumed")
    watch(phases)
    name, flags = _SCRIPTS[args.method]
    model = args.model or args.work / "model"
    words = (
        f"--pretrained_model_name_or_path {model} --train_data_dir {args.work / 'data'} --output_dir {output_of(args)} "
    )
    words += f"{flags} --resolution {args.resolution} --train_batch_size 1 --mixed_precision {args.mixed_precision} "
    words += "--max_train_steps 2 --checkpointing_steps 1 --logging_steps 1 --report_to none --validation_steps 0 "
    words += "--num_validation_images 1 --validation_sampling_steps 1 --resume_from_checkpoint latest --cache_latents "
    words += f"--cache_latents_dir {args.work / 'latents'} --dataloader_num_workers 0"
    script = importlib.import_module(f"training_scripts.{name}")
    script.main(tyro.cli(script.Args, args=words.split(), use_underscores=True))


def watch(phases: Phases) -> None:
    """Measures the functions that the phases of a run consist of."""
    load, compile_for, compiled, save = teacher._load, loop.compile_for, loop._compile, Checkpoints.save

    def load_network(model: Model, name: str, *others: Any) -> Any:
        return phases.timed(f"loading the {name}", load)(model, name, *others)

    def compile_step(*given: Any) -> Any:
        program = phases.timed("compiling", compile_for)(*given)
        found = program.memory_analysis()
        phases.holds = found.argument_size_in_bytes + found.temp_size_in_bytes
        return program

    def trace_and_compile(*given: Any) -> Any:
        began = time.perf_counter()
        program = compiled(*given)
        phases.write("tracing and compiling", time.perf_counter() - began)
        return phases.timed("step", program)

    def save_all(checkpoints: Checkpoints, *given: Any) -> None:
        def finished() -> None:
            save(checkpoints, *given)
            checkpoints.wait()

        phases.timed("checkpoint", finished)()

    teacher._load, loop.compile_for = load_network, compile_step
    loop._compile, Checkpoints.save = trace_and_compile, save_all
    loop._validate = phases.timed("validation images", loop._validate)
    run._finish = phases.timed("export", run._finish)


def draw(args: Args) -> None:
    """A picture of the result."""
    phases = Phases(args, "sampling")
    model = phases.timed("loading", lambda: Model.from_pretrained(output_of(args)))()
    phases.holds = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    condition = np.zeros((args.resolution, args.resolution, 3), np.uint8)
    given = {"control_image": condition} if model.networks.controlnet is not None else {}
    sides = {"height": args.resolution, "width": args.resolution}
    made = phases.timed("a picture of 2 steps", lambda: model("a fox", steps=2, **given, **sides))()
    save_images(args.work / f"{args.method}.png", made)


def draw_in_diffusers(args: Args) -> None:
    """The same in diffusers."""
    try:
        import diffusers
        import torch
        from PIL import Image
    except ImportError:
        print("PyTorch is not installed: diffusers draws nothing")
        return
    is_codi = args.method == "codi"
    kind = getattr(diffusers, "StableDiffusionControlNetPipeline" if is_codi else "StableDiffusionPipeline")
    no_checker = {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind.from_pretrained(output_of(args), torch_dtype=torch.float32, **no_checker)
    given: dict[str, Any] = {"height": args.resolution, "width": args.resolution}
    if is_codi:
        given["image"] = Image.new("RGB", (args.resolution, args.resolution))
    with torch.no_grad():
        made = pipe("a fox", num_inference_steps=2, **given).images[0]
    made.save(args.work / f"{args.method}-diffusers.png")


if __name__ == "__main__":
    main()
