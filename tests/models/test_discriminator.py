"""The head of DMD2's GAN loss, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from codi_jax.models.discriminator import DiscriminatorHead

FEATURES = 64


def in_torch(params: dict, x: np.ndarray) -> torch.Tensor:
    """Convolutions of four pixels with stride 2, a padding of 1, group norm and SiLU, twice; then the mean of all."""
    out, tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), lambda leaf: torch.from_numpy(np.array(leaf))
    for i in range(2):
        conv, norm = params[f"convs_{i}"], params[f"norms_{i}"]
        # Beyond the border there are zeros: as many as the window needs.
        out = functional.pad(out, (0, max(0, 2 - out.shape[3]), 0, max(0, 2 - out.shape[2])))
        kernel = tensor(conv["kernel"]).permute(3, 2, 0, 1)
        out = functional.conv2d(out, kernel, tensor(conv["bias"]), stride=2, padding=1)
        out = functional.silu(functional.group_norm(out, 8, tensor(norm["scale"]), tensor(norm["bias"])))
    return out.mean((2, 3)) @ tensor(params["logit"]["kernel"])[:, 0] + tensor(params["logit"]["bias"])


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (4, 4), (8, 6)])
def test_it_takes_features_of_any_size(size: tuple[int, int]):
    """The lowest features of a small picture are one or two pixels wide."""
    head, rng = DiscriminatorHead(FEATURES), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype("f4"), head.random_params(jax.random.key(0))
    )
    x = rng.standard_normal((3, *size, FEATURES)).astype("f4")
    ours = head.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(ours, in_torch(params, x), rtol=1e-4, atol=1e-5)
    half = DiscriminatorHead(FEATURES, jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x: half.apply({"params": params}, x).sum()))(jnp.asarray(x, jnp.bfloat16))
    assert gradient.shape == x.shape
    assert np.all(np.any(np.asarray(gradient, "f4") != 0, axis=-1))  # each pixel counts
    assert np.all(np.isfinite(np.asarray(gradient, "f4")))
