"""Counts the floating-point operations of a traced program: those of its products and convolutions.

They are counted before compilation, so that loops count as often as they run, and kernels that the compiler does not
look into count too. What is recomputed in the backward pass is counted as often as it is computed.
"""

import math
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval as pe

# Products of a fused attention, each of 2 b n t s h operations: scores and output; in the backward pass the scores once
# more, and the gradients of output weights, values, queries and keys.
_ATTENTION_PRODUCTS = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


def count_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Operations of one run, over all devices; a multiplication and an addition are two.

    Of alternatives (``lax.cond``) the most expensive counts; a ``while`` loop whose length is not known counts once.

    Args:
      program: a jaxpr, such as ``jax.jit(f).trace(x).jaxpr``.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as every compiler does
    return _of_equations(jaxpr)


def _of_equations(program: ClosedJaxpr | Jaxpr) -> int:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    inner = [_of_equations(program) for program in _programs(params)]
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if attention := next((count for kind, count in _ATTENTION_PRODUCTS.items() if name.startswith(kind)), 0):
        (b, t, n, h), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return attention * 2 * b * n * t * s * h
    if name == "cond":
        return max(inner, default=0)
    repeated = {
        "scan": lambda: params["length"],
        "pallas_call": lambda: math.prod(params["grid_mapping"].grid),
        "shard_map": lambda: params["mesh"].size,
    }
    return sum(inner) * (repeated[name]() if name in repeated else 1)


def _programs(params: dict[str, Any]) -> list[Any]:
    """The programs among an equation's parameters: bodies of loops, branches, functions that it calls."""
    found = []
    for name, value in params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk"):  # derivatives, which this program does not run
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                found.append(each)
    return found


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _of_convolution(equation: Any) -> int:
    """Without the products with padding and with the zeros between the elements of dilated operands."""
    params, (lhs, rhs), out = equation.params, [v.aval.shape for v in equation.invars], equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    _, _, *lhs_axes = numbers.lhs_spec
    out_features, in_features, *rhs_axes = numbers.rhs_spec
    batch, _, *out_axes = numbers.out_spec
    pairs = 1
    for i, (lhs_axis, rhs_axis, out_axis) in enumerate(zip(lhs_axes, rhs_axes, out_axes, strict=True)):
        pairs *= _overlaps(
            lhs[lhs_axis], rhs[rhs_axis], out[out_axis], params["window_strides"][i], params["padding"][i][0],
            params["lhs_dilation"][i], params["rhs_dilation"][i],
        )  # fmt: skip
    # Of a grouped convolution, rhs has the features of one group; gradients group the batch.
    return 2 * pairs * (out[batch] * rhs[out_features] * rhs[in_features])


def _overlaps(size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of an output's position and a kernel's element that meet an element of the input, along one axis."""
    positions = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - low
    inside = (positions >= 0) & (positions < (size - 1) * dilation + 1) & (positions % dilation == 0)
    return int(inside.sum())
