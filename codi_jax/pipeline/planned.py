"""Plans sampling: compiles the program that makes images, from shapes alone, for devices that need not exist."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codi_jax.models import sharding
from codi_jax.pipeline.generation import Program, generate, input_shardings
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.programs import Programs
from codi_jax.planning.plan import Plan
from codi_jax.planning.programs import bytes_on_device, compile_for_target, with_shardings
from codi_jax.planning.targets import Target


def plan_sampling(model: Model, call: Mapping[str, Any], target: Target, title: str) -> Plan:
    """The plan of one call of a model.

    Args:
      model: the model, without its weights.
      call: the call's arguments. Its prompts are shared among the devices if they divide them; else one device is used.
      target: the devices.
      title: what is planned, in words.

    Raises:
      ValueError: as the call would.
    """
    recorder = _Recorder()
    abstract = {name: network.abstract_params(network.dtype) for name, network in model.networks.by_name().items()}
    model.replace(params=abstract, programs=recorder)(**call)
    program, (params, schedule, guidance, inputs) = recorder.recorded
    count = len(inputs["z"])
    devices = target.devices if count % len(target.devices) == 0 else target.devices[:1]
    mesh = sharding.make_mesh(devices=devices)
    params, schedule, guidance = (
        with_shardings(tree, sharding.shardings(mesh, tree)) for tree in (params, schedule, guidance)
    )
    inputs = with_shardings(inputs, input_shardings(mesh, inputs))
    with jax.set_mesh(mesh):
        traced = jax.jit(generate, static_argnames="program").trace(params, schedule, guidance, inputs, program=program)
    kinds = {name: bytes_on_device(tree) for name, tree in params.items()} | {"inputs": bytes_on_device(inputs)}
    return Plan(
        title=title,
        target=target.name,
        chip=target.chip,
        devices=mesh.size,
        batch=count // mesh.size,
        samples=count,
        kinds=kinds,
        program=compile_for_target(traced, sum(kinds.values()), target),
        is_half=jnp.dtype(model.networks.unet.dtype).itemsize == 2,
    )


class _Recorder(Programs):
    """In place of compiled programs: keeps what it is to run, and runs nothing."""

    recorded: tuple[Program, tuple[Any, ...]]

    def run(self, program: Program, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        self.recorded = program, arguments
        count = len(arguments[-1]["z"])
        return np.zeros((count, 1, 1, 3), np.uint8), np.ones(count, bool)
