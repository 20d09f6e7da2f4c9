"""Scaled dot-product attention, and the choice of the kernel that computes it.

Every attention layer of the package calls `dot_product_attention`; no other file knows about kernels.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from codi_jax.models.kernels import devices
from codi_jax.models.kernels.linear_map import linear_map

Implementation = Literal["auto", "xla", "chunked", "cudnn", "pallas"]

# Below this many keys the scores are small (77 text tokens: 1/50 of a 64 x 64 self-attention), and
# a fused kernel has nothing to save.
_MIN_FLASH_KEYS = 256
# Number of scores per batch beyond which the plain formula would fill an accelerator's memory (1 GiB in float32), as
# for the VAE at 1024 pixels.
_MAX_SCORES = 2**28
# Queries in a chunk: 512 x 4096 float32 scores stay in a CPU's cache.
_CHUNK = 512
# The Pallas kernel processes the sequence in blocks, the larger the faster: 4096 tokens by 512, 2304 (768 pixels) by
# 384.
_PALLAS_BLOCKS = (512, 384, 256)
_LANES = 128  # a TPU register's last dimension


def dot_product_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s n h"],
    value: Float[Array, "b s n h"],
    *,
    implementation: Implementation = "auto",
    is_causal: bool = False,
) -> Float[Array, "b t n h"]:
    """Multi-head attention, softmax(q kᵀ / √h) v, with the softmax in float32 (Vaswani et al., 2017, equation 1).

    Args:
      query: queries; b batch, t positions, n heads, h features per head.
      key: keys; s positions.
      value: values.
      implementation: ``"cudnn"`` is the flash kernel of cuDNN (NVIDIA, 16-bit), ``"pallas"`` the flash kernel for TPU,
        ``"xla"`` the plain formula, ``"chunked"`` the same for one head and a few hundred queries at a time, ``"auto"``
        the best of them for the device, the dtype and the shapes.
      is_causal: whether position i sees only positions up to i (CLIP's text encoders).

    Returns:
      The attended values, in the dtype of ``query``.
    """
    if implementation == "auto":
        implementation = choose_implementation(devices.backend(), query.dtype, query.shape, key.shape)
    match implementation:
        case "pallas" | "cudnn":
            return _flash(query, key, value, implementation, is_causal)
        case "chunked":
            return _chunked_attention(query, key, value, is_causal)
        case _ if devices.backend() == "cpu" and not is_causal:
            return _keys_first_attention(query, key, value)
        case _ if devices.backend() == "cpu" and query.dtype == jnp.float16:
            # JAX's own formula requests an algorithm, float16 with sums in float32, that XLA lacks on CPUs.
            return _chunked_attention(query, key, value, is_causal)
        case _:
            return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="xla")


def choose_implementation(
    platform: str, dtype: jnp.dtype, query_shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> Implementation:
    """The kernel that ``"auto"`` stands for.

    Args:
      platform: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``.
      dtype: the queries' dtype.
      query_shape: ``[b, t, n, h]``.
      key_shape: ``[b, s, n, h]``.

    Returns:
      ``"xla"``, ``"chunked"``, ``"cudnn"`` or ``"pallas"``.
    """
    (_, t, _, head_dim), s = query_shape, key_shape[1]
    if s < _MIN_FLASH_KEYS:
        return "xla"
    # cuDNN takes heads of up to 128 features everywhere, of up to 256 only on Hopper and later. SD 1.x has 160 where
    # there are at most 256 tokens, so that nothing is lost by staying with what works on every card.
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    # The kernel's blocks must divide both sequences; other shapes go to XLA.
    if platform == "tpu" and _pallas_block(t) and _pallas_block(s):
        return "pallas"
    # On a CPU the plain formula writes all scores to memory and reads them three times: 3 x slower at 4096 tokens.
    return "chunked" if platform == "cpu" or _num_scores(query_shape, key_shape) > _MAX_SCORES else "xla"


def _num_scores(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> int:
    b, t, n, _ = query_shape
    return b * n * t * key_shape[1]


def _keys_first_attention(
    query: Float[Array, "b t n h"], key: Float[Array, "b s n h"], value: Float[Array, "b s n h"]
) -> Float[Array, "b t n h"]:
    """The plain formula for CPUs: the softmax runs over the second-to-last axis, so that vector registers hold queries.

    It divides by the sums after the product, which has fewer elements: this saves a third of the backward pass's time.
    """
    scores = jnp.einsum("btnh,bsnh->bnst", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=2, keepdims=True)))
    out = jnp.einsum("bnst,bsnh->btnh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=2).swapaxes(1, 2)[..., None]).astype(query.dtype)


def _chunked_attention(
    query: Float[Array, "b t n h"], key: Float[Array, "b s n h"], value: Float[Array, "b s n h"], is_causal: bool
) -> Float[Array, "b t n h"]:
    b, t, n, h = query.shape
    s = key.shape[1]
    chunk = max(size for size in range(1, min(t, _CHUNK) + 1) if t % size == 0)
    # The loops run over heads and chunks, never over the batch: that may be spread over devices.
    queries = (query * h**-0.5).reshape(b, t // chunk, chunk, n, h).transpose(3, 1, 0, 2, 4)
    keys = key.transpose(2, 0, 3, 1)
    values = value.transpose(2, 0, 1, 3)

    @jax.checkpoint  # otherwise the backward pass would keep all the scores
    def attend(q: Array, k: Array, v: Array, first: Array) -> Array:
        scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)  # [b, chunk, s]
        if is_causal:
            positions = first + jnp.arange(chunk)[:, None]
            scores = jnp.where((jnp.arange(s)[None, :] <= positions)[None], scores, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        return jax.lax.map(lambda x: attend(x[0], k, v, x[1]), (q, jnp.arange(0, t, chunk)))

    out = jax.lax.map(head, (queries, keys, values))  # [n, t // chunk, b, chunk, h]
    return out.transpose(2, 1, 3, 0, 4).reshape(b, t, n, h)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _flash(query: Array, key: Array, value: Array, kernel: Implementation, is_causal: bool) -> Array:
    """A flash kernel with its own backward pass in reverse mode, and the plain formula's tangents in forward mode.

    The kernels have no forward mode. Each mode's program keeps only what it uses of the kernel and the formula.
    """
    return _flash_kernel(query, key, value, kernel, is_causal)


@_flash.defjvp
def _flash_derivative(kernel: Implementation, is_causal: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (out, *_), (dout, *_) = jax.jvp(lambda q, k, v: _flash_and_saved(q, k, v, kernel, is_causal), primals, tangents)
    return out, dout


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _flash_and_saved(
    query: Array, key: Array, value: Array, kernel: Implementation, is_causal: bool
) -> tuple[Array, ...]:
    """The attended values, and the residuals that the kernel saves for its backward pass."""
    out, backward = _flash_vjp(query, key, value, kernel, is_causal)
    return out, *jax.tree.leaves(backward)


@_flash_and_saved.defjvp
def _flash_and_saved_derivative(kernel: Implementation, is_causal: bool, primals: Any, tangents: Any) -> Any:
    """The residuals count as constant: second derivatives come from the formula, which does not use them."""
    query, key, value = primals
    out, *saved = _flash_and_saved(query, key, value, kernel, is_causal)
    (dout,) = linear_map(_formula_tangent, _flash_backward, (*primals, *saved), tangents, kernel, is_causal)
    return (out, *saved), (dout, *map(zero_from_primal, saved))


def _formula_tangent(
    residuals: tuple[Array, ...], tangents: tuple[Array, ...], _: Implementation, is_causal: bool
) -> tuple[Array]:
    query, key, value, *_saved = residuals
    plain = "chunked" if _num_scores(query.shape, key.shape) > _MAX_SCORES else "xla"
    attend = functools.partial(dot_product_attention, implementation=plain, is_causal=is_causal)
    return (jax.jvp(attend, (query, key, value), tangents)[1],)


def _flash_backward(
    residuals: tuple[Array, ...], dout: tuple[Array], kernel: Implementation, is_causal: bool
) -> tuple[Array, ...]:
    query, key, value, *saved = residuals
    # Traced again only for the structure of the backward pass, which cannot be passed along with its arrays.
    _, backward = jax.eval_shape(lambda q, k, v: _flash_vjp(q, k, v, kernel, is_causal), query, key, value)
    return jax.tree.unflatten(jax.tree.structure(backward), saved)(*dout)


def _flash_vjp(
    query: Array, key: Array, value: Array, kernel: Implementation, is_causal: bool
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    return jax.vjp(lambda q, k, v: _flash_kernel(q, k, v, kernel, is_causal), query, key, value)


def _flash_kernel(query: Array, key: Array, value: Array, kernel: Implementation, is_causal: bool) -> Array:
    if kernel == "pallas":
        return _on_each_device(functools.partial(_pallas_attention, is_causal=is_causal), query, key, value)
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="cudnn")


def _on_each_device(
    attention: Callable[..., Array], query: Float[Array, "b t n h"], key: Array, value: Array
) -> Float[Array, "b t n h"]:
    """Runs the kernel on each device's part of the batch: XLA cannot split custom kernels.

    The devices are from the mesh in whose context (`jax.set_mesh`) the program is traced.
    """
    if (mesh := devices.mesh()) is None:
        return attention(query, key, value)
    # A batch that they cannot divide, as in generation, is computed by all of them.
    spec = P(mesh.axis_names) if query.shape[0] % mesh.size == 0 else P()
    # The kernel does not declare how its result varies over the devices, which the check would need.
    on_part = jax.shard_map(attention, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return on_part(query, key, value)


def _pallas_attention(
    query: Float[Array, "b t n h"], key: Float[Array, "b s n h"], value: Float[Array, "b s n h"], is_causal: bool
) -> Float[Array, "b t n h"]:
    # Imported here: the module registers TPU lowerings, which CPU and GPU users do not need.
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    head_dim = query.shape[-1]
    t, s = query.shape[1], key.shape[1]
    padding = -head_dim % _LANES

    def to_kernel(x: Array) -> Array:
        # Zero features add nothing to q·k, and the resulting zero columns in the output are cut off below.
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, padding)))

    block_q, block_k = _pallas_block(t) or t, _pallas_block(s) or s
    blocks = flash.BlockSizes(
        block_q=block_q,
        block_k_major=block_k,
        block_k=block_k,
        block_b=1,
        block_q_major_dkv=block_q,
        block_k_major_dkv=block_k,
        block_k_dkv=block_k,
        block_q_dkv=block_q,
        block_k_major_dq=block_k,
        block_k_dq=block_k,
        block_q_dq=block_q,
    )
    out = flash.flash_attention(
        to_kernel(query),
        to_kernel(key),
        to_kernel(value),
        causal=is_causal,
        sm_scale=head_dim**-0.5,
        block_sizes=blocks,
    )
    return out[..., :head_dim].transpose(0, 2, 1, 3)


def _pallas_block(length: int) -> int | None:
    """The largest block that divides a sequence; none if it is so short that the kernel has nothing to save."""
    fitting = (block for block in _PALLAS_BLOCKS if length % block == 0)
    return next(fitting, None) if length >= max(_PALLAS_BLOCKS) else None
