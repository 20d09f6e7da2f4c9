"""Layers whose gradients are written by hand, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import activations

from codi_jax.models.group_norm import GroupNorm
from codi_jax.models.layers import GEGLU

RNG = np.random.default_rng(0)


def gradients(module, params, x, dy):
    """The output and the gradients of its product with ``dy``, by parameters and by x."""

    def product(params, x):
        y = module.apply({"params": params}, x)
        return jnp.vdot(y.astype(jnp.float32), dy), y

    (by_params, by_x), y = jax.grad(product, argnums=(0, 1), has_aux=True)(params, x)
    return y, by_params, by_x


@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (3, 7, 12)])
@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("offset", [0.0, 50.0])  # E[x²] − E[x]² would lose all digits
def test_group_norm_and_its_gradient_equal_torch(shape, groups, offset):
    x, dy = RNG.normal(offset, 1, shape).astype("f4"), RNG.standard_normal(shape).astype("f4")
    scale, bias = RNG.standard_normal((2, shape[-1])).astype("f4")
    theirs = torch.nn.GroupNorm(groups, shape[-1], eps=1e-5).double()
    theirs.weight.data, theirs.bias.data = torch.tensor(scale).double(), torch.tensor(bias).double()
    tensor = torch.tensor(x).double().requires_grad_()
    out = theirs(tensor.moveaxis(-1, 1)).moveaxis(1, -1)
    out.backward(torch.tensor(dy).double())
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    y, by_params, by_x = gradients(GroupNorm(groups, 1e-5, jnp.float32), params, jnp.asarray(x), jnp.asarray(dy))
    tolerance = {"rtol": 2e-5, "atol": 2e-5 if offset == 0 else 2e-4}
    np.testing.assert_allclose(y, out.detach(), **tolerance)
    np.testing.assert_allclose(by_x, tensor.grad, **tolerance)
    np.testing.assert_allclose(by_params["scale"], theirs.weight.grad, rtol=2e-5, atol=1e-3)
    np.testing.assert_allclose(by_params["bias"], theirs.bias.grad, rtol=2e-5, atol=1e-4)


def test_geglu_and_its_gradient_equal_diffusers():
    theirs = activations.GEGLU(6, 10).double()
    x, dy = RNG.normal(0, 2, (2, 5, 6)).astype("f4"), RNG.standard_normal((2, 5, 10)).astype("f4")
    tensor = torch.tensor(x).double().requires_grad_()
    out = theirs(tensor)
    out.backward(torch.tensor(dy).double())
    kernel, bias = (p.detach().float().numpy() for p in theirs.parameters())
    params = {"proj": {"kernel": jnp.asarray(kernel.T), "bias": jnp.asarray(bias)}}
    y, by_params, by_x = gradients(GEGLU(10, jnp.float32), params, jnp.asarray(x), jnp.asarray(dy))
    np.testing.assert_allclose(y, out.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_x, tensor.grad, rtol=1e-5, atol=1e-5)
    by_kernel, by_bias = (p.grad for p in theirs.parameters())
    np.testing.assert_allclose(by_params["proj"]["kernel"], by_kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_params["proj"]["bias"], by_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [GroupNorm(2, 1e-5, jnp.bfloat16), GEGLU(8, jnp.bfloat16)], ids=["norm", "geglu"])
def test_half_precision_keeps_its_dtypes_and_nearly_the_values(module):
    x = jnp.asarray(RNG.standard_normal((2, 5, 8)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    dy = jnp.asarray(RNG.standard_normal((2, 5, 8)), jnp.float32)
    y, by_params, by_x = gradients(module, params, x.astype(jnp.bfloat16), dy)
    assert y.dtype == by_x.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(by_params))
    _, _, exact = gradients(module.clone(dtype=jnp.float32), params, x, dy)
    np.testing.assert_allclose(by_x.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))
