"""The kind of device that a program is traced for."""

import jax


def backend() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``.

    That of the mesh in whose context (`jax.set_mesh`) the program is traced, so that one for other devices than this
    machine's can be compiled ahead of time; without one, the default backend.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform
