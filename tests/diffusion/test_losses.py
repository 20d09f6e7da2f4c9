"""Losses and weights against their formulas in NumPy, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from codi_jax.diffusion import losses
from codi_jax.diffusion.schedule import NoiseSchedule


def pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, *shape))
    # Differences around Huber's c = 1e-3 and far from it.
    return a, a + b * 10.0 ** rng.integers(-4, 1, shape)


@pytest.mark.parametrize("shape", [(3, 4, 4, 2), (1, 5), (4, 4, 4, 4)])
def test_losses_are_those_of_each_sample(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    rows = (a - b).reshape(shape[0], -1)
    ours = losses.mse(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(ours, [np.mean(row**2) for row in rows], rtol=1e-5)
    for c in (1e-3, 0.5):
        ours = losses.huber(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), c)
        wanted = [np.mean(np.sqrt(row**2 + c**2) - c) for row in rows]
        np.testing.assert_allclose(ours, wanted, rtol=1e-4)  # √ − c cancels


def test_losses_are_taken_in_float32() -> None:
    prediction = jnp.full((2, 400), 100.0, jnp.float16)
    target = jnp.full((2, 400), -200.0, jnp.float16)
    assert losses.mse(prediction, target).dtype == jnp.float32
    np.testing.assert_allclose(losses.mse(prediction, target), 90_000.0)  # more than float16 holds


@pytest.mark.parametrize("loss", [losses.mse, losses.huber])
def test_shapes_that_would_broadcast_are_refused(loss) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot be compared with \(2, 1\)"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 1)))


def test_min_snr_weights_of_every_prediction_type() -> None:
    """They make a loss on x̂ weighted by min(SNR, γ): ‖Δε‖² = SNR ‖Δx‖² and ‖Δv‖² = (SNR + 1) ‖Δx‖²."""
    snr = np.array([1e-4, 0.3, 1.0, 5.0, 7.0, 1176.0])
    for gamma in (5.0, 1.0):
        of_x = np.minimum(snr, gamma)
        wanted = {"sample": of_x, "epsilon": of_x / snr, "v_prediction": of_x / (snr + 1)}
        for kind, weights in wanted.items():
            ours = losses.min_snr_weights(jnp.asarray(snr, jnp.float32), gamma, kind)
            assert ours.shape == snr.shape
            np.testing.assert_allclose(ours, weights, rtol=1e-6)


def test_min_snr_weights_are_finite_without_any_signal() -> None:
    config = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    snr = NoiseSchedule.from_config(config).snr(jnp.array([999, 0]))
    assert snr[0] == 0
    np.testing.assert_array_equal(losses.min_snr_weights(snr, 5.0, "v_prediction")[0], 0)
    np.testing.assert_array_equal(losses.min_snr_weights(snr, 5.0, "epsilon")[0], 1)
