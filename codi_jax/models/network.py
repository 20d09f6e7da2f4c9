"""What the networks of a model have in common: a configuration, and parameters whose shapes follow from it."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from codi_jax.models.config import Params


class Network(nn.Module):
    """A network that is saved on its own, with its ``config.json`` and its weights.

    Attributes:
      config: the ``config.json``.
    """

    config: Any

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters to train from nothing, float32."""
        raise NotImplementedError

    def abstract_params(self, dtype: DTypeLike | None = None) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s, without memory or computation.

        Args:
          dtype: their dtype. Default: that of `random_params`.
        """
        key: Any = self  # hashable, though the type of Linen's modules does not say so
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), _traced_shapes(key))


@functools.lru_cache(maxsize=64)
def _traced_shapes(network: Any) -> Params:
    """Traced once for each network: that takes seconds for large ones, and many ask."""
    return jax.eval_shape(network.random_params, jax.random.key(0))
