"""Linear maps whose transpose is handwritten too.

A derivative is a linear map from tangents to tangents; its transpose takes cotangents back. JAX derives the second from
the first, and on a CPU the result is sometimes much slower than handwritten code. `jax.custom_vjp` takes a handwritten
transpose, but gives up forward mode (`jax.jvp`, `jax.linearize`). A `jax.custom_jvp` whose tangents come from
`linear_map` has both. `jax.custom_derivatives.linear_call` is similar, but can neither be mapped (`jax.vmap`) nor
differentiated again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Arrays = tuple[Array, ...]


def linear_map(
    fun: Callable[..., Arrays], transpose: Callable[..., Arrays], residuals: Arrays, x: Arrays, *static: Any
) -> Arrays:
    """``fun(residuals, x, *static)``, transposed by ``transpose`` in reverse mode.

    Args:
      fun: a function that is linear in ``x``, made of operations that JAX can differentiate: derivatives with respect
        to ``residuals``, which only second derivatives need, come from ``fun`` in both directions. Like ``transpose``,
        it must be a module-level function, so that equal calls are recognized as equal.
      transpose: ``transpose(residuals, y, *static)`` is the transpose of ``fun`` applied to ``y``: it has the shapes
        and dtypes of ``x``. It may use any operation.
      residuals: the arrays that the map depends on.
      x: the argument that it is applied to.
      *static: hashable arguments of both functions.

    Returns:
      The result of ``fun``.
    """
    return tuple(_linear_map.bind(*residuals, *x, call=_Call(fun, transpose, static, len(residuals))))


@dataclasses.dataclass(frozen=True)
class _Call:
    """The map, or its transpose, of arrays; the first ``num_residuals`` are the residuals."""

    fun: Callable[..., Arrays]
    transpose: Callable[..., Arrays]
    static: tuple[Any, ...]
    num_residuals: int
    is_transposed: bool = False

    def __call__(self, *arrays: Array) -> Arrays:
        residuals, x = self.split(arrays)
        return (self.transpose if self.is_transposed else self.fun)(residuals, x, *self.static)

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The residuals, and the map's argument."""
        return tuple(values[: self.num_residuals]), tuple(values[self.num_residuals :])

    def transposed(self) -> "_Call":
        return dataclasses.replace(self, is_transposed=not self.is_transposed)

    def derived(self, residuals: Arrays, x: Arrays) -> Arrays:
        """The same map, in either direction, as JAX derives it from ``fun``."""
        if not self.is_transposed:
            return self.fun(residuals, x, *self.static)
        shapes = jax.eval_shape(self, *residuals, *x)
        return jax.linear_transpose(lambda *y: self.fun(residuals, y, *self.static), *shapes)(x)


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A function of `linear_map` over one more axis, the first one of everything except residuals without it."""

    function: Callable[..., Arrays]
    axes: tuple[int | None, ...]

    def __call__(self, residuals: Arrays, x: Arrays, *static: Any) -> Arrays:
        return jax.vmap(lambda r, y: self.function(r, y, *static), in_axes=(self.axes, 0))(residuals, x)


def _shapes(*avals: Any, call: _Call) -> list[Any]:
    return [jax.core.ShapedArray(out.shape, out.dtype) for out in jax.eval_shape(call, *avals)]


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, call: _Call) -> tuple[list[Array], list[Any]]:
    """The JVP of ``f(r)·x``: ``f(r)·dx + (df(r)/dr · dr)·x``."""
    out = _linear_map.bind(*primals, call=call)
    (residuals, x), (dresiduals, dx) = call.split(primals), call.split(tangents)
    parts = []
    if any(type(t) is not ad.Zero for t in dx):
        parts.append(_linear_map.bind(*residuals, *map(ad.instantiate_zeros, dx), call=call))
    if moving := {i: t for i, t in enumerate(dresiduals) if type(t) is not ad.Zero}:
        parts.append(_by_residuals(call, residuals, x, moving))
    if not parts:
        return out, [jnp.zeros_like(y) for y in out]
    return out, [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]


def _by_residuals(call: _Call, residuals: Arrays, x: Arrays, tangents: dict[int, Array]) -> Arrays:
    def function(moving: dict[int, Array]) -> Arrays:
        return call.derived(tuple(moving.get(i, r) for i, r in enumerate(residuals)), x)

    return jax.jvp(function, ({i: residuals[i] for i in tangents},), (tangents,))[1]


def _transpose(cotangents: Sequence[Any], *args: Any, call: _Call) -> list[Any]:
    residuals, x = call.split(args)
    dx = _linear_map.bind(*residuals, *map(ad.instantiate_zeros, cotangents), call=call.transposed())
    wanted = [d if ad.is_undefined_primal(leaf) else None for d, leaf in zip(dx, x, strict=True)]
    return [None] * len(residuals) + wanted


def _batch(args: Sequence[Array], dims: Sequence[Any], *, call: _Call) -> tuple[list[Array], list[int]]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = [arg if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True)]
    (residuals, x), (residual_dims, x_dims) = call.split(args), call.split(dims)
    x = [jnp.broadcast_to(y, (size, *y.shape)) if dim is None else y for y, dim in zip(x, x_dims, strict=True)]
    axes = tuple(None if dim is None else 0 for dim in residual_dims)
    call = dataclasses.replace(call, fun=_Mapped(call.fun, axes), transpose=_Mapped(call.transpose, axes))
    out = _linear_map.bind(*residuals, *x, call=call)
    return out, [0] * len(out)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True
_linear_map.def_impl(lambda *args, call: list(call(*args)))
_linear_map.def_abstract_eval(_shapes)
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(lambda *args, call: call(*args), multiple_results=True))
