"""Counts of operations, against counts by hand and against XLA's own count of programs without loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from codi_jax.planning.flops import count_flops


def counted(function, *arrays) -> int:
    return count_flops(jax.jit(function).trace(*arrays).jaxpr)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def by_xla(function, *arrays) -> float:
    """XLA counts element-wise operations too, so programs should have few of them."""
    return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]


def conv(x, k, stride=1, padding="SAME"):
    return jax.lax.conv_general_dilated(x, k, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_products_by_hand():
    assert counted(jnp.matmul, shape(3, 5, 7), shape(3, 7, 11)) == 2 * 3 * 5 * 7 * 11
    assert counted(lambda a, b: jnp.einsum("btnh,bsnh->bnts", a, b), shape(2, 6, 4, 8), shape(2, 9, 4, 8)) == (
        2 * 2 * 4 * 6 * 9 * 8
    )


def test_convolutions_by_hand():
    """A 3 x 3 kernel meets a padded border at 3 n - 2 places per axis instead of 3 n."""
    assert counted(conv, shape(2, 8, 8, 5), shape(3, 3, 5, 7)) == 2 * 2 * 5 * 7 * (3 * 8 - 2) ** 2
    assert counted(lambda x, k: conv(x, k, padding="VALID"), shape(2, 8, 8, 5), shape(3, 3, 5, 7)) == (
        2 * 2 * 5 * 7 * (3 * 6) ** 2
    )
    assert counted(lambda x, k: conv(x, k, 2, "VALID"), shape(1, 9, 9, 4), shape(3, 3, 4, 6)) == 2 * 4 * 6 * 12**2


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_convolutions_as_xla_counts_them(stride: int):
    x, k = jnp.ones((2, 16, 16, 32)), jnp.ones((3, 3, 32, 48))

    def gradients(x, k):
        return jax.vjp(lambda x, k: conv(x, k, stride), x, k)[1](jnp.ones((2, 16 // stride, 16 // stride, 48)))

    assert counted(gradients, x, k) == pytest.approx(by_xla(gradients, x, k), rel=0.02)


def test_groups():
    def grouped(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    assert counted(grouped, shape(1, 5, 5, 8), shape(1, 1, 2, 12)) == 2 * 25 * 2 * 12


def test_loops_count_as_often_as_they_run():
    def loop(x, w):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]

    assert counted(loop, shape(4, 8), shape(5, 8, 8)) == 5 * 2 * 4 * 8 * 8
    assert counted(lambda x, w: jax.lax.map(lambda w: x @ w, w), shape(4, 8), shape(6, 8, 3)) == 6 * 2 * 4 * 8 * 3
    gradient = jax.grad(lambda x, w: loop(x, w).sum(), argnums=(0, 1))
    assert counted(gradient, shape(4, 8), shape(5, 8, 8)) == 3 * 5 * 2 * 4 * 8 * 8


def test_what_is_recomputed_counts_again():
    def f(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    once = 2 * 4 * 8 * 8
    assert counted(jax.value_and_grad(f), shape(8, 8), shape(4, 8)) == 5 * once
    assert counted(jax.value_and_grad(jax.checkpoint(f)), shape(8, 8), shape(4, 8)) == 7 * once


def test_what_nobody_reads_does_not_count():
    def f(x, w):
        y, pullback = jax.vjp(lambda w: x @ w, w)
        return pullback(jnp.ones_like(y))

    def g(x, w):
        return jax.jit(lambda x, w: (x @ w, x.sum()))(x, w)[1]

    assert counted(f, shape(4, 8), shape(8, 8)) == 2 * 4 * 8 * 8
    assert counted(g, shape(4, 8), shape(8, 8)) == 0


def test_the_most_expensive_of_alternatives_counts():
    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    assert counted(either, jax.ShapeDtypeStruct((), bool), shape(4, 8), shape(8, 8)) == 2 * 2 * 4 * 8 * 8


def test_kernels_count():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def product(x, y):
        block = pl.BlockSpec((8, 16), lambda i: (i, 0))
        whole = pl.BlockSpec((16, 16), lambda i: (0, 0))
        call = pl.pallas_call(kernel, jax.ShapeDtypeStruct((32, 16), jnp.float32), grid=(4,), in_specs=[block, whole],
                              out_specs=block)  # fmt: skip
        return call(x, y)

    assert counted(product, shape(32, 16), shape(16, 16)) == 2 * 32 * 16 * 16


def test_work_split_over_devices_counts_whole():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    assert counted(split, shape(8, 4), shape(4, 4)) == 2 * 8 * 4 * 4


def test_a_unet_block_as_xla_counts_it():
    """Products and convolutions are all but 2 % of a network."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 16, 16, 64)), jnp.float32)
    k, w = jnp.ones((3, 3, 64, 64)) / 576, jnp.ones((64, 64)) / 64

    def block(x, k, w):
        x = x + conv(jax.nn.silu(x), k)
        tokens = x.reshape(2, 256, 64) @ w
        scores = jax.nn.softmax(tokens @ tokens.swapaxes(1, 2))
        return scores @ tokens

    assert counted(block, x, k, w) == pytest.approx(by_xla(block, x, k, w), rel=0.05)
