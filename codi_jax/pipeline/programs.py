"""Compiled programs: kept between calls, timed, and told which step they are at."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from codi_jax.cli.progress import heartbeat
from codi_jax.models import sharding
from codi_jax.pipeline.generation import Program, generate

_jitted_generate = jax.jit(generate, static_argnames="program")


class Programs:
    """Compiled programs, kept between calls, and the timing of the last call.

    Models that differ only in their parameters share them.

    Attributes:
      compile_seconds: compile time of the last call; 0 if the program was already compiled.
      seconds: run time of the last call, without compilation.
      reporter: what a program that reports its steps calls.
    """

    def __init__(self) -> None:
        self.compile_seconds = self.seconds = 0.0
        self._compiled: dict[Any, Any] = {}
        self.reporter = _StepReporter()

    def run(self, program: Program, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        """Runs `codi_jax.pipeline.generation.generate`, compiled once per kind of input."""
        leaves, tree = jax.tree.flatten(arguments)
        key = (program, tree, *map(jax.typeof, leaves))
        start = time.perf_counter()
        if key not in self._compiled:
            with sharding.context_of(arguments), heartbeat("compiling the sampler"):
                self._compiled[key] = _jitted_generate.lower(*arguments, program).compile()
        compiled = time.perf_counter()
        images, finite = sharding.fetch(self._compiled[key](*arguments))
        jax.effects_barrier()
        self.compile_seconds, self.seconds = compiled - start, time.perf_counter() - compiled
        return images, finite


class _StepReporter:
    """Reports steps to the caller. JAX keeps it with the compiled program, so it must not hold the pipeline."""

    listener: Callable[[int], Any] | None = None

    def __call__(self, step: Any) -> None:
        if self.listener is not None:
            self.listener(int(step))
