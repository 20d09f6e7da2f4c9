"""What a program that is traced knows of the devices it is for: those of the mesh in whose context it is traced.

The context is that of `jax.set_mesh`, see `codi_jax.models.sharding.context_of`.
"""

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def backend() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``.

    That of the mesh, so that a program for other devices than this machine's can be compiled ahead of time; without
    one, the default backend.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def mesh() -> AbstractMesh | None:
    """The mesh, if it has several devices."""
    found = jax.sharding.get_abstract_mesh()
    return None if found.empty or found.size == 1 else found


def gathered(weight: Array) -> Array:
    """All of a weight, on each device, where parameters are split among several (``--fsdp``).

    To be called where the weight is used and in the precision in which it is: that is what travels. Left to itself the
    compiler would leave weights where they are and gather activations, those of the whole batch on every device.
    """
    return weight if mesh() is None else jax.lax.with_sharding_constraint(weight, P())
