"""Distillation of Stable Diffusion models into few-step students, in JAX and Flax.

The names below are the public interface; they are imported on first use. Everything else in the modules is private by
convention and may change.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codi_jax.diffusion.guidance import Guidance
    from codi_jax.diffusion.samplers import sample
    from codi_jax.diffusion.sampling_spec import SamplingSpec
    from codi_jax.diffusion.schedule import NoiseSchedule, distillation_grid
    from codi_jax.diffusion.timesteps import timesteps_for
    from codi_jax.io.lora_files import load_lora, save_lora
    from codi_jax.io.weights import load_model, save_model
    from codi_jax.methods.baking import bake_guidance
    from codi_jax.models.lora import init_lora, merge_lora
    from codi_jax.pipeline.conditions import Conditions, Frozen
    from codi_jax.pipeline.model import Model
    from codi_jax.pipeline.networks import Networks
    from codi_jax.pipeline.prediction import predict
    from codi_jax.training.method import Export, Method, Setup
    from codi_jax.training.run import Hooks, run

__version__ = "0.1.0"

# Only tokenizers are used of transformers, whose warning at its import that there is no PyTorch is of no concern.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

_EXPORTS = {
    "codi_jax.pipeline.model": ("Model",),
    "codi_jax.pipeline.networks": ("Networks",),
    "codi_jax.pipeline.conditions": ("Conditions", "Frozen"),
    "codi_jax.pipeline.prediction": ("predict",),
    "codi_jax.diffusion.schedule": ("NoiseSchedule", "distillation_grid"),
    "codi_jax.diffusion.sampling_spec": ("SamplingSpec",),
    "codi_jax.diffusion.guidance": ("Guidance",),
    "codi_jax.diffusion.samplers": ("sample",),
    "codi_jax.diffusion.timesteps": ("timesteps_for",),
    "codi_jax.training.method": ("Export", "Method", "Setup"),
    "codi_jax.training.run": ("Hooks", "run"),
    "codi_jax.io.weights": ("load_model", "save_model"),
    "codi_jax.io.lora_files": ("load_lora", "save_lora"),
    "codi_jax.models.lora": ("init_lora", "merge_lora"),
    "codi_jax.methods.baking": ("bake_guidance",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Conditions", "Export", "Frozen", "Guidance", "Hooks", "Method", "Model", "Networks", "NoiseSchedule",
    "SamplingSpec", "Setup", "bake_guidance", "distillation_grid", "init_lora", "load_lora", "load_model", "merge_lora",
    "predict", "run", "sample", "save_lora", "save_model", "timesteps_for",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _MovedModule(types.ModuleType):
    """A module under its name in earlier versions."""

    def __init__(self, name: str, present: str) -> None:
        super().__init__(name, f"`{present}`, under the name that it had in earlier versions.")
        self.__dict__["_present"] = present

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks these up on any module
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__dict__["_present"]), name)


sys.modules.setdefault("codi_jax.weights", _MovedModule("codi_jax.weights", "codi_jax.io.weights"))
