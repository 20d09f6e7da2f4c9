"""Forward and reverse mode of the operations that have derivatives of their own, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codi_jax.models.kernels.convolution import convolve
from codi_jax.models.kernels.geglu import geglu
from codi_jax.models.kernels.group_norm import GroupNorm
from codi_jax.models.kernels.linear_map import linear_map

RNG = np.random.default_rng(0)
NHWC = ("NHWC", "HWIO", "NHWC")
X = RNG.standard_normal((2, 18, 19, 4))  # pixels enough for a convolution that is none over patches


def normalize(x, scale, bias):
    return GroupNorm(2, 1e-5, x.dtype).apply({"params": {"scale": scale, "bias": bias}}, x)


def plain_normalize(x, scale, bias):
    groups = x.reshape(*x.shape[:3], 2, -1)
    mean, variance = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * scale[None, None, None] + bias


def plain_geglu(x):
    value, gate = jnp.split(x, 2, axis=-1)
    return value * gate * jax.scipy.stats.norm.cdf(gate)


def convolution(function, stride, padding):
    return lambda x, kernel: function(x, kernel, (stride, stride), (padding, padding), dimension_numbers=NHWC)


OURS_AND_PLAIN = {
    "group norm": (normalize, plain_normalize, (X, *RNG.standard_normal((2, 4)))),
    "geglu": (geglu, plain_geglu, (X,)),
    "convolution over patches": (
        convolution(convolve, 1, (1, 1)),
        convolution(jax.lax.conv_general_dilated, 1, (1, 1)),
        (RNG.standard_normal((2, 6, 7, 4)), RNG.standard_normal((3, 3, 4, 64))),
    ),
    **{
        f"convolution {taps} {stride} {padding}": (
            convolution(convolve, stride, padding),
            convolution(jax.lax.conv_general_dilated, stride, padding),
            (X, RNG.standard_normal((taps, taps, 4, 3))),
        )
        for taps, stride, padding in [(3, 1, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0)), (4, 3, (2, 0))]
    },
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=OURS_AND_PLAIN)
def case(request):
    ours, plain, args = OURS_AND_PLAIN[request.param]
    return ours, plain, tuple(map(jnp.asarray, args))


def assert_same(derive, ours, plain, args):
    """That ``derive(f)(*args)``, compiled, is the same number by number for both functions."""
    found, wanted = (jax.jit(derive(f))(*args) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, wanted)


def tangents_like(args):
    return tuple(jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in args)


def forward(f):
    return lambda *args: jax.jvp(f, args, tangents_like(args))


def linearized(f):
    return lambda *args: jax.linearize(f, *args)[1](*tangents_like(args))


def reverse(f):
    def weighted(args):
        return jnp.sum(jnp.sin(f(*args)))

    return lambda *args: jax.grad(weighted)(args)


def reverse_over_forward(f):
    """Of a loss that contains a derivative."""

    def loss(args):
        y, dy = forward(f)(*args)
        return jnp.sum(jnp.sin(y) * dy)

    return lambda *args: jax.grad(loss)(args)


def forward_over_reverse(f):
    return forward(reverse(f))


@pytest.mark.parametrize("derive", [forward, linearized, reverse, reverse_over_forward, forward_over_reverse])
def test_derivatives_are_those_that_jax_derives(case, derive):
    assert_same(derive, *case)


def test_one_argument_alone_may_move(case):
    ours, plain, args = case
    for i in range(len(args)):
        alone = [lambda x, f=f, i=i: f(*args[:i], x, *args[i + 1 :]) for f in (ours, plain)]
        assert_same(lambda f: lambda x: (forward(f)(x), reverse(f)(x)), *alone, args[i : i + 1])


def test_derivatives_agree_with_finite_differences(case):
    ours, _, args = case
    check_grads(jax.jit(ours), args, order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda f: lambda *x: jax.lax.cond(x[0].sum() > 99, f, f, *x)])
def test_both_modes_pass_through(case, wrap):
    assert_same(lambda f: lambda *x: (forward(wrap(f))(*x), reverse(wrap(f))(*x)), *case)


@pytest.mark.parametrize("derive", [reverse, reverse_over_forward])
def test_derivatives_can_be_mapped(case, derive):
    ours, plain, args = case
    several = tuple(jnp.stack([x, 0.5 * x, 2 - x]) for x in args)
    assert_same(lambda f: jax.vmap(derive(f)), ours, plain, several)
    axes = (0,) + (None,) * (len(args) - 1)
    assert_same(lambda f: derive(jax.vmap(f, axes)), ours, plain, (several[0], *args[1:]))


def test_a_linear_map_is_transposed_by_hand_in_reverse_mode_only():
    def twice(_, x):
        return (2 * x[0],)

    def three_times(_, y):  # not the transpose of the above, so that one can tell
        return (3 * y[0],)

    def f(x):
        return linear_map(twice, three_times, (), (x,))[0]

    one = jnp.ones(())
    assert jax.jvp(f, (one,), (one,)) == (2, 2)
    assert jax.linearize(f, one)[1](one) == 2
    assert jax.grad(f)(one) == jax.grad(jax.jit(f))(one) == jax.vmap(jax.grad(f))(jnp.ones(2))[1] == 3
    back_and_forth = jax.linear_transpose(lambda y: jax.linear_transpose(f, one)(y)[0], one)
    assert back_and_forth(one)[0] == 2
