"""Parameter trees as PyTorch state dicts, and back.

A parameter tree *is* a diffusers state dict. One rule translates names (`torch_name`: ``resnets_1/conv1/kernel`` is
``resnets.1.conv1.weight``) and one translates layouts (`to_torch_layout`: HWIO and [in, out] are OIHW and [out, in]).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from jaxtyping import Shaped

from codi_jax.cli.messages import listed
from codi_jax.io.weight_files import Layout
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.names import torch_name

PlaceFn = Callable[[tuple[str, ...], np.ndarray], Any]
"""Puts the array of one parameter, known by its path in the tree, on the devices."""


AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


class NamedLeaf(NamedTuple):
    """One parameter of a tree, as its state dict sees it.

    Attributes:
      path: the path in the tree.
      leaf: the array, or a `jax.ShapeDtypeStruct`.
      shape: in PyTorch's layout.
    """

    path: tuple[str, ...]
    leaf: Any
    shape: tuple[int, ...]


def to_torch_layout(leaf: str, array: AnyArray) -> AnyArray:
    """Returns a view in PyTorch's layout: kernels HWIO -> OIHW and [in, out] -> [out, in], other arrays unchanged.

    Args:
      leaf: the last name of the path, such as ``"kernel"``.
      array: a NumPy or JAX array.
    """
    return array.transpose(_torch_axes(leaf, array.ndim))


def to_flax_layout(leaf: str, array: AnyArray) -> AnyArray:
    """Returns a view in Flax's layout: kernels OIHW -> HWIO and [out, in] -> [in, out]; inverts `to_torch_layout`."""
    axes = _torch_axes(leaf, array.ndim)
    return array.transpose([axes.index(axis) for axis in range(array.ndim)])


def _torch_axes(leaf: str, ndim: int) -> list[int]:
    if leaf != "kernel":
        return list(range(ndim))
    return {2: [1, 0], 4: [3, 2, 0, 1]}[ndim]


def to_state_dict(params: Params) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """The state dict of a tree, one tensor at a time: PyTorch's names and layouts, in host memory.

    Args:
      params: nested dict of arrays. Sharded arrays are gathered; if several processes hold them, all must iterate.

    Yields:
      Name and array; the array may be a view.
    """
    for name, (path, leaf, _) in leaves_by_name(params).items():
        yield name, to_torch_layout(path[-1], _to_host(leaf))


def from_state_dict(
    abstract_params: Params,
    named_arrays: Mapping[str, Any],
    dtype: DTypeLike | None = jnp.float32,
    place: PlaceFn | None = None,
    *,
    layout: Layout = "torch",
    where: str = "The state dict",
) -> Params:
    """Builds a parameter tree from a state dict.

    Args:
      abstract_params: the tree of shapes that ``module.abstract_params()`` returns.
      named_arrays: name -> NumPy array, or anything with ``shape`` and ``dtype`` that ``np.asarray`` reads.
      dtype: precision of the parameters. Default: the arrays'.
      place: puts each parameter on devices. Default: on the default device.
      layout: the layout of the kernels in ``named_arrays``.
      where: the file, for error messages.

    Returns:
      The tree, with arrays as ``place`` returns them.

    Raises:
      WeightsError: if keys are missing, unexpected or of another shape (all are listed), or a value is not finite.
    """
    leaves = leaves_by_name(abstract_params)
    expected = {name: shape if layout == "torch" else leaf.shape for name, (_, leaf, shape) in leaves.items()}
    require_match(expected, named_arrays, f"{where} does not fit its config.json; check that they are from one model")
    place = place or (lambda _, array: jax.device_put(array))
    placed = {}
    # Large ones first: a tensor is in memory two or three times during conversion, which does not raise the peak early
    # on.
    for name in sorted(leaves, key=lambda name: -math.prod(expected[name])):
        path = leaves[name][0]
        array = np.asarray(named_arrays[name])
        file = str(getattr(named_arrays[name], "path", where))
        if not _is_finite(array):
            raise WeightsError(f"{file}: {name} holds NaN or infinity: the file is damaged, use another version of it.")
        array = to_flax_layout(path[-1], array) if layout == "torch" else array
        kept = np.dtype(array.dtype if dtype is None else dtype)
        # Waiting keeps one tensor in flight; a queue of transfers would hold the host copies of all of them.
        placed[name] = jax.block_until_ready(place(path, convert(array, kept, name, file)))
    return jax.tree.unflatten(jax.tree.structure(abstract_params), [placed[name] for name in leaves])


def leaves_by_name(params: Params) -> dict[str, NamedLeaf]:
    """The parameters of a tree by their names in the state dict, in the tree's own order."""
    leaves = {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = tuple(key.key for key in keys)
        shape = tuple(leaf.shape[axis] for axis in _torch_axes(path[-1], leaf.ndim))
        leaves[torch_name(path)] = NamedLeaf(path, leaf, shape)
    return leaves


def require_match(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], problem: str) -> None:
    """Compares the names, shapes and kinds of tensors with the expected ones.

    Args:
      expected: shapes by name.
      found: tensors by name, anything with ``shape`` and ``dtype``.
      problem: the start of the message.

    Raises:
      WeightsError: listing what is missing, unexpected, of another shape, or not floating-point.
    """
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name} {list(found[name].shape)}" for name in found if name not in expected]
    both = [name for name in expected if name in found]
    misshapen = [
        f"{name} is {list(found[name].shape)} instead of {list(expected[name])}"
        for name in both
        if tuple(found[name].shape) != tuple(expected[name])
    ]
    mistyped = [
        f"{name} is {found[name].dtype}" for name in both if not jnp.issubdtype(found[name].dtype, jnp.floating)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "not floating": mistyped}
    report = [f"  {len(entries)} {kind}: {listed(entries)}" for kind, entries in kinds.items() if entries]
    if report:
        raise WeightsError("\n".join([f"{problem}:", *report]))


def _is_finite(array: Shaped[np.ndarray, "..."]) -> bool:
    # On the bits: half the time of np.isfinite on 16-bit floats. NaN and infinity have all exponent bits set.
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    chunks = (bits[start : start + (1 << 20)] for start in range(0, bits.size, 1 << 20))
    return not any(bool(((chunk & exponent) == exponent).any()) for chunk in chunks)


def convert(view: Shaped[np.ndarray, "..."], dtype: np.dtype, name: str, where: str) -> Shaped[np.ndarray, "..."]:
    """The array in C order and in ``dtype``, copied only if necessary.

    Raises:
      WeightsError: if a value is too large for float16.
    """
    with np.errstate(over="ignore"):
        array = view.astype(dtype, copy=False) if view.flags.c_contiguous else _transposed(view, dtype)
    if dtype == np.float16 and view.dtype != np.float16 and not _is_finite(array):
        raise WeightsError(f"{where}: {name} does not fit into float16; use bfloat16 or float32.")
    return array


def _transposed(view: Shaped[np.ndarray, "..."], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    # NumPy transposes kernels three times as fast in blocks of channels, which stay in the cache.
    array, width = np.empty(view.shape, dtype), 32
    axis = max(range(view.ndim), key=lambda axis: (view.shape[axis] > width, view.strides[axis]))
    for start in range(0, view.shape[axis], width):
        block = (slice(None),) * axis + (slice(start, start + width),)
        array[block] = view[block]
    return array


def _to_host(leaf: Any) -> Shaped[np.ndarray, "..."]:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    # A second array on the same buffers: JAX keeps the host copy of an array as long as the array itself lives.
    shards = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards))
