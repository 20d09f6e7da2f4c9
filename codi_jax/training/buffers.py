"""Which buffers the arrays of a state lie in: each its own, and only as long as they are needed."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def own_buffers(state: State, frozen: Any) -> State:
    """The state with arrays that nothing else holds, since the step overwrites them.

    A student starts as its teacher and an average as its student, often as the same arrays.

    Args:
      state: a tree of arrays on devices.
      frozen: trees that the step reads.
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
    """What the arrays of a state were, to restore others in their place: there may be no room for both."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return like
