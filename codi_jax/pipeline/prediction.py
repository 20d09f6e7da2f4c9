"""The networks' prediction at z_t: the only place where UNet, ControlNet, LoRA and guidance meet.

Every loss and every sampler calls `predict`.
"""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codi_jax.diffusion.guidance import Guidance, stack_branches
from codi_jax.diffusion.schedule import Latents
from codi_jax.models.lora import adapted
from codi_jax.models.prompt_to_prompt import shared_attention
from codi_jax.pipeline.conditions import Condition, Conditions
from codi_jax.pipeline.networks import Networks

Times = Int[Array, " b"] | Float[Array, " b"]


def predict(
    networks: Networks,
    params: Mapping[str, Any],
    z: Latents,
    t: Times,
    conditions: Conditions,
    guidance: Guidance | None = None,
) -> Latents:
    """The UNet's raw output, guided; evaluates the network once, on the stacked branches of the guidance.

    Guiding x̂ or ε̂ would give the same result: they are linear in the output, and the weights sum to one.

    Examples:
      >>> eps = predict(networks, params, z, t, conditions, Guidance.classifier_free(7.5))

    Args:
      networks: the model's networks.
      params: ``unet``, and ``controlnet`` if the ControlNet takes part; ``unet_lora`` adapts only the UNet. Others are
        ignored.
      z: noisy latents.
      t: one time per sample.
      conditions: the samples' conditions; with the null condition if guidance needs it.
      guidance: the guidance. Default: `Guidance.none`.

    Returns:
      The prediction, float32.

    Raises:
      ValueError: if there is a ControlNet but no condition image, or guidance but no null text.
    """
    guidance = Guidance.none() if guidance is None else guidance
    count = len(guidance.branches)
    stacked = stack_branches(*((z, t, conditions.of(branch)) for branch in guidance.branches))
    sharing = _sharing(conditions, t, count)
    prediction, _ = _evaluate(networks, params, *stacked, guidance, conditions.control_scale, sharing)
    return guidance.combine(prediction)


def predict_with_intermediates(
    networks: Networks, params: Mapping[str, Any], z: Latents, t: Times, condition: Condition
) -> tuple[Latents, dict[str, Array]]:
    """Like `predict`, without guidance, but also returns the outputs of the UNet's blocks by name, for features.

    Args:
      networks: the model's networks.
      params: as in `predict`.
      z: noisy latents.
      t: one time per sample.
      condition: one condition per sample.
    """
    return _evaluate(networks, params, z, t, condition, Guidance.none())


def _evaluate(
    networks: Networks,
    params: Mapping[str, Any],
    z: Latents,
    t: Times,
    condition: Condition,
    guidance: Guidance,
    control_scale: Array | None = None,
    sharing: AbstractContextManager[Any] | None = None,
) -> tuple[Latents, dict[str, Array]]:
    residuals = _control_residuals(networks, params, z, t, condition, control_scale)
    if condition.image is not None:
        z = jnp.concatenate([z, condition.image.astype(z.dtype)], axis=-1)
    config = networks.unet.config
    embedding = guidance.embedding(len(z), config.time_cond_proj_dim or 0, config.embeds_image_guidance)
    with adapted(params.get("unet_lora")), sharing or contextlib.nullcontext():
        prediction, intermediates = networks.unet.apply(
            {"params": params["unet"]}, z, t, condition.context, embedding, condition.added_cond, *residuals
        )
    return prediction.astype(jnp.float32), intermediates


def _control_residuals(
    networks: Networks,
    params: Mapping[str, Any],
    z: Latents,
    t: Times,
    condition: Condition,
    scale: Array | None,
) -> tuple[tuple[Array, ...] | None, Array | None]:
    """The ControlNet's residuals for the UNet's features; ``None`` twice if ``params`` has no ``controlnet``.

    Raises:
      ValueError: if there is a ControlNet but no condition image.
    """
    if "controlnet" not in params:
        return None, None
    if condition.control is None:
        raise ValueError(
            "A ControlNet needs condition images (conditioning), and the data has none: name their column with "
            "--conditioning_image_column."
        )
    return networks.controlnet.apply(
        {"params": params["controlnet"]},
        z,
        t,
        condition.context,
        condition.control,
        *(() if scale is None else (scale,)),
        added_cond=condition.added_cond,
    )


def _sharing(conditions: Conditions, t: Times, branches: int) -> AbstractContextManager[Any] | None:
    if conditions.shared_until is None:
        return None
    return shared_attention(t[0] > conditions.shared_until, branches)
