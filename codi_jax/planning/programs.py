"""Compiles a program for a target, and reads what its compiler reports."""

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from codi_jax.cli.progress import heartbeat
from codi_jax.planning.flops import count_flops
from codi_jax.planning.hlo import Census, census, parse
from codi_jax.planning.targets import Target

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A program that was compiled, or laid out, but never run.

    Attributes:
      given: bytes per device of its inputs.
      needed: bytes per device in all: inputs, results and temporaries.
      flops: operations of its products and convolutions, over all devices.
      bytes_accessed: bytes that its instructions read and write, as XLA counts them, per device; ``None`` if the
        compiler was not waited for.
      census: what is in it; ``None`` if it does not fit the device, so that it was not made.
      seconds: the time until the compiler's report.
      is_whole: whether code was generated too.
    """

    given: int
    needed: int
    flops: int
    bytes_accessed: float | int | None
    census: Census | None
    seconds: float | int
    is_whole: bool

    @property
    def temporary(self) -> int:
        """Bytes per device beyond the inputs."""
        return self.needed - self.given


def compile_for_target(
    traced: Any, given: int, target: Target, compile_lowered: Callable[[Any], Any] = lambda lowered: lowered.compile()
) -> Program:
    """Compiles a program, as far as it is needed to know what it takes.

    For a TPU that is the moment when memory is laid out: generating code may take hours more.

    Args:
      traced: ``jax.jit(f).trace(…)`` of shapes with shardings on the target's devices.
      given: bytes per device of these.
      target: the target.
      compile_lowered: compiles what `traced` is lowered to.

    Raises:
      jax.errors.JaxRuntimeError: if the compiler fails in another way than for lack of memory.
    """
    began = time.perf_counter()
    flops = count_flops(traced.jaxpr)
    lowered = traced.lower()

    def made(needed: int, text: str | None, compiled: Any = None) -> Program:
        found = census(parse(text), len(target.devices)) if text is not None else None
        accessed = None if compiled is None else (compiled.cost_analysis() or {}).get("bytes accessed")
        seconds = time.perf_counter() - began
        return Program(given, needed, flops, accessed, found, seconds, is_whole=compiled is not None)

    try:
        with heartbeat(f"compiling for {target.name}"):
            if target.platform != "tpu":
                compiled = compile_lowered(lowered)
            else:
                compilation = ThreadPoolExecutor(1).submit(compile_lowered, lowered)
                report = _laid_out(compilation, target.reports)
                if report is not None:
                    return made(*report)
                compiled = compilation.result()
    except jax.errors.JaxRuntimeError as error:
        return made(_refused(error, given), None)
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Not the compiler's count of arguments, among which those that the program does not read are missing.
    return made(given + memory.temp_size_in_bytes + results, compiled.as_text(), compiled)


def bytes_on_device(tree: Any) -> int:
    """Bytes per device of arrays, or of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * _itemsize(leaf.dtype)
    return total


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Arrays, or their shapes, as shapes with these shardings."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _itemsize(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8  # of the default implementation
    return dtype.itemsize


def _laid_out(compilation: Any, reports: Path) -> tuple[int, str] | None:
    """Bytes and text of a program for TPUs as soon as its memory is laid out; ``None`` once it is compiled."""
    before = set(reports.glob("*"))
    while not wait([compilation], timeout=1).done:
        # The last report that is written before code is generated. The CPU's programs have others.
        for path in set(reports.glob("*.after_optimizations-memory-usage-report.txt")) - before:
            if "cpu_after_optimizations" in path.name:
                continue
            name = path.name.removesuffix("-memory-usage-report.txt")
            layout = path.with_name(f"{name}-buffer-assignment.txt").read_text()
            # Allocations in other memories have a color.
            sizes = re.findall(r"^allocation \d+: size (\d+), (?!color)", layout, re.MULTILINE)
            return sum(map(int, sizes)), path.with_name(f"{name}.txt").read_text()
    return None


def _refused(error: Exception, given: int) -> int:
    """The bytes that a program would need, from its compiler's refusal.

    Args:
      error: the refusal, of the program as a whole or of its temporaries alone.
      given: bytes of the program's inputs.
    """
    used = re.search(r"[Uu]sed (?P<size>[\d.]+)(?P<unit>[KMGT]?) of", str(error))
    temporary = re.search(r"required for HLO temporaries \((?P<size>[\d.]+)(?P<unit>[KMGT]?)\)", str(error))
    found = used or temporary
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    return round(float(found["size"]) * _UNITS[found["unit"]]) + (0 if used else given)
