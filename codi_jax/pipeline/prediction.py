"""What the networks put out at z_t: UNet and ControlNet together, guided or not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codi_jax.diffusion.sampling import (
    classifier_free_guidance,
    instruct_pix2pix_guidance,
    split_branches,
    stack_branches,
)
from codi_jax.diffusion.schedule import Latents
from codi_jax.models.lora import adapted
from codi_jax.pipeline.conditions import Condition, Inputs, Modules

Features = tuple[Any, ...]
"""What the UNet's encoder leaves for its decoder, see `encode`."""


def predict(
    modules: Modules,
    params: Mapping[str, Any],
    z: Latents,
    t: Int[Array, " b"],
    condition: Condition,
    features: Features | None = None,
) -> Latents:
    """The raw output of the UNet, float32: that of `predict_with_taps`, which says what it takes and raises."""
    return predict_with_taps(modules, params, z, t, condition, features)[0]


def predict_with_taps(
    modules: Modules,
    params: Mapping[str, Any],
    z: Latents,
    t: Int[Array, " b"],
    condition: Condition,
    features: Features | None = None,
) -> tuple[Latents, dict[str, Array]]:
    """The raw output of the UNet, with the ControlNet's residuals if there are parameters of one.

    Args:
      modules: of the networks.
      params: ``unet``, and ``controlnet``; ``unet_lora`` adapts the UNet alone. Others are left alone.
      z: noisy latents.
      t: one time for each.
      condition: one for each.
      features: of `encode` for the same UNet and inputs, to save computing them.

    Returns:
      The prediction, float32, and the outputs of the UNet's blocks by name.

    Raises:
      ValueError: if there is a ControlNet and no condition image.
    """
    if features is None:
        features = encode(modules, params, z, t, condition)
    residuals = _control_residuals(modules, params, z, t, condition)
    with adapted(params.get("unet_lora")):
        prediction, taps = modules.unet.apply({"params": params["unet"]}, *features, *residuals, method="decode")
    return prediction.astype(jnp.float32), taps


def guided(
    modules: Modules,
    params: Mapping[str, Any],
    z: Latents,
    t: Int[Array, " b"],
    inputs: Inputs,
    guidance_scale: Float[Array, " b"] | None = None,
    features: Features | None = None,
    *,
    image_guidance_scale: Float[Array, " b"] | None = None,
) -> Latents:
    """The raw output, led away from the null condition by a guidance scale of each sample; ``None`` is not guided.

    To guide x̂ or ε̂ would be the same: they are linear in the output, and the weights add up to one.

    Args:
      modules: of the networks.
      params: ``unet``, and ``controlnet``. Others are left alone.
      z: noisy latents.
      t: one time for each.
      inputs: the condition, and the null condition.
      guidance_scale: of `classifier_free_guidance`.
      features: of `encode`, for the condition or for the stack ``[null, cond]``, of which what is needed is taken.
      image_guidance_scale: of an edit's image apart, for which there is a third pass, see `instruct_pix2pix_guidance`;
        ``None`` leads away from text and image together.

    Returns:
      The prediction, float32.

    Raises:
      ValueError: if there is a ControlNet and no condition image, or guidance and no null text.
    """
    if guidance_scale is not None and image_guidance_scale is not None:
        given = (inputs.null, inputs.image_only, inputs.cond)
        stacked = stack_branches(*((z, t, _required(condition)) for condition in given))
        uncond, image_only, full = split_branches(predict(modules, params, *stacked), 3)
        return instruct_pix2pix_guidance(uncond, image_only, full, guidance_scale, image_guidance_scale)
    is_guided = guidance_scale is not None
    z, t, condition = branches(z, t, inputs, is_guided)
    if features is not None:
        features = jax.tree.map(lambda x: x[-len(z) :], features)  # the condition is the last branch
    prediction = predict(modules, params, z, t, condition, features)
    if guidance_scale is None:
        return prediction
    uncond, cond = split_branches(prediction, 2)
    return classifier_free_guidance(uncond, cond, guidance_scale)


def branches(
    z: Latents, t: Int[Array, " b"], inputs: Inputs, is_guided: bool
) -> tuple[Float[Array, "n h w c"], Int[Array, " n"], Condition]:
    """The inputs of the network: as they are, or the stack ``[null, cond]`` of all of them for guidance.

    Raises:
      ValueError: if there is no null text to guide with.
    """
    if not is_guided:
        return z, t, inputs.cond
    return stack_branches((z, t, _required(inputs.null)), (z, t, inputs.cond))


def _required(condition: Condition | None) -> Condition:
    if condition is None:
        raise ValueError("Guidance needs the null text: give null_context among what is frozen.")
    return condition


def encode(
    modules: Modules, params: Mapping[str, Any], z: Latents, t: Int[Array, " b"], condition: Condition
) -> Features:
    """The first half of the UNet, which no ControlNet changes: its residuals enter the second half only.

    So predictions by one UNet at the same z_t share it, with whatever ControlNets: give it to `predict`.

    Args:
      modules: of the networks.
      params: ``unet``, and ``unet_lora`` if there is one.
      z: noisy latents.
      t: one time for each.
      condition: one for each; the latents of its image are put beside the noisy ones.

    Returns:
      The lowest features, the skip connections, the taps so far, the embedding of the time, and the text features.
    """
    with adapted(params.get("unet_lora")):
        return modules.unet.apply({"params": params["unet"]}, z, t, condition, method=_encode)


def _encode(unet: Any, z: Latents, t: Array, condition: Condition) -> Features:
    if condition.image is not None:
        z = jnp.concatenate([z, condition.image.astype(z.dtype)], axis=-1)
    unet.check_inputs(z, condition.context)
    context = condition.context.astype(unet.dtype)
    temb = unet.embed_time(t, condition.guidance, condition.added_cond)
    return *unet.encode(unet.conv_in(z.astype(unet.dtype)), temb, context), temb, context


def _control_residuals(
    modules: Modules, params: Mapping[str, Any], z: Latents, t: Int[Array, " b"], condition: Condition
) -> tuple[tuple[Array, ...] | None, Array | None]:
    """What the ControlNet adds to the UNet's features; ``None`` twice if ``params`` has no ``controlnet``.

    Raises:
      ValueError: if there is a ControlNet and no condition image.
    """
    if "controlnet" not in params:
        return None, None
    if condition.control is None:
        raise ValueError(
            "A ControlNet needs condition images, and the data has none: name their column with "
            "--conditioning_image_column."
        )
    return modules.controlnet.apply(
        {"params": params["controlnet"]},
        z,
        t,
        condition.context,
        condition.control,
        added_cond=condition.added_cond,
    )
