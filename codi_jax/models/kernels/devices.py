"""The devices that a program is traced for: those of the mesh in whose context it is traced.

The context is from `jax.set_mesh`, see `codi_jax.models.sharding.context_of`.
"""

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def backend() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``.

    The mesh's backend, so that a program for another machine's devices can be compiled ahead of time; without a mesh,
    the default backend.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def mesh() -> AbstractMesh | None:
    """The mesh, if it has several devices."""
    found = jax.sharding.get_abstract_mesh()
    return None if found.empty or found.size == 1 else found


def gathered(weight: Array) -> Array:
    """Gathers a weight on each device, if parameters are split among several (``--fsdp``).

    Call it where the weight is used and in the precision in which it is used: this is what gets transferred. Otherwise
    the compiler would leave weights where they are and gather activations, those of the entire batch on every device.
    """
    return weight if mesh() is None else jax.lax.with_sharding_constraint(weight, P())
