"""Checks that replicas are equal: a device that computes wrongly, without saying so, would spoil a run unnoticed.

With data parallelism every device has a copy of the state, which its own arithmetic has updated. Each device computes a
checksum of its copy, and the checksums are compared: a few bytes per device, however large the state is.
"""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from codi_jax.models import sharding

_MIX = np.uint32(2654435761)  # Knuth's multiplicative hash: the place of a number counts, not only its value


class ReplicaError(ValueError):
    """Devices hold different copies of what should be equal."""


def check_replicas(mesh: Mesh, state: Any, step: int) -> None:
    """Compares the devices' copies of a state; every process must call it.

    Args:
      mesh: the mesh that the state is on.
      state: a tree of arrays on the mesh.
      step: the number of steps done, for the message.

    Raises:
      ReplicaError: naming the devices that differ from most of the others.
    """
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    numbers = [jax.random.key_data(each) if _is_key(each) else each for each in leaves]
    specs = tuple(_spec(each) for each in numbers)
    sums = np.asarray(sharding.fetch(_program(mesh, specs)(*numbers)))
    wrong = differing(sums)
    if wrong:
        devices = ", ".join(
            f"{device} of process {device.process_index}" for device in mesh.devices[tuple(zip(*wrong))]
        )
        raise ReplicaError(
            f"after step {step} the state on {devices} differs from its copies on the other devices: resume from the "
            "last checkpoint without this machine, whose arithmetic or memory cannot be trusted."
        )


def differing(sums: UInt32[np.ndarray, "data fsdp"]) -> list[tuple[int, int]]:
    """Where checksums differ from those of most devices with the same part of the state; all if there is no majority.

    Args:
      sums: the devices' checksums: copies along the first axis, parts along the second.
    """
    found = []
    for part in range(sums.shape[1]):
        column = sums[:, part].tolist()
        (common, times), *_ = Counter(column).most_common(1)
        if times < len(column):
            has_majority = times > len(column) / 2
            found += [(copy, part) for copy, value in enumerate(column) if value != common or not has_majority]
    return found


@functools.lru_cache(maxsize=8)
def _program(mesh: Mesh, specs: tuple[P, ...]) -> Any:
    def of_device(*parts: Array) -> UInt32[Array, "1 1"]:
        return sum((_checksum(part, index) for index, part in enumerate(parts)), jnp.uint32(0)).reshape(1, 1)

    local = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P("data", "fsdp"), check_vma=False)
    return jax.jit(local)


def _checksum(part: Array, index: int) -> UInt32[Array, ""]:
    """The sum of an array's bits, each number multiplied by a factor for its place, modulo 2^32."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    raw = part.astype(jnp.uint8) if part.dtype == bool else jax.lax.bitcast_convert_type(part, bits)
    flat = raw.reshape(-1).astype(jnp.uint32)
    factors = (jnp.arange(flat.size, dtype=jnp.uint32) + np.uint32(index + 1)) * _MIX | np.uint32(1)
    return (flat * factors).sum(dtype=jnp.uint32)


def _spec(array: jax.Array) -> P:
    return array.sharding.spec if isinstance(array.sharding, NamedSharding) else P()


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
