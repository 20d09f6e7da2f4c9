"""The arrays of a state: none shared with what the step reads, none kept longer than needed."""

import jax
import jax.numpy as jnp
import numpy as np

from codi_jax.training.buffers import forget, own_buffers


def addresses(tree: object) -> list[int]:
    leaves = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in jax.tree.leaves(tree))  # fmt: skip
    return [leaf.unsafe_buffer_pointer() for leaf in leaves]


def test_arrays_that_others_hold_are_copied_and_no_more() -> None:
    """A student that starts as its teacher, its average as the student; what it has alone stays where it is."""
    kernel, alone = jnp.arange(4.0), jnp.ones(3)
    state = {"params": kernel, "ema": alone, "average": alone, "key": jax.random.key(3)}
    owned = own_buffers(state, {"teacher": kernel})
    assert len({*addresses(owned), *addresses(kernel)}) == 5
    assert addresses(alone)[0] in (*addresses(owned["ema"]), *addresses(owned["average"]))
    for name in ("params", "ema", "average"):
        np.testing.assert_array_equal(owned[name], state[name])
    assert addresses(owned["key"]) == addresses(state["key"])


def test_what_is_forgotten_is_not_in_memory() -> None:
    state = {"params": jnp.arange(4.0), "step": jnp.int32(2)}
    like = forget(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert (like["params"].shape, like["params"].dtype, like["step"].dtype) == ((4,), np.float32, np.int32)
    assert like["params"].sharding == state["params"].sharding
