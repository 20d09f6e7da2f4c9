"""Attention kernels against PyTorch's scaled_dot_product_attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from oracle import assert_close

from codi_jax.models import layers
from codi_jax.models.kernels import attention


def qkv(t: int, s: int, heads: int, dim: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, n, heads, dim)), jnp.float32) for n in (t, s, s))


def reference(query: jax.Array, key: jax.Array, value: jax.Array, is_causal: bool = False) -> np.ndarray:
    q, k, v = (torch.from_numpy(np.array(x)).transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).numpy()


@pytest.mark.parametrize("implementation", ["auto", "xla", "chunked"])
@pytest.mark.parametrize("shape", [(600, 600, 2, 40), (512, 77, 3, 16), (7, 300, 1, 8)])
def test_kernels_equal_pytorch(implementation: attention.Implementation, shape: tuple[int, int, int, int]) -> None:
    arrays = qkv(*shape)
    out = jax.jit(lambda *x: attention.dot_product_attention(*x, implementation=implementation))(*arrays)
    assert_close(out, reference(*arrays), 1e-5)


@pytest.mark.parametrize("implementation", ["auto", "xla", "chunked"])
def test_causal_attention_equals_pytorch(implementation: attention.Implementation) -> None:
    arrays = qkv(300, 300, 2, 16)
    out = attention.dot_product_attention(*arrays, implementation=implementation, is_causal=True)
    assert_close(out, reference(*arrays, is_causal=True), 1e-5)


@pytest.mark.parametrize("implementation", ["auto", "xla", "chunked"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tokens", [77, 300])
def test_float16_on_a_cpu_equals_pytorch(
    implementation: attention.Implementation, is_causal: bool, tokens: int
) -> None:
    arrays = tuple(x.astype(jnp.float16) for x in qkv(tokens, tokens, 2, 16))
    compute = functools.partial(attention.dot_product_attention, implementation=implementation, is_causal=is_causal)
    out = jax.jit(compute)(*arrays)  # outside of a compiled program, JAX has what XLA has not
    assert out.dtype == jnp.float16
    wanted = reference(*(x.astype(jnp.float32) for x in arrays), is_causal=is_causal)
    assert_close(out.astype(jnp.float32), wanted, 2e-3)  # 11 bits of mantissa

    def loss(q: jax.Array) -> jax.Array:
        return compute(q, *arrays[1:]).astype(jnp.float32).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(arrays[0])).all()


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_gradients_equal_those_of_pytorch(implementation: attention.Implementation) -> None:
    arrays = qkv(384, 300, 2, 16)

    def loss(*x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention.dot_product_attention(*x, implementation=implementation)))

    tensors = [torch.from_numpy(np.array(x)).transpose(1, 2).requires_grad_() for x in arrays]
    torch.nn.functional.scaled_dot_product_attention(*tensors).sin().sum().backward()
    for ours, tensor in zip(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays), tensors, strict=True):
        assert tensor.grad is not None
        assert_close(ours, tensor.grad.transpose(1, 2).numpy(), 1e-4)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_softmax_of_bfloat16_is_float32(implementation: attention.Implementation) -> None:
    """A sum of many small weights would stop growing in bfloat16."""
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv(8, 1000, 2, 16))
    out = attention.dot_product_attention(query, key, value, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    wanted = reference(query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32))
    assert_close(out.astype(jnp.float32), wanted, 2e-2)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_scores_of_large_magnitude_do_not_overflow(implementation: attention.Implementation) -> None:
    query, key, value = qkv(300, 300, 1, 16)
    out = attention.dot_product_attention(100 * query, 100 * key, value, implementation=implementation)
    assert_close(out, reference(100 * query, 100 * key, value), 1e-4)


@pytest.mark.parametrize(("tokens", "keys"), [(512, 1024), (768, 1280), (300, 300)])
def test_pallas_kernel_equals_pytorch(tokens: int, keys: int) -> None:
    """Interpreted: the same kernel that a TPU would compile, with heads narrower than its 128 lanes."""
    arrays = qkv(tokens, keys, 1, 40)
    with pltpu.force_tpu_interpret_mode():
        out = attention.dot_product_attention(*arrays, implementation="pallas")
    assert_close(out, reference(*arrays), 1e-4)


@pytest.mark.parametrize(
    ("backend", "dtype", "tokens", "keys", "dim", "kernel"),
    [
        ("gpu", jnp.bfloat16, 4096, 4096, 40, "cudnn"),
        ("gpu", jnp.bfloat16, 4096, 77, 40, "xla"),  # text: nothing to save
        ("gpu", jnp.float32, 4096, 4096, 40, "xla"),  # cuDNN's kernel is for 16 bits
        ("gpu", jnp.float32, 16384, 16384, 512, "chunked"),  # the VAE at 1024 px: the scores would take gigabytes
        ("gpu", jnp.bfloat16, 256, 256, 160, "xla"),  # heads too wide for cards before Hopper
        ("tpu", jnp.bfloat16, 4096, 4096, 40, "pallas"),
        ("tpu", jnp.bfloat16, 2304, 2304, 64, "pallas"),  # SDXL and SD 2.x at 768 px
        ("tpu", jnp.bfloat16, 6400, 6400, 40, "pallas"),  # SD 1.x at 640 px
        ("tpu", jnp.bfloat16, 576, 576, 64, "xla"),  # blocks do not divide the sequence
        ("tpu", jnp.bfloat16, 256, 256, 160, "xla"),
        ("cpu", jnp.float32, 4096, 4096, 40, "chunked"),
        ("cpu", jnp.float32, 64, 64, 40, "xla"),
    ],
)
def test_auto_chooses(backend: str, dtype: jnp.dtype, tokens: int, keys: int, dim: int, kernel: str) -> None:
    heads = 1 if dim == 512 else 8
    shapes = (2, tokens, heads, dim), (2, keys, heads, dim)
    assert attention.choose_implementation(backend, jnp.dtype(dtype), *shapes) == kernel


@pytest.mark.parametrize(("size", "stride", "kernel"), [(4, 1, 3), (16, 1, 3), (32, 1, 3), (8, 2, 3), (8, 1, 1)])
def test_convolution_by_patches_equals_pytorch(size: int, stride: int, kernel: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, size, size, 6), dtype=np.float32)
    weight = rng.standard_normal((64, 6, kernel, kernel), dtype=np.float32)
    module = layers.conv(64, kernel, stride=stride, dtype=jnp.float32)
    params = {"kernel": jnp.asarray(weight.transpose(2, 3, 1, 0)), "bias": jnp.zeros(64)}
    wanted = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight), stride=stride, padding=kernel // 2
    )
    assert_close(module.apply({"params": params}, jnp.asarray(x)), wanted.permute(0, 2, 3, 1), 1e-5)


def of_tangents(attend, *arrays: jax.Array) -> jax.Array:
    """A loss that contains a derivative."""
    out, tangent = jax.jvp(attend, arrays, tuple(map(jnp.ones_like, arrays)))
    return jnp.sum(jnp.sin(out) * tangent)


def test_pallas_kernel_is_differentiable_forward_and_backward() -> None:
    """In forward mode by the formula, in reverse mode by the kernel's own backward pass, in any order."""
    arrays = qkv(512, 512, 1, 16)
    ours, plain = (
        functools.partial(attention.dot_product_attention, implementation=kernel) for kernel in ("pallas", "xla")
    )
    losses = [functools.partial(lambda f, *x: jnp.sum(jnp.sin(f(*x))), f) for f in (ours, plain)]
    gradients = [lambda *x, f=f: jax.grad(f, argnums=(0, 1, 2))(*x) for f in losses]
    nested = [jax.grad(functools.partial(of_tangents, f)) for f in (ours, plain)]
    # Not compiled: an interpreted kernel has effects, which only a kernel that is called directly may have.
    with pltpu.force_tpu_interpret_mode():
        found = jax.jvp(ours, arrays, arrays), gradients[0](*arrays), nested[0](*arrays)
    wanted = jax.jvp(plain, arrays, arrays), gradients[1](*arrays), nested[1](*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 1e-5)


def test_cudnn_kernel_is_differentiable_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU can tell: the program in which each kernel is called once."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91900)
    arrays = tuple(x.astype(jnp.bfloat16) for x in qkv(512, 512, 2, 64))
    attend = functools.partial(attention.dot_product_attention, implementation="cudnn")

    def kernels(function) -> list[str]:
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
        return re.findall(r"@__cudnn\$(\w+)", lowered.as_text())

    assert kernels(attend) == ["fmhaSoftmax"]
    assert kernels(lambda *x: jax.jvp(attend, x, x)) == ["fmhaSoftmax"]
    assert kernels(jax.grad(lambda *x: attend(*x).sum())) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert kernels(jax.grad(functools.partial(of_tangents, attend))) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
