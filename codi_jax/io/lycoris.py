"""Adapters that are not plain LoRA, as the difference that they make to a weight (LyCORIS; Yeh et al., 2023).

All arrays have PyTorch's layout: [out, in], or [out, in, h, w] for convolutions.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

Array = Float[np.ndarray, "..."]

TENSORS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_mid", "diff",
)  # fmt: skip
"""The tensors of a layer that make it another kind than plain LoRA."""


def weight_difference(tensors: Mapping[str, Array], shape: tuple[int, ...], alpha: float | None) -> Array:
    """The difference that a layer's tensors make, float32.

    Args:
      tensors: the layer's tensors by name: LoHa (``hada_…``), LoKr (``lokr_…``), LoCon with a Tucker decomposition
        (``lora_mid``, with ``down`` and ``up``), or the difference itself (``diff``).
      shape: of the weight.
      alpha: α; ``None`` for the rank.

    Raises:
      ValueError: if tensors are missing, or do not fit each other or the weight.
      KeyError: naming a missing tensor.
    """
    t = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    if "diff" in t:
        return t["diff"].reshape(shape)
    if "lora_mid" in t:
        difference = _tucker(t["lora_mid"], _matrix(t["up"]), _matrix(t["down"]).T)
        rank = t["down"].shape[0]
    elif "hada_w1_a" in t:
        first, second = (_hadamard_factor(t, number) for number in (1, 2))
        difference, rank = first * second, t["hada_w1_b"].shape[0]
    else:
        difference, rank = _kronecker(t)
    if difference.size != math.prod(shape):
        raise ValueError(f"it makes a difference {list(difference.shape)} to a weight {list(shape)}")
    # Without a low-rank factor α has no meaning.
    return difference.reshape(shape) * np.float32(1 if alpha is None or rank is None else alpha / rank)


def _hadamard_factor(t: Mapping[str, Array], number: int) -> Array:
    """One of the two low-rank matrices whose product, element by element, is LoHa's difference (equation 3)."""
    return _low_rank(t[f"hada_w{number}_a"], t[f"hada_w{number}_b"], t.get(f"hada_t{number}"))


def _kronecker(t: Mapping[str, Array]) -> tuple[Array, int | None]:
    """LoKr's difference, a Kronecker product (equation 4), and the rank of its factors, if they have one."""
    rank = None
    if (first := t.get("lokr_w1")) is None:
        first, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w1_b"].shape[0]
    if (second := t.get("lokr_w2")) is None:
        rank = t["lokr_w2_b"].shape[0]
        second = _low_rank(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
    if second.ndim == 4:
        first = first[..., None, None]
    return np.kron(first, second), rank


def _low_rank(a: Array, b: Array, core: Array | None) -> Array:
    """[out, r] @ [r, in], or of convolutions with a core, whose factors are [r, out] and [r, in]."""
    return a @ b if core is None else _tucker(core, a.T, b.T)


def _tucker(core: Array, up: Array, down: Array) -> Array:
    """[out, r], [r, r, h, w] and [in, r] as a convolution."""
    return np.einsum("op,pqkl,iq->oikl", up, core, down)


def _matrix(tensor: Array) -> Array:
    """Without its 1 × 1 window."""
    return tensor.reshape(tensor.shape[:2])
