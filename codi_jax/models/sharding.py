"""The devices as a mesh, and the placement of arrays on it.

The mesh has two axes: ``"data"`` and ``"fsdp"``. Every device gets its own share of the batch. Parameters, and
everything with their shapes, are replicated along ``"data"`` and split along ``"fsdp"``; with ``--fsdp 1`` that is
plain data parallelism.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# A smaller array costs more to gather than it saves: 256 KiB in float32.
MIN_SHARDED_SIZE = 2**16


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices as a mesh with axes ``("data", "fsdp")``, the latter of size ``fsdp``.

    Args:
      fsdp: the size of the axis that parameters are split along.
      devices: the devices. Default: those of all hosts.

    Raises:
      ValueError: if ``fsdp`` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(f"--fsdp {fsdp} does not divide the {count} devices there are: choose from {divisors}.")
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


def partition_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Where an array of this shape is split: the rule for parameters, their averages and the optimizer's moments.

    Along the largest axis that ``fsdp`` divides, the last one if there are several; not at all if there is none or the
    array is small.
    """
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not divisible:
        return P()
    axis = max(divisible, key=lambda axis: (shape[axis], axis))
    return P(*[None] * axis, "fsdp")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The tree with a `NamedSharding` instead of each array, abstract or not, by the rule of `partition_spec`."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition_spec(np.shape(leaf), fsdp)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that replicates an array on all devices."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays are on; ``None`` for arrays on a single device each."""
    of_first = getattr(next(iter(jax.tree.leaves(tree)), None), "sharding", None)
    mesh = of_first.mesh if isinstance(of_first, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def along(mesh: Mesh, axis: int | None) -> NamedSharding:
    """One axis split over all devices; ``None`` replicates."""
    return replicated(mesh) if axis is None else NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


def context_of(tree: Any) -> AbstractContextManager[Any]:
    """The context for tracing programs that compute with these arrays.

    It tells kernels that XLA cannot split which devices there are, see `codi_jax.models.kernels.attention`.
    """
    mesh = mesh_of(tree)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_global(mesh: Mesh, local_batch: Any) -> Any:
    """Puts this process's share of a batch, a tree of NumPy arrays, on its devices, as a part of the global batch.

    Raises:
      ValueError: if the examples cannot be divided evenly among the devices.
    """
    sharding = batch_sharding(mesh)
    local_devices = len(sharding.addressable_devices)

    def put(local: np.ndarray) -> jax.Array:
        if local.shape[0] % local_devices:
            raise ValueError(
                f"A batch of {local.shape[0]} cannot be shared out among {local_devices} devices: it has to be "
                "--train_batch_size (per device) times --gradient_accumulation_steps times the devices."
            )
        return jax.make_array_from_process_local_data(sharding, local)

    return jax.tree.map(put, local_batch)


def put(mesh: Mesh, tree: Any) -> Any:
    """Places a tree by the rule; arrays already in place stay. Every process passes the same arrays."""
    return jax.tree.map(_put, tree, shardings(mesh, tree))


def place(mesh: Mesh) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """For `codi_jax.io.weights.load_model`: places each parameter by the rule, directly."""
    return lambda _, array: put(mesh, array)


def place_here() -> Callable[[tuple[str, ...], np.ndarray], jax.Array] | None:
    """`place` on all devices of this process, for sampling; ``None`` if there is only one."""
    return place(make_mesh(devices=jax.local_devices())) if jax.local_device_count() > 1 else None


def fetch(tree: Any) -> Any:
    """The tree as NumPy arrays; if arrays are split among several processes, all of them must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return jax.device_put(leaf, sharding)
    # From here on the devices belong to several processes, and the array is this process's own.
    if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
