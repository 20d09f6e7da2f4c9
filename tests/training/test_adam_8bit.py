"""8-bit Adam against a reading of the paper in NumPy, and against Adam in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codi_jax.training.adam_8bit import (
    MIN_SIZE,
    Adam8BitState,
    Quantized,
    dequantize,
    dynamic_map,
    quantize,
    scale_by_adam_8bit,
)


def value_of(code: int, signed: bool) -> float:
    """One code of 8 bits, read from its bits (Dettmers et al., 2022, figure 2).

    Zeros count decades; the first one ends them; the rest is the fraction. The first bit is the sign, or, without one,
    is appended to the fraction. The codes without any one stand for 0 and, as there is no −0, for 1.
    """
    first, rest = code >> 7, f"{code & 0x7F:07b}"
    if "1" not in rest:
        return float(first)
    decades = rest.index("1")
    fraction = rest[decades + 1 :] + ("" if signed else str(first))
    parts = 2 ** len(fraction)
    place = int(fraction, 2) if fraction else 0
    value = 10.0**-decades * (0.1 + 0.9 * (place + 0.5) / parts)
    return -value if signed and first else value


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_the_paper(signed: bool) -> None:
    wanted = sorted(value_of(code, signed) for code in range(256))
    assert len(set(wanted)) == 256
    np.testing.assert_allclose(dynamic_map(signed), wanted, rtol=1e-6)
    assert dynamic_map(signed)[-1] == 1


def numpy_quantize(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Nearest value in blocks of 256, by looking at all of them."""
    values = dynamic_map(signed).astype(np.float64)
    blocks = np.concatenate([x.ravel(), np.zeros(-x.size % 256)]).reshape(-1, 256)
    scales = np.abs(blocks).max(1)
    normalized = blocks / np.where(scales > 0, scales, 1)[:, None]
    codes = np.abs(normalized[..., None] - values).argmin(-1)
    if not signed:  # a positive second moment stays positive
        codes = np.where((blocks > 0) & (codes == 0), 1, codes)
    return codes, scales


def moments(signed: bool, shape: tuple[int, ...] = (37, 111)) -> np.ndarray:
    """Numbers over ten decades, different in every block, and a block of zeros."""
    rng = np.random.default_rng(0)
    x = (
        np.sign(rng.uniform(-1, 1.5, shape))
        * 10.0 ** rng.uniform(-5, 5, (shape[0], 1))
        * 10.0 ** rng.uniform(-4, 0, shape)
    )
    x[-5:] = 0
    return x.astype("f4") if signed else (x**2).astype("f4")


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_in_each_block(signed: bool) -> None:
    x = moments(signed)
    stored = jax.jit(quantize, static_argnums=1)(x, signed)
    codes, scales = numpy_quantize(x.astype(np.float64), signed)
    assert stored.codes.dtype == jnp.uint8
    assert stored.codes.shape == (-(-x.size // 256), 256)
    np.testing.assert_allclose(stored.scales, scales, rtol=1e-6)
    differ = np.asarray(stored.codes) != codes
    assert differ.mean() < 1e-3  # in the middle between two values, to rounding
    back = np.asarray(dequantize(stored, x.shape, signed))
    wanted = (dynamic_map(signed)[codes] * scales[:, None]).ravel()[: x.size].reshape(x.shape)
    np.testing.assert_allclose(back.ravel()[~differ.ravel()[: x.size]], wanted.ravel()[~differ.ravel()[: x.size]], 1e-6)
    np.testing.assert_array_equal(back[x == 0], 0)
    if not signed:
        assert back.max() == x.max()


def test_a_positive_second_moment_never_becomes_zero() -> None:
    x = jnp.full(256, 1e-30).at[0].set(1.0)
    back = dequantize(quantize(x, False), x.shape, False)
    assert np.all(np.asarray(back) > 0)


@jax.jit
def step(params: Any, state: Any, grads: Any) -> Any:
    optimizer = scale_by_adam_8bit(0.9, 0.99, 1e-6)
    updates, state = optimizer.update(grads, state, params)
    return jax.tree.map(lambda p, u: p - 0.01 * u, params, updates), state


def test_steps_are_those_of_the_paper() -> None:
    """Dequantize, update in full precision, step, quantize: in float64. A small tensor is not quantized at all."""
    rng = np.random.default_rng(0)
    shapes = {"large": (48, 100), "small": (63, 65)}
    assert 63 * 65 < MIN_SIZE <= 48 * 100
    params = {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}
    state = scale_by_adam_8bit().init(params)
    assert isinstance(state.mu["large"], Quantized)
    assert state.nu["small"].shape == (63, 65)
    p, m, v = (
        {k: np.asarray(x, np.float64) for k, x in params.items()},
        dict.fromkeys(shapes, 0.0),
        dict.fromkeys(shapes, 0.0),
    )
    for i in range(1, 6):
        grads = {k: rng.standard_normal(s) * 10.0 ** rng.uniform(-3, 0, s) for k, s in shapes.items()}
        params, state = step(params, state, jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads))
        for k, g in grads.items():
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.99 * v[k] + 0.01 * g**2
            p[k] = p[k] - 0.01 * (m[k] / (1 - 0.9**i)) / (np.sqrt(v[k] / (1 - 0.99**i)) + 1e-6)
        for moment, signed in ((m, True), (v, False)):
            codes, scales = numpy_quantize(moment["large"], signed)
            back = (dynamic_map(signed)[codes] * scales[:, None]).ravel()[: 48 * 100].reshape(48, 100)
            moment["large"] = back.astype(np.float64)
    np.testing.assert_allclose(params["small"], p["small"], rtol=1e-4, atol=1e-6)
    # A number in the middle between two codes may go either way, and its later steps with it.
    apart = np.abs(np.asarray(params["large"]) - p["large"]) > 1e-4 * np.abs(p["large"]) + 1e-6
    assert apart.mean() < 5e-3


def regression(optimizer: Any, steps: int = 250) -> tuple[float, float]:
    """Teacher and student of two layers, from minibatches; the loss at the start and at the end."""
    rng = np.random.default_rng(0)
    truth = {k: jnp.asarray(rng.standard_normal(s) / 8, jnp.float32) for k, s in (("a", (64, 96)), ("b", (96, 48)))}
    start = {k: jnp.asarray(rng.standard_normal(x.shape) / 8, jnp.float32) for k, x in truth.items()}

    def output(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((output(params, x) - output(truth, x)) ** 2)

    def update(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, jax.random.normal(key, (64, 64)))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), steps)
    _, losses = jax.jit(lambda c: jax.lax.scan(update, c, keys))((start, optimizer.init(start)))
    return float(losses[0]), float(np.asarray(losses[-20:]).mean())


def test_it_converges_as_adam_in_float32_does() -> None:
    first, in_float32 = regression(optax.chain(optax.scale_by_adam(), optax.scale(-3e-3)))
    _, in_8_bits = regression(optax.chain(scale_by_adam_8bit(), optax.scale(-3e-3)))
    assert in_float32 < 0.2 * first, "a run that has learned nothing proves nothing"
    assert abs(in_8_bits / in_float32 - 1) < 0.1


def test_moments_take_two_bytes_of_a_parameter() -> None:
    params = {"kernel": jnp.zeros((512, 640))}
    state = jax.eval_shape(scale_by_adam_8bit().init, params)
    assert isinstance(state, Adam8BitState)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.mu, state.nu)))
    assert size / params["kernel"].size == 2 * (1 + 4 / 256)
