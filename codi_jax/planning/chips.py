"""Chips, by what their makers publish: memory, and the peaks that a program cannot exceed."""

from dataclasses import dataclass

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: its name.
      memory: bytes of its memory.
      flops: floating-point operations per second in products of bfloat16, dense.
      flops_float32: the same for float32 at JAX's default precision: one bfloat16 pass on TPUs, TF32 on NVIDIA's.
      bandwidth: bytes per second between chip and memory.
      network: bytes per second from this chip to the others of its slice or node.
      reserved: bytes of its memory that programs do not get.
    """

    name: str
    memory: int
    flops: float | int
    flops_float32: float | int
    bandwidth: float | int
    network: float | int
    reserved: int = 0

    @property
    def usable(self) -> int:
        """Bytes for programs."""
        return self.memory - self.reserved


def _tpu(name: str, memory: int, tflops: float | int, bandwidth: float | int, network: float | int) -> Chip:
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm. Of each, the compiler keeps 0.25 GiB for itself.
    return Chip(name, memory, tflops * TERA, tflops * TERA, bandwidth * GB, network * GB, 2**28)


def _hopper(name: str, memory: int, bandwidth: float | int) -> Chip:
    # The data sheets of H100 SXM and H200 SXM, without sparsity; NVLink in one direction. JAX leaves a tenth of the
    # memory to libraries that allocate by themselves (XLA_PYTHON_CLIENT_MEM_FRACTION=0.90 is what one would set).
    return Chip(name, memory, 989 * TERA, 494.5 * TERA, bandwidth * GB, 450 * GB, memory // 10)


TPUS = {
    "v4": _tpu("TPU v4", 32 * 2**30, 275, 1228, 300),
    "v5e": _tpu("TPU v5e", 16 * 2**30, 197, 819, 200),
    "v5p": _tpu("TPU v5p", 95 * 2**30, 459, 2765, 600),
    "v6e": _tpu("TPU v6e", 32 * 2**30, 918, 1640, 448),
}
"""By the names that their compiler takes."""

GPUS = {
    "h100": _hopper("NVIDIA H100", 84_929_347_584, 3352.32),
    "h200": _hopper("NVIDIA H200", 150_754_820_096, 4800),
}
