"""The autoencoder against PyTorch diffusers."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from oracle import assert_close, make_pair, nchw, nhwc, torch_shapes
from published import TINY_VAE

from codi_jax.models.config import ConfigError
from codi_jax.models.published import VAE
from codi_jax.models.vae import AutoencoderKL, VAEConfig

VARIANTS = {
    "sd": TINY_VAE,
    "no-quant-conv": {**TINY_VAE, "use_quant_conv": False, "use_post_quant_conv": False},
    "no-attention": {**TINY_VAE, "mid_block_add_attention": False},
    "two-layers": {**TINY_VAE, "layers_per_block": 2, "latent_channels": 3},
}


def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 32, 3)), jnp.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_decode_equal_diffusers(variant: str) -> None:
    model, module, params = make_pair("vae", VARIANTS[variant])
    apply = jax.jit(module.apply, static_argnames="method")
    theirs = model.encode(nchw(images())).latent_dist
    ours = apply({"params": params}, images(), method="encode")
    assert_close(ours.mode(), nhwc(theirs.mode()))
    assert_close(ours.logvar, nhwc(theirs.logvar))
    np.testing.assert_allclose(ours.kl(), theirs.kl(), rtol=1e-3)
    decoded = apply({"params": params}, ours.mode(), method="decode")
    assert_close(decoded, nhwc(model.decode(nchw(ours.mode())).sample))


def test_samples_have_the_mean_and_the_spread_of_the_distribution() -> None:
    _, module, params = make_pair("vae", TINY_VAE)
    latents = jax.jit(functools.partial(module.apply, method="encode"))({"params": params}, images())
    drawn = jax.vmap(latents.sample)(jax.random.split(jax.random.key(0), 4000))
    sigma = np.exp(0.5 * latents.logvar)
    np.testing.assert_allclose((drawn.mean(0) - latents.mode()) / sigma, np.zeros_like(sigma), atol=0.1)
    np.testing.assert_allclose(drawn.std(0) / sigma, np.ones_like(sigma), atol=0.1)


def test_full_size_parameters_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in TorchVAE(**VAE).state_dict().items()}
    assert torch_shapes(AutoencoderKL(VAEConfig.from_dict(VAE))) == theirs


def test_config_round_trip_is_complete() -> None:
    with torch.device("meta"):
        theirs = {k: v for k, v in TorchVAE(**VAE).config.items() if not k.startswith("_")}
    ours = VAEConfig.from_dict(VAE).to_dict()
    assert ours.pop("_class_name") == "AutoencoderKL"
    assert ours == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}


def test_bfloat16_stays_as_near_float32_as_pytorchs() -> None:
    """What rounding costs depends on the CPU, and on the weights: PyTorch with the same ones is the measure."""
    oracle, module, params = make_pair("vae", TINY_VAE)
    latents = jax.jit(functools.partial(module.apply, method="encode"))({"params": params}, images()).mode()
    decode = jax.jit(functools.partial(module.apply, method="decode"))
    half = jax.jit(functools.partial(module.clone(dtype=jnp.bfloat16).apply, method="decode"))
    ours = half({"params": params}, latents).astype(jnp.float32) - decode({"params": params}, latents)
    z = torch.tensor(np.asarray(latents)).permute(0, 3, 1, 2)
    with torch.no_grad():
        whole = oracle.decode(z).sample
        theirs = copy.deepcopy(oracle).to(torch.bfloat16).decode(z.to(torch.bfloat16)).sample.float() - whole
    rms = float(theirs.square().mean().sqrt())
    assert 0 < rms < 0.05 * float(whole.square().mean().sqrt())
    assert np.sqrt(np.square(ours).mean()) <= 1.25 * rms


def test_remat_changes_nothing() -> None:
    _, module, params = make_pair("vae", TINY_VAE)

    def loss(module: AutoencoderKL, params: dict) -> jax.Array:
        return jnp.mean((module.apply({"params": params}, images()) - images()) ** 2)

    plain = jax.jit(jax.grad(functools.partial(loss, module)))(params)
    recomputed = jax.jit(jax.grad(functools.partial(loss, module.clone(remat=True))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain, recomputed)


def test_bad_sizes_and_configs_are_refused_in_words() -> None:
    _, module, params = make_pair("vae", TINY_VAE)
    with pytest.raises(ValueError, match="32x22 pixels: both sides must be divisible by 4"):
        jax.eval_shape(functools.partial(module.apply, method="encode"), {"params": params}, images()[:, :22])
    for change in (
        {"shift_factor": 0.1},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 3},
        {"latents_mean": [0.0]},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            VAEConfig.from_dict({**TINY_VAE, **change})
    with pytest.raises(ConfigError, match="same length"):
        VAEConfig.from_dict({**TINY_VAE, "block_out_channels": [8]})
