"""The buffers of a state's arrays: each array has its own, kept only as long as needed."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def own_buffers(state: State, frozen: Any) -> State:
    """The state with arrays that nothing else holds, because the step overwrites them.

    A student starts as its teacher and an average as its student, often as the same arrays.

    Args:
      state: a tree of arrays on devices.
      frozen: the trees that the step reads.
    """
    taken = {_address(leaf) for leaf in jax.tree.leaves(frozen)}

    def own(leaf: jax.Array) -> jax.Array:
        if (address := _address(leaf)) in taken:
            return jnp.copy(leaf)
        taken.add(address)
        return leaf

    return jax.tree.map(own, state)


def _address(leaf: jax.Array) -> int:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return data.addressable_data(0).unsafe_buffer_pointer()


def forget(state: State) -> State:
    """The shapes of a state's arrays, which are freed to restore others instead: both may not fit in memory."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return like
