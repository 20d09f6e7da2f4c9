"""Layers whose gradients are written by hand, against PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import activations

from codi_jax.models.kernels.convolution import convolve
from codi_jax.models.kernels.group_norm import GroupNorm
from codi_jax.models.layers import GEGLU

RNG = np.random.default_rng(0)
NHWC = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


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


@pytest.mark.parametrize(
    ("size", "intermediates", "stride", "padding"),
    [
        ((20, 20), 3, 1, (1, 1)),
        ((19, 22), 3, 2, (1, 1)),
        ((20, 20), 3, 2, (0, 1)),  # of the VAE
        ((17, 23), 1, 1, (0, 0)),
        ((18, 20), 4, 3, (2, 0)),
        ((6, 7), 3, 1, (1, 1)),  # few pixels
        ((6, 7), 3, 1, (0, 0)),
    ],
)
def test_a_convolution_and_its_gradient_equal_torch(size, intermediates, stride, padding):
    x, kernel = RNG.standard_normal((3, *size, 5)), RNG.standard_normal((intermediates, intermediates, 5, 4))
    theirs, weight = torch.tensor(x).requires_grad_(), torch.tensor(kernel).requires_grad_()
    padded = torch.nn.functional.pad(theirs.permute(0, 3, 1, 2), (*padding, *padding))
    out = torch.nn.functional.conv2d(padded, weight.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)
    dy = RNG.standard_normal(out.shape)
    out.backward(torch.tensor(dy))
    y, pull = jax.vjp(
        lambda x, kernel: convolve(x, kernel, (stride, stride), (padding, padding), dimension_numbers=NHWC),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
    )
    by_x, by_kernel = pull(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(y, out.detach(), atol=2e-5)
    np.testing.assert_allclose(by_x, theirs.grad, atol=2e-5)
    np.testing.assert_allclose(by_kernel, weight.grad, atol=2e-4)


def test_a_convolution_in_groups_and_with_holes_equals_torch():
    x, kernel = RNG.standard_normal((3, 9, 8, 4)), RNG.standard_normal((3, 3, 2, 6))
    theirs, weight = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(kernel).permute(3, 2, 0, 1)
    out = torch.nn.functional.conv2d(theirs, weight, padding=2, dilation=2, groups=2).permute(0, 2, 3, 1)
    options = {"rhs_dilation": (2, 2), "feature_group_count": 2, "dimension_numbers": NHWC}
    y = convolve(jnp.asarray(x, "f4"), jnp.asarray(kernel, "f4"), (1, 1), ((2, 2), (2, 2)), **options)
    np.testing.assert_allclose(y, out, atol=2e-5)


def test_gradients_of_convolutions_have_the_order_of_axes_that_is_fast_in_loops():
    # Any other is 60 times as slow on a CPU inside of jax.lax.scan and jax.lax.cond.
    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NHWC) ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.ones((2, 32, 32, 3)), jnp.ones((3, 3, 3, 4)))
    orders = re.findall(r"stablehlo.convolution.*dim_numbers = (.*?), window", program.as_text())
    assert orders == ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"] * 3


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
