"""The autoencoder's loss against NumPy, and that training reconstructs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published import TINY_VAE

from codi_jax.methods import autoencoder
from codi_jax.methods.autoencoder import AutoencoderFlags
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim

VAE = AutoencoderKL(VAEConfig.from_dict(TINY_VAE))
NETWORKS = Networks(unet=None, vae=VAE)
FROZEN = Frozen({}, None)
apply = jax.jit(VAE.apply, static_argnames="method")


@pytest.fixture(scope="module")
def params():
    return jax.jit(VAE.random_params)(jax.random.key(0))  # one program, not one for each initializer


@pytest.fixture(scope="module")
def batch():
    return {"pixels": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))}


@pytest.mark.parametrize(("rec_loss", "gamma"), [("l1", 0.0), ("l2", 0.0), ("l1", 0.5)])
def test_loss_is_that_of_the_paper(params, batch, rec_loss, gamma):
    flags = AutoencoderFlags(rec_loss=rec_loss, kl_scale=1e-3, gradient_scale=gamma)
    key, setup = jax.random.key(1), autoencoder.configure(NETWORKS, flags)
    state = optim.init_state(params, optax.identity(), key)
    value, metrics = jax.jit(autoencoder.loss, static_argnums=5)(params, state, FROZEN, batch, key, setup)
    x = np.asarray(batch["pixels"], np.float64) / 255 * 2 - 1
    q = apply({"params": params}, jnp.asarray(x, jnp.float32), method="encode")
    mean, logvar = (np.asarray(each, np.float64) for each in (q.mean, q.logvar))
    z = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key, mean.shape), np.float64)
    out = np.asarray(apply({"params": params}, jnp.asarray(z, jnp.float32), method="decode"), np.float64)
    error = np.abs(out - x).mean() if rec_loss == "l1" else ((out - x) ** 2).mean()
    for k in (1, 2, 4):  # pooled by sums over windows, and differences of neighbors
        r = sum((out - x)[:, i::k, j::k] for i in range(k) for j in range(k)) / k**2
        error += gamma * sum(np.abs(np.diff(r, axis=axis)).mean() for axis in (1, 2))
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(value, error + 1e-3 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    # Of 8-bit values: 10 log10(255² / mean squared error).
    psnr = 10 * np.log10(255**2 / ((out - x) / 2 * 255).__pow__(2).mean())
    np.testing.assert_allclose(metrics["psnr"], psnr, rtol=1e-4)


@pytest.mark.slow
def test_training_reconstructs_and_gives_the_latents_a_scale(params, batch):
    optimizer = optax.adam(3e-3)
    setup = autoencoder.configure(NETWORKS, AutoencoderFlags(rec_loss="l2", use_ema=True, ema_decay=0.5))
    state = autoencoder.init(setup, {"vae": params}.__getitem__, optimizer, jax.random.key(0))
    step = jax.jit(autoencoder.METHOD.step(setup, optimizer))
    # Smooth pictures: noise does not compress.
    ramp = np.linspace(0, 255, 16)[None, :, None, None] * np.array([1, 0.5, 0])
    batch = {"pixels": jnp.asarray(np.broadcast_to(ramp, (4, 16, 16, 3)).astype(np.uint8))}
    for _ in range(60):
        state, metrics = step(state, FROZEN, batch)
    assert metrics["psnr"] > 20
    result = autoencoder.METHOD.result(state, setup, {}.__getitem__)
    assert result == {"vae": state.ema}
    images, z = jax.jit(autoencoder.reconstruct, static_argnums=0)(VAE, result["vae"], batch["pixels"])
    assert images.dtype == jnp.uint8
    assert np.abs(np.asarray(images, int) - np.asarray(batch["pixels"], int)).mean() < 20
    scaled = autoencoder.with_scaling_factor(VAE, z)
    assert scaled.config.scaling_factor != VAE.config.scaling_factor
    np.testing.assert_allclose(np.std(np.asarray(z) * scaled.config.scaling_factor), 1, rtol=1e-5)


def test_the_vae_alone_is_trained_and_recomputes_if_it_is_asked_to():
    for remat in (False, True):
        setup = autoencoder.configure(NETWORKS, AutoencoderFlags(), remat=remat)
        assert (setup.trained, setup.frozen, setup.student.vae.remat) == (("vae",), (), remat)
        assert setup.ema_decay is None
