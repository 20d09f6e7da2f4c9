"""Low-rank adapters (LoRA; Hu et al., 2021) for the parameter trees of UNet, ControlNet and CLIP text encoder.

A layer with the weights W computes with W + scale · α/r · B A, where A ("down") leads to r channels and B ("up") back
(section 4.1). A LoRA is a plain tree that mirrors the model's, with ``{"down", "up", "alpha"}`` where an adapted layer
has its ``{"kernel", "bias"}``:

======  ======================  =====================
layer   down                    up
======  ======================  =====================
dense   ``[in, r]``             ``[r, out]``
conv    ``[kh, kw, in, r]``     ``[1, 1, r, out]``
======  ======================  =====================

``alpha`` is a float32 scalar, not a weight: its gradient is zero, and an optimizer's weight decay must skip it. A DoRA
file (Liu et al., 2024, equation 5) has a fourth array, ``magnitude`` m: with W' = W + scale · α/r · B A the layer
computes with m W' / ‖W'‖, where the norm is over the axes where m has one entry. Such layers can only be merged. Models
know nothing of LoRA; `apply_lora` adds the branch to their layers from outside.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from codi_jax.cli.messages import listed
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.kernels.devices import gathered
from codi_jax.models.names import torch_name

ModulePath = tuple[str, ...]
LoraLayer = dict[str, Any]
"""``{"down": kernel, "up": kernel, "alpha": scalar}`` of one layer, and ``"magnitude"`` for DoRA. Of other adapters
``"difference"``, what they add to the kernel, and ``"bias"``, what they add to the bias."""

_PARTS = {"down", "difference", "bias"}  # each of which makes a node a layer

LARGEST_RANK = 2**14
"""The largest rank of a trained LoRA: no layer of a known model is as wide."""

# The layers that LCM-LoRA adapts (Luo et al., 2023b), and the text encoders' attention, as in DreamBooth with LoRA.
DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip


def init_lora(
    key: Key[Array, ""],
    params: Params,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
) -> Params:
    """A LoRA that changes nothing yet: A is Kaiming-uniform as in PEFT, B is zero (Hu et al., 2021, section 4.1).

    Examples:
      >>> lora = init_lora(jax.random.key(0), params, rank=64)

    Args:
      key: for A.
      params: the model's parameters, or ``module.abstract_params()``.
      rank: r.
      alpha: α. Default: ``rank``, which makes the factor α/r one.
      target_modules: suffixes of layer names as in diffusers, such as ``"to_q"`` or ``"ff.net.0.proj"``. Default: those
        in `DEFAULT_TARGETS` that the model has.

    Returns:
      The LoRA, in float32.

    Raises:
      WeightsError: if a target matches no layer that has a kernel, or ``rank`` is not positive.
    """
    if rank < 1:
        raise WeightsError(f"rank = {rank} is not a valid LoRA rank: choose 1 or more.")
    kernels = _target_kernels(params, DEFAULT_TARGETS if target_modules is None else target_modules)
    if target_modules is not None and (unused := _unused(target_modules, kernels)):
        raise WeightsError(
            f"target_modules: {listed(unused)} match no dense or convolution layer of the model; write the ends of "
            "names as in diffusers, such as to_q or ff.net.0.proj."
        )
    if not kernels:
        raise WeightsError("None of the default target_modules is in the model: name the layers to adapt.")
    keys = jax.random.split(key, len(kernels))
    alpha = float(rank) if alpha is None else alpha
    return nested({path: _init_layer(k, kernels[path], rank, alpha) for k, path in zip(keys, kernels, strict=True)})


def apply_lora(
    module: nn.Module,
    params: Params,
    lora: Params,
    *args: Any,
    scale: float | Float[Array, ""] = 1.0,
    **kwargs: Any,
) -> Any:
    """``module.apply({"params": params}, *args, **kwargs)`` with the LoRA alongside its layers.

    W is neither changed nor copied, and the result is differentiable with respect to ``lora``.

    Args:
      module: UNet, ControlNet or text encoder.
      params: the module's parameters.
      lora: a LoRA for these parameters.
      *args: the call's arguments.
      scale: a factor for the entire LoRA.
      **kwargs: arguments of the call, or of ``apply``, such as ``method``.

    Returns:
      The result of ``module.apply``.

    Raises:
      WeightsError: if the LoRA is not for these parameters.
    """
    require_fit(params, lora)
    with nn.intercept_methods(lora_interceptor(lora, scale)):
        return module.apply({"params": params}, *args, **kwargs)


def lora_interceptor(lora: Params, scale: float | Float[Array, ""] = 1.0) -> Callable[..., Any]:
    """The interceptor behind `apply_lora`, for ``flax.linen.intercept_methods``.

    It adapts every module that runs in its context and has layers at these paths; unmatched entries have no effect.

    Raises:
      WeightsError: when a network with ``scan_layers`` runs in its context, or for DoRA.
    """
    layers = lora_layers(lora)
    if not are_plain(layers):
        raise WeightsError(
            "DoRA and LyCORIS cannot run alongside the layers of a model: merge them into the model's weights."
        )

    def intercept(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if getattr(module, "scan_layers", False):
            raise WeightsError("a LoRA finds layers by name, and scanned layers have no names: scan no layers.")
        out = next_call(*args, **kwargs)
        if not isinstance(module, nn.Dense | nn.Conv) or context.method_name != "__call__" or module.path not in layers:
            return out
        return out + _low_rank(module, layers[module.path], *args, scale=scale)

    return intercept


def adapted(lora: Params | None) -> AbstractContextManager[Any]:
    """A context where modules run with the LoRA, if any, alongside their layers, see `lora_interceptor`."""
    return nullcontext() if lora is None else nn.intercept_methods(lora_interceptor(lora))


def merge_lora(params: Params, lora: Params, scale: float | Float[Array, ""] = 1.0) -> Params:
    """The parameters with W + scale · α/r · B A (or its DoRA form) instead of W, stored in W's dtype.

    Examples:
      >>> params = merge_lora(params, lora, scale=0.7)

    Args:
      params: the model's parameters; left unchanged.
      lora: a LoRA for these parameters.
      scale: a factor for the entire LoRA.

    Returns:
      A new tree, which shares all arrays except the adapted kernels with ``params``.

    Raises:
      WeightsError: if the LoRA is not for these parameters.
    """
    require_fit(params, lora)
    flat: dict[ModulePath, Any] = flatten_dict(params, keep_empty_nodes=True)
    for path, layer in lora_layers(lora).items():
        kernel = flat[*path, "kernel"]
        flat[*path, "kernel"] = merged_kernel(kernel, layer, scale).astype(kernel.dtype)
        if "bias" in layer:
            bias = flat[*path, "bias"]
            flat[*path, "bias"] = (jnp.asarray(bias, jnp.float32) + scale * layer["bias"]).astype(bias.dtype)
    return unflatten_dict(flat)


def merged_kernel(
    kernel: Float[Array, "*window i o"], layer: LoraLayer, scale: float | Float[Array, ""] = 1.0
) -> Float[Array, "*window i o"]:
    """The kernel that a layer computes with when its LoRA is merged, in float32."""
    merged = jnp.asarray(kernel, jnp.float32) + layer_delta(layer, scale)
    magnitude = layer.get("magnitude")
    if magnitude is None:
        return merged
    axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
    return jnp.asarray(magnitude, jnp.float32) * merged / jnp.linalg.vector_norm(merged, axis=axes, keepdims=True)


def layer_delta(layer: LoraLayer, scale: float | Float[Array, ""] = 1.0) -> Float[Array, "*window i o"]:
    """Scale · α/r · B A of one layer, or what else it adds, in the layout of its kernel, computed in float32."""
    if "down" not in layer:
        return scale * jnp.asarray(layer.get("difference", 0), jnp.float32)
    product = jnp.einsum(
        "...r,ro->...o",
        jnp.asarray(layer["down"], jnp.float32),
        jnp.asarray(_matrix(layer["up"]), jnp.float32),
        precision="highest",
    )
    return _factor(layer, scale) * product


def require_fit(params: Params, lora: Params, where: str = "The LoRA") -> None:
    """Checks that every layer of a LoRA adapts a layer of the model.

    Args:
      params: the model's parameters, or their shapes.
      lora: the LoRA to check.
      where: the LoRA's file, for messages.

    Raises:
      WeightsError: naming the layers that do not fit, with the shapes of both sides.
    """
    kernels, problems = kernels_of(params), []
    for path, layer in lora_layers(lora).items():
        kernel, name = kernels.get(path), module_name(path)
        if kernel is None:
            problems.append(f"{name} is not a layer with a kernel")
        elif "down" not in layer:
            shape = layer.get("difference", kernel).shape
            if shape != kernel.shape:
                problems.append(f"{name} has a difference {list(shape)} for a kernel {list(kernel.shape)}")
        elif not _fits(kernel.shape, layer["down"].shape, layer["up"].shape):
            down, up, shape = (list(x.shape) for x in (layer["down"], layer["up"], kernel))
            problems.append(f"{name} has down {down} and up {up} for a kernel {shape}")
    if problems:
        raise WeightsError(
            f"{where} does not fit the model: {listed(problems)}. It was made for another model, perhaps of another "
            "family (text features are 768 wide in SD 1.x, 1024 in SD 2.x and 2048 in SDXL): use it with that one."
        )


def are_plain(layers: Mapping[ModulePath, LoraLayer]) -> bool:
    """Whether all layers are plain LoRA: neither DoRA nor another adapter, which can only be merged."""
    return not any(layer.keys() & {"magnitude", "difference", "bias"} for layer in layers.values())


def lora_layers(lora: Params) -> dict[ModulePath, LoraLayer]:
    """The adapted layers by their path in the model."""
    layers: Any = flatten_dict(lora, is_leaf=lambda _, node: bool(_PARTS & node.keys()))
    return layers


def nested(layers: dict[ModulePath, LoraLayer]) -> Params:
    """The LoRA with these layers; inverse of `lora_layers`."""
    return unflatten_dict(layers)


def module_name(path: ModulePath) -> str:
    """The name of a layer in diffusers: ``("attn1", "to_out_0")`` -> ``attn1.to_out.0``."""
    return torch_name((*path, "kernel")).removesuffix(".weight")


def kernels_of(params: Params) -> dict[ModulePath, Any]:
    """The kernel of every dense and convolution layer, by the layer's path."""
    return {path[:-1]: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}


def _target_kernels(params: Params, targets: Sequence[str]) -> dict[ModulePath, Any]:
    ends = tuple(f".{target}" for target in targets)
    return {path: kernel for path, kernel in kernels_of(params).items() if f".{module_name(path)}".endswith(ends)}


def _unused(targets: Sequence[str], kernels: dict[ModulePath, Any]) -> list[str]:
    names = [f".{module_name(path)}" for path in kernels]
    return [target for target in targets if not any(name.endswith(f".{target}") for name in names)]


def _init_layer(key: Key[Array, ""], kernel: Any, rank: int, alpha: float) -> LoraLayer:
    *window, _, features = kernel.shape
    # Bounds of ±1/√fan_in: torch's kaiming_uniform_(a=√5), as in PEFT.
    kaiming = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {
        "down": kaiming(key, (*kernel.shape[:-1], rank), jnp.float32),
        "up": jnp.zeros((*(1 for _ in window), rank, features), jnp.float32),
        "alpha": jnp.asarray(alpha, jnp.float32),
    }


def _low_rank(
    layer: nn.Dense | nn.Conv, lora: LoraLayer, x: Float[Array, "*b c"], scale: float | Float[Array, ""]
) -> Float[Array, "*b2 d"]:
    rank = lora["down"].shape[-1]
    # The layer itself with r outputs: stride, padding, dtype and the convolution's implementation are as in the layer.
    down = layer.clone(parent=None, features=rank, use_bias=False)
    hidden: Any = down.apply({"params": {"kernel": lora["down"]}}, x)
    hidden = (_factor(lora, scale) * hidden).astype(hidden.dtype)
    return hidden @ gathered(_matrix(lora["up"]).astype(hidden.dtype))


def _factor(layer: LoraLayer, scale: float | Float[Array, ""]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(jnp.asarray(layer["alpha"], jnp.float32)) * scale / layer["down"].shape[-1]


def _matrix(up: Float[Array, "*window r d"]) -> Float[Array, "r d"]:
    return up.reshape(up.shape[-2:])


def _fits(kernel: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    rank = down[-1]
    return down == (*kernel[:-1], rank) and up == (*(1 for _ in kernel[:-2]), rank, kernel[-1])
