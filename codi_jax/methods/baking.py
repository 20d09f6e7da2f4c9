"""Guidance baked in: a student that takes its guidance as an input, made into one for a single guidance scale.

Beyond LCM, its neighbor, this trains nothing: it is arithmetic on two layers' weights.
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
    """The student for one guidance, without the input for it: what stock diffusers pipelines sample rightly.

    Exactly the same function: the projection is linear and enters before ``linear_1``, so for a fixed w it raises that
    layer's bias by W₁ · cond_proj(embedding of w).

    Example:
      >>> unet, params = bake_guidance(unet, params, guidance_scale=7.5)

    Args:
      unet: the student's module.
      params: of the student.
      guidance_scale: of the text, w + 1.
      image_guidance_scale: of the image, for a student that takes it.

    Returns:
      The module without ``time_cond_proj_dim``, and its parameters; those of ``linear_1``'s bias in the dtype it had.

    Raises:
      ValueError: if the UNet takes no guidance, or image guidance is given to one that takes none, or missing.
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
