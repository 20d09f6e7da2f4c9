"""Data: sources to batches. Start reading at `codi_jax.data.load`."""

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
