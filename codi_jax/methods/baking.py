"""Baked-in guidance: turns a student that takes guidance as an input into one for a single guidance scale.

Unlike LCM, its neighbor, this trains nothing: it is arithmetic on two layers' weights.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from codi_jax.diffusion.guidance import guidance_embedding
from codi_jax.models.config import Params


def bake_guidance(
    unet: Any, params: Params, guidance_scale: float | int, image_guidance_scale: float | int | None = None
) -> tuple[Any, Params]:
    """The student for one guidance scale, without the guidance input, which stock diffusers pipelines sample correctly.

    Exactly the same function: the projection is linear and enters before ``linear_1``, so for a fixed w it raises that
    layer's bias by W₁ · cond_proj(embedding of w).

    Examples:
      >>> unet, params = bake_guidance(unet, params, guidance_scale=7.5)

    Args:
      unet: the student's module.
      params: the student's parameters.
      guidance_scale: the text's scale, w + 1.
      image_guidance_scale: the image's scale, for a student that takes it.

    Returns:
      The module without ``time_cond_proj_dim``, and its parameters; ``linear_1``'s bias keeps its dtype.

    Raises:
      ValueError: if the UNet takes no guidance, or if image guidance is missing, or given to a student that takes none.
    """
    config = unet.config
    if config.time_cond_proj_dim is None:
        raise ValueError("there is no guidance to bake in: the UNet takes none (it has no time_cond_proj_dim).")
    if config.embeds_image_guidance != (image_guidance_scale is not None):
        takes = "takes" if config.embeds_image_guidance else "takes no"
        raise ValueError(f"this student {takes} image guidance: give its scale if, and only if, it does.")
    w = jnp.asarray([guidance_scale - 1], jnp.float32)
    w_image = None if image_guidance_scale is None else jnp.asarray([image_guidance_scale - 1], jnp.float32)
    embedding = np.asarray(guidance_embedding(w, config.time_cond_proj_dim, w_image), np.float64)[0]
    layers = dict(params["time_embedding"])
    projection, linear = layers.pop("cond_proj")["kernel"], layers["linear_1"]
    rise = embedding @ np.asarray(projection, np.float64) @ np.asarray(linear["kernel"], np.float64)
    bias = jnp.asarray(np.asarray(linear["bias"], np.float64) + rise, linear["bias"].dtype)
    time_embedding = {**layers, "linear_1": {**linear, "bias": bias}}
    plain = dataclasses.replace(config, time_cond_proj_dim=None, embeds_image_guidance=False)
    return dataclasses.replace(unet, config=plain), {**params, "time_embedding": time_embedding}
