"""Targets: the devices that a plan is for, which need not be there. Their compilers are what matters."""

import importlib.util
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from codi_jax.planning.chips import GPUS, TPUS, Chip

NAMES = f"cpu, cpu:8, gpu, {', '.join(f'{name}, {name}:8' for name in GPUS)}, v5e:4x4, v5p:2x2x2, v6e:4x4"
"""Examples, for messages and help."""

# There is no device for autotuning kernels, and no need: their memory does not depend on it. Nor is code needed.
_GPU_FLAGS = (
    "--xla_gpu_autotune_level=0", "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_gpu_disable_gpuasm_optimizations=true",
)  # fmt: skip
# What the compiler needs to know about an absent GPU; those of Hopper differ in their memory.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_MOST_GPUS = 8  # of a node: beyond it the network is another one, of which nothing is known here


@dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      name: as the user writes it.
      chip: each of them.
      devices: the devices, for a mesh.
      reports: the folder where their compiler leaves its reports.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    reports: Path

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"gpu"`` or ``"tpu"``."""
        platform: str = self.devices[0].platform
        return "gpu" if platform == "cuda" else platform


def open_target(name: str, reports: Path) -> Target:
    """Opens a target. Call it before anything touches a device: compilers read their options once.

    Args:
      name: ``cpu`` or ``gpu``, what this machine has; ``h100``, ``h200``, one GPU or several (``h200:8``); a TPU slice
        (``v5e:4x4``). ``cpu:8`` are eight devices that share the CPU.
      reports: a folder for the reports of the target's compiler.

    Raises:
      ValueError: if there is no such target, or its compiler is not installed.
    """
    kind, _, size = name.partition(":")
    match kind:
        case "cpu" if not size or _is_count(size):
            return _this_cpu(name, int(size or 0), reports)
        case "gpu" if not size:
            return _local_gpus(name, reports)
        case _ if kind in GPUS and (not size or _is_count(size)):
            return _absent_gpus(name, kind, int(size or 1), reports)
        case _ if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", size):
            return _absent_tpus(name, kind, reports)
    raise ValueError(f"there is no target {name}: choose among {NAMES}, or another size of them.")


def _is_count(size: str) -> bool:
    return size.isdigit() and 1 <= int(size) <= 1024


def _this_cpu(name: str, count: int, reports: Path) -> Target:
    jax.config.update("jax_platforms", "cpu")
    if count:
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    return Target(name, _measured_cpu(len(devices)), devices, reports)


def _measured_cpu(devices: int) -> Chip:
    """This machine's CPU, whose peaks are measured: nobody publishes them for a machine that is shared."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    a, numbers = jnp.ones((1024, 1024)), jnp.ones(2**25)
    flops = 2 * 1024**3 / _seconds(jax.jit(jnp.matmul), a, a)
    bandwidth = 2 * numbers.nbytes / _seconds(jax.jit(lambda x: x + 1), numbers)
    share = 1 / devices
    return Chip("this CPU", int(memory * share), flops * share, flops * share, bandwidth * share, bandwidth * share)


def _seconds(program: Any, *arguments: Any) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _local_gpus(name: str, reports: Path) -> Target:
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        raise ValueError(
            f"there is no GPU here that JAX can use ({str(error).splitlines()[0]}): plan for {' or '.join(GPUS)}, "
            "which need not be there."
        ) from error
    stats = devices[0].memory_stats() or {}
    known = next((chip for kind, chip in GPUS.items() if kind in devices[0].device_kind.lower()), GPUS["h100"])
    memory = stats.get("bytes_limit", known.usable)
    chip = Chip(devices[0].device_kind, memory, known.flops, known.flops_float32, known.bandwidth, known.network)
    return Target(name, chip, devices, reports)


def _absent_gpus(name: str, kind: str, count: int, reports: Path) -> Target:
    if count > _MOST_GPUS:
        raise ValueError(f"there is no target {name}: a node has at most {_MOST_GPUS} of them.")
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        raise ValueError(f'{name} needs the compiler for NVIDIA, but no GPU: pip install "jax[cuda12]".')
    jax.config.update("jax_platforms", "cpu")  # for arrays
    _add_flags(*_GPU_FLAGS)
    chip = GPUS[kind]
    config = _HOPPER.format(memory=chip.memory, bandwidth=chip.bandwidth, name=chip.name)
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{count}")
    return Target(name, chip, topology.devices, reports)


def _absent_tpus(name: str, kind: str, reports: Path) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f'{name} needs the compiler for TPUs, but no TPU: pip install "jax[tpu]".')
    jax.config.update("jax_platforms", "cpu")  # for arrays
    _add_flags(f"--xla_dump_to={reports}", "--xla_dump_hlo_as_text")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise a server is asked which machine this is
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of several kinds, all of which mean the same
        raise ValueError(
            f"there is no target {name}: the compiler for TPUs knows no such slice ({str(error).splitlines()[0]}). "
            "Slices of v5e and v6e are 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16; of v4 and v5p 2x2x1, 2x2x2, 2x2x4, "
            "2x4x4, 4x4x4 and multiples of it."
        ) from error
    return Target(name, TPUS[kind], topology.devices, reports)


def _add_flags(*flags: str) -> None:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
