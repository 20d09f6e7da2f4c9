"""A complete model: its networks, what they are conditioned on, and the program that generates images."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("DiffusionPipeline", "Model"):  # the former is its name in earlier versions
        from codi_jax.pipeline.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
