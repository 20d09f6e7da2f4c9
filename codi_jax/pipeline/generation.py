"""The program that generates images: token ids, images and noise in, images out, compiled as one.

Pure functions of arrays; everything that shapes the computation is in `Program`, which is static.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from codi_jax.diffusion import samplers
from codi_jax.diffusion.guidance import Guidance, split_branches, stack_branches
from codi_jax.diffusion.samplers import OnStep, Original
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.models import sharding
from codi_jax.models.clip_text import encode_text
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Condition, Conditions
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict

Text = tuple[Float[Array, "b s d"], Float[Array, "b p"]]
"""Prompt features and their pooled output."""


# The inputs of `generate` with one entry for each image, and the axis of the images.
_IMAGE_AXES = {
    "ids": 0, "null_ids": 0, "z": 0, "noise": 1, "image": 0, "mask": 0, "control": 0, "time_ids": 0, "original": 0,
    "changes": 0, "weights": 0, "null_weights": 0,
}  # fmt: skip


def split_over_devices(params: Mapping[str, Params], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of `generate`, split among the devices that hold the parameters, if they divide the images evenly.

    Args:
      params: the parameters of every network.
      inputs: the arrays.
    """
    mesh = sharding.mesh_of(params)
    if mesh is None or mesh.is_multi_process or len(inputs["z"]) % mesh.size or "shared_until" in inputs:
        return dict(inputs)  # shared attention pairs images of the first and the second half
    where = input_shardings(mesh, inputs)
    images = {name: jax.device_put(inputs[name], where[name]) for name in _IMAGE_AXES if name in inputs}
    return {**inputs, **images}


def input_shardings(mesh: Mesh, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """For each input of `generate` where it goes: what there is for each image is split, the rest is replicated.

    Args:
      mesh: the devices, as many as divide the number of images.
      inputs: the arrays, or their shapes.
    """
    where = {name: sharding.along(mesh, _IMAGE_AXES.get(name)) for name in inputs}
    return {name: jax.tree.map(lambda _, name=name: where[name], value) for name, value in inputs.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a compiled program depends on besides its inputs.

    Attributes:
      networks: the model's networks.
      sampler: the sampler's name.
      zero_null_text: whether the null text is zeros (SDXL) instead of the encoded negative prompt.
      on_step: called after every step, or ``None``.
    """

    networks: Networks
    sampler: SamplerName
    zero_null_text: bool = False
    on_step: OnStep = None


def generate(
    params: Mapping[str, Params],
    schedule: NoiseSchedule,
    guidance: Guidance,
    inputs: Mapping[str, Any],
    program: Program,
) -> tuple[UInt8[Array, "b height width 3"], Bool[Array, " b"]]:
    """Encodes the prompts, samples and decodes.

    Args:
      params: the parameters of every network of ``program``.
      schedule: the model's noise schedule.
      guidance: the guidance, with one scale for all images.
      inputs: the arrays. Always ``ids`` and ``null_ids`` (token ids by text encoder, [b, s], or in k chunks [b, k, s]
        with the tokens' ``weights`` and ``null_weights`` in the same shape), ``z`` (noise, [b, h, w, c]), ``timesteps``
        [n], ``num_steps`` (how many of them to visit, or ``None``) and ``noise`` ([n-1, b, h, w, c] or ``None``).
        Depending on the model: ``image`` [b, H, W, 3] in [-1, 1]; ``mask`` [b, H, W, 1] with it for inpainting;
        ``control`` [b, H, W, 3] in [0, 1], ``control_scale`` (scalar) and ``control_window`` [2], the first and last
        time at which the ControlNet takes part, or for k ControlNets [b, H, W, 3k], [k] and [k, 2]; ``time_ids`` [b,
        6]. For the sampler tcd: ``gamma`` (scalar), and for ddim ``eta``. For prompt-to-prompt: ``shared_until`` [b/2],
        see `codi_jax.pipeline.conditions.Conditions`. To start from an image, or to keep a part of it: ``original``
        [b, H, W, 3] in [-1, 1], with ``skipped`` (scalar), ``changes`` [b, H, W, 1] or both, see
        `codi_jax.diffusion.samplers.Original`.
      program: what to compute.

    Returns:
      The images, and whether all numbers of each were finite before rounding.
    """
    networks, batch = program.networks, len(inputs["z"])
    conditions = _conditions(params, inputs, program, guidance)

    def denoise(z: Float[Array, "b h w c"], t: Array) -> Float[Array, "b h w c"]:
        scale = _control_scale(inputs, t)
        at_t = conditions if scale is None else dataclasses.replace(conditions, control_scale=scale)
        return predict(networks, params, z, jnp.full((batch,), t), at_t, guidance)

    z = samplers.sample(
        program.sampler,
        denoise,
        schedule,
        inputs["z"],
        inputs["timesteps"],
        inputs["noise"],
        original=_original(params, inputs, networks),
        num_steps=inputs["num_steps"],
        on_step=program.on_step,
        **{name: inputs[name] for name in ("gamma", "eta") if name in inputs},
    )
    vae = networks.vae
    pixels = vae.apply({"params": params["vae"]}, z / vae.config.scaling_factor, method="decode").astype(jnp.float32)
    images = jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return images, jnp.isfinite(pixels).all(axis=(1, 2, 3))


def _conditions(
    params: Mapping[str, Params], inputs: Mapping[str, Any], program: Program, guidance: Guidance
) -> Conditions:
    """The conditions of all branches: computes everything that does not change from step to step."""
    null_text, text = _encode_texts(params, inputs, program, guidance)
    image = _image_latents(params, inputs, program.networks)

    def condition(text: Text, image: Array | None) -> Condition:
        context, pooled = text
        added = {"text_embeds": pooled, "time_ids": inputs["time_ids"]} if program.networks.is_sdxl else None
        return Condition(context, added, inputs.get("control"), image)

    is_edit = program.networks.is_instruct_pix2pix
    return Conditions(
        full=condition(text, image),
        null=condition(null_text, jnp.zeros_like(image) if is_edit and image is not None else image),
        image_only=condition(null_text, image) if is_edit else None,
        shared_until=inputs.get("shared_until"),
    )


def _control_scale(inputs: Mapping[str, Any], t: Array) -> Array | None:
    """The factors on the ControlNets' outputs at a time: 0 outside of their windows."""
    if "control_scale" not in inputs:
        return None
    first, last = inputs["control_window"][..., 0], inputs["control_window"][..., 1]
    return inputs["control_scale"] * ((t <= first) & (t >= last))


def _encode_texts(
    params: Mapping[str, Params], inputs: Mapping[str, Any], program: Program, guidance: Guidance
) -> tuple[Text, Text]:
    """The features of the null text and of the prompts."""
    networks = program.networks

    def encode(ids: Any, weights: Any) -> Text:
        return encode_text(networks.text_encoders, params, ids, networks.is_sdxl, weights)

    if program.zero_null_text or guidance.branches == ("full",):
        text = encode(inputs["ids"], inputs.get("weights"))
        return jax.tree.map(jnp.zeros_like, text), text
    ids = stack_branches(inputs["null_ids"], inputs["ids"])
    weights = stack_branches(inputs["null_weights"], inputs["weights"]) if "weights" in inputs else None
    context, pooled = encode(ids, weights)
    (null_context, full_context), (null_pooled, full_pooled) = split_branches(context, 2), split_branches(pooled, 2)
    return (null_context, null_pooled), (full_context, full_pooled)


def _original(params: Mapping[str, Params], inputs: Mapping[str, Any], networks: Networks) -> Original | None:
    """The image that sampling starts from or keeps a part of."""
    if "original" not in inputs:
        return None
    z0 = _mode(params, inputs["original"], networks) * networks.vae.config.scaling_factor
    mask = _at_latents(inputs["changes"], networks) if "changes" in inputs else None
    return Original(z0, inputs.get("skipped"), mask)


def _image_latents(
    params: Mapping[str, Params], inputs: Mapping[str, Any], networks: Networks
) -> Float[Array, "b h w c"] | None:
    """The latents to concatenate to the noisy ones.

    InstructPix2Pix: the mode of the image's latents, *not* times the scaling factor (Brooks et al., 2023). Inpainting:
    the mask, and the scaled latents of the image with the masked pixels gray.
    """
    if "image" not in inputs:
        return None
    image = inputs["image"]
    if "mask" not in inputs:
        return _mode(params, image, networks)
    latents = _mode(params, image * (1.0 - inputs["mask"]), networks) * networks.vae.config.scaling_factor
    return jnp.concatenate([_at_latents(inputs["mask"], networks), latents], axis=-1)


def _mode(params: Mapping[str, Params], image: Array, networks: Networks) -> Float[Array, "b h w c"]:
    """The latents of an image, *not* times the scaling factor."""
    return networks.vae.apply({"params": params["vae"]}, image, method="encode").mode()


def _at_latents(mask: Array, networks: Networks) -> Float[Array, "b h w 1"]:
    """The mask at the latents' size: the nearest neighbor, as in PyTorch's interpolate."""
    step = networks.vae.config.downscale
    return mask[:, ::step, ::step]
