"""Data: sources to batches. Start reading at `codi_jax.data.load`.

The names below are imported on first use, so that importing one module of this package, such as `codi_jax.data.files`,
does not import `datasets` and `grain`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codi_jax.data.latent_encoding import Encoders
    from codi_jax.data.load import ConditionOf, DataFlags, PromptFlags, load_data, open_data
    from codi_jax.data.loader import Loader, Tokenize
    from codi_jax.data.sources import Source

__all__ = [
    "ConditionOf",
    "DataFlags",
    "Encoders",
    "Loader",
    "PromptFlags",
    "Source",
    "Tokenize",
    "load_data",
    "open_data",
]

_MODULES = {"Encoders": "latent_encoding", "Loader": "loader", "Tokenize": "loader", "Source": "sources"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'load')}"), name)
