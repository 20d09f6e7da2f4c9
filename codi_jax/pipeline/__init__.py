"""A whole model: its networks together, what they are conditioned on, and the program that makes images."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("DiffusionPipeline", "Model"):  # the former is the name that earlier versions had for it
        from codi_jax.pipeline.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
