"""Data: sources to batches. Start reading at `codi_jax.data.load`."""

from codi_jax.data.latent_cache import Encoders
from codi_jax.data.load import ConditionOf, DataFlags, load_data
from codi_jax.data.loader import Loader, Tokenize

__all__ = ["ConditionOf", "DataFlags", "Encoders", "Loader", "Tokenize", "load_data"]
