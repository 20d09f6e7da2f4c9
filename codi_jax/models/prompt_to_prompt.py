"""Prompt-to-prompt: images of two prompts that share attention, and so their layout (Hertz et al., 2022).

A variant uses its source's attention map, softmax(q kᵀ/√h), with its own values. With the source's q and k, any
attention kernel computes this.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool

Layers = Literal["self", "cross"]
"""Where attention is shared: among pixels, as in the data of Brooks et al. (2023), or over the words, as Hertz et al.
swap words of prompts whose other words are in the same places."""

_NAMES: Mapping[Layers, str] = {"self": "attn1", "cross": "attn2"}


def shared_attention(shares: Bool[Array, "n"], branches: int, layers: Layers = "self") -> AbstractContextManager[Any]:
    """A context where networks are applied to n sources followed by n variants, in each of several branches.

    Args:
      shares: whether each variant uses its source's attention.
      branches: the number of branches of guidance, stacked along the batch: [branches · 2 · n, …].
      layers: the layers that share attention.
    """

    def intercept(compute: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = compute(*args, **kwargs)
        path = context.module.path
        if context.method_name != "__call__" or len(path) < 2:
            return out
        if path[-2] != _NAMES[layers] or path[-1] not in ("to_q", "to_k"):
            return out
        parts = out.reshape(branches, 2, len(shares), *out.shape[1:])
        source, variant = parts[:, 0], parts[:, 1]
        variant = jnp.where(shares[None, :, None, None], source, variant)
        return jnp.stack([source, variant], axis=1).reshape(out.shape)

    return nn.intercept_methods(intercept)
