"""Prompt-to-prompt: pictures of two prompts that share attention, and so their layout (Hertz et al., 2022).

A variant takes where its source looks, softmax(q kᵀ/√h), and applies it to values of its own. With q and k taken over,
that is what any attention kernel computes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool

Layers = Literal["self", "cross"]
"""Where attention is shared: among pixels, as Brooks et al. (2023) made their data, or over the words, as Hertz et al.
swap words of prompts whose other words stand in the same places."""

_NAMES: Mapping[Layers, str] = {"self": "attn1", "cross": "attn2"}


def shared_attention(shares: Bool[Array, "n"], branches: int, layers: Layers = "self") -> AbstractContextManager[Any]:
    """A context in which networks are applied to n sources and, behind them, n variants, in each of some branches.

    Args:
      shares: whether each variant takes its source's attention.
      branches: of guidance, stacked along the batch: [branches · 2 · n, …].
      layers: which.
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
