"""Measures what the training loop adds to the compiled step: batches, logs, and the calls themselves.

    python3 benchmarks/loop.py --pretrained_model_name_or_path MODEL --train_data_dir data/avatars/train

Trains CoDi with cached latents. Between stretches of the loop, where a run validates, the same program is called as
often with one batch that is already on the device: both are timed alternately, in one process.
"""

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import jax

from codi_jax.cli import command_line
from codi_jax.methods import codi
from codi_jax.models import sharding
from codi_jax.pipeline.conditions import Frozen
from codi_jax.training import loop, optim, starting
from codi_jax.training.batches import load_batches, open_training_data
from codi_jax.training.flags import ConditionFlags, TrainingFlags
from codi_jax.training.teacher import load_teacher, loader_of, open_teacher


@dataclass(frozen=True, kw_only=True)
class Args(ConditionFlags, TrainingFlags):
    """Times the loop around the training step of CoDi. The flags of training apply."""

    resolution: int = 64
    """Side of the square images."""
    train_batch_size: int = 32
    """Examples per step and device."""
    cache_latents: bool = True
    """Encode all images and captions once, before training, and keep the results on disk."""
    stretch: int = 20
    """Steps per stretch."""
    stretches: int = 8
    """Stretches of each kind, after an uncounted one."""


class Turns:
    """Times the program alone between stretches of the loop.

    Attributes:
      in_loop: seconds per step in the loop.
      alone: seconds per step of the program alone.
    """

    def __init__(self, program: Any, frozen: Any, batch: Any, steps: int) -> None:
        self.in_loop: list[float] = []
        self.alone: list[float] = []
        self._call = lambda state: program(state, frozen, batch)[0]
        self._steps = steps
        self._began = time.perf_counter()

    def __call__(self, state: Any, _: int) -> dict[str, Any]:
        jax.block_until_ready(state)
        self.in_loop.append((time.perf_counter() - self._began) / self._steps)
        state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))  # the call takes it
        began = time.perf_counter()
        for _ in range(self._steps):
            state = self._call(state)
        jax.block_until_ready(state)
        self._began = time.perf_counter()
        self.alone.append((self._began - began) / self._steps)
        return {}


class TimedLoader:
    """A loader that records how long its batches take."""

    def __init__(self, loader: Any) -> None:
        self.seconds: list[float] = []
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self._loader)
        self.seconds.append(time.perf_counter() - began)
        return batch


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        steps = args.stretch * (args.stretches + 1)
        args = dataclasses.replace(
            args, output_dir=folder, max_train_steps=steps, validation_steps=args.stretch, checkpointing_steps=0
        )
        turns, loader = measure(starting.start(args))
    report(turns, loader)


def measure(args: Args) -> tuple[Turns, TimedLoader]:
    mesh, flags = sharding.make_mesh(args.fsdp), codi.CodiFlags()
    source = open_training_data(args)
    teacher = load_teacher(open_teacher(args), args, mesh)
    loader = load_batches(args, teacher, source)
    setup = codi.METHOD.configure(teacher.networks, flags, remat=args.gradient_checkpointing)
    optimizer = optim.make_optimizer(args, args.max_train_steps or 1)
    state = codi.METHOD.init(setup, loader_of(teacher, mesh), optimizer, jax.random.key(args.seed))
    state = sharding.put(mesh, state)
    params = {name: teacher.params[name] for name in setup.frozen}
    frozen = sharding.put(mesh, Frozen(params, codi.METHOD.sampling(teacher.schedule, flags)))
    step = codi.METHOD.step(setup, optimizer)
    batch = sharding.to_global(mesh, next(loader))
    with sharding.context_of(state):
        lowered = loop.jit_step(step, state, mesh).lower(state, frozen, batch)
    turns = Turns(loop.compile_for(jax.default_backend(), lowered), frozen, batch, args.stretch)
    timed: Any = TimedLoader(loader)
    loop.train(step, state, frozen, timed, args, mesh=mesh, validate=turns)
    return turns, timed


def report(turns: Turns, loader: TimedLoader) -> None:
    in_loop, alone = turns.in_loop[1:], turns.alone[1:]
    shares = sorted(a / b - 1 for a, b in zip(in_loop, alone, strict=True))
    print(f"a step in the loop  {1e3 * statistics.median(in_loop):7.1f} ms")
    print(f"the program alone   {1e3 * statistics.median(alone):7.1f} ms")
    print(f"overhead            {statistics.median(shares):7.1%} ({shares[0]:.1%} to {shares[-1]:.1%})")
    waits = [1e3 * seconds for seconds in loader.seconds]
    print(f"waiting for a batch {statistics.median(waits):7.2f} ms, at most {max(waits):.2f}")


if __name__ == "__main__":
    command_line.run(Args, main)
