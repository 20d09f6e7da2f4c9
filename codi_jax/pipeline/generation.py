"""The compiled half of a pipeline: token ids, images and noise in, pictures out, as one program.

Pure functions of arrays; what decides the shape of the computation is in `Program`, which is static.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from codi_jax.diffusion import sampling
from codi_jax.diffusion.sampling import OnStep, Sampler, guidance_embedding, split_branches, stack_branches
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models.clip_text import encode_text
from codi_jax.models.config import Params
from codi_jax.models.prompt_to_prompt import shared_attention

Guidance = Literal["none", "embedded", "classifier_free", "image", "instruct_pix2pix"]
"""How many predictions a step needs, and of what.

``none`` and ``embedded``: one, the latter with the guidance scale as an input of the network. ``classifier_free``:
without and with the text. ``image``: InstructPix2Pix at image guidance 1, the same two, both with the image.
``instruct_pix2pix``: with neither, with the image, with both.
"""

# The branches of each: does it see the text, does it see the image?
_BRANCHES: dict[Guidance, tuple[tuple[bool, bool], ...]] = {
    "none": ((True, True),),
    "embedded": ((True, True),),
    "classifier_free": ((False, True), (True, True)),
    "image": ((False, True), (True, True)),
    "instruct_pix2pix": ((False, False), (False, True), (True, True)),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a compiled program depends on besides the shapes of its inputs.

    Attributes:
      modules: (name, module) of ``unet``, ``vae``, ``text_encoder``, and ``text_encoder_2`` and ``controlnet`` where
        the model has them.
      sampler: which one.
      guidance: which kind.
      zero_null_text: whether the null text is zeros (SDXL) instead of the encoded negative prompt.
      on_step: called after every step, or ``None``.
    """

    modules: tuple[tuple[str, Any], ...]
    sampler: Sampler
    guidance: Guidance
    zero_null_text: bool = False
    on_step: OnStep = None


def choose_guidance(
    guidance_scale: float | int, image_guidance_scale: float | int, *, embeds_guidance: bool, edits: bool
) -> Guidance:
    """The cheapest guidance that computes what the scales ask for, which is what diffusers' pipelines do with them.

    Args:
      guidance_scale: of the text; 1 or less is no guidance at all, see `codi_jax.diffusion.sampling.is_guided`.
      image_guidance_scale: of the image, for InstructPix2Pix; 1 is none of the image, less is no guidance at all.
      embeds_guidance: whether the UNet has a guidance embedding (``time_cond_proj_dim``).
      edits: whether the UNet is an InstructPix2Pix model.
    """
    if embeds_guidance:
        return "embedded"
    if not edits:
        return "classifier_free" if sampling.is_guided(guidance_scale) else "none"
    if not sampling.is_guided(guidance_scale, image_guidance_scale):
        return "none"
    return "image" if image_guidance_scale == 1 else "instruct_pix2pix"


def generate(
    params: Mapping[str, Params], schedule: NoiseSchedule, inputs: Mapping[str, Any], program: Program
) -> tuple[UInt8[Array, "b height width 3"], Bool[Array, " b"]]:
    """Encodes the prompts, samples and decodes.

    Args:
      params: of every module of ``program``.
      schedule: of the model.
      inputs: arrays. Always ``ids`` and ``null_ids`` (token ids by text encoder, [b, s]), ``z`` (noise, [b, h, w, c]),
        ``timesteps`` [n], ``num_steps`` (how many of them to visit, or ``None``), ``noise`` ([n-1, b, h, w, c] or
        ``None``), ``guidance_scale`` and ``image_guidance_scale`` (scalars). By the kind of model: ``image``
        [b, H, W, 3] in [-1, 1]; ``mask`` [b, H, W, 1] with it for inpainting; ``control`` [b, H, W, 3] in [0, 1] and
        ``control_scale`` (scalar); ``time_ids`` [b, 6]. For prompt-to-prompt: ``shared_until`` [b/2], the time above
        which the second half of the batch takes the attention of the first.
      program: what to compute.

    Returns:
      The images, and whether all numbers of each were finite before rounding.
    """
    vae = dict(program.modules)["vae"]
    denoise = _denoiser(params, inputs, program)
    z = sampling.sample(
        program.sampler,
        denoise,
        schedule,
        inputs["z"],
        inputs["timesteps"],
        inputs["noise"],
        num_steps=inputs["num_steps"],
        on_step=program.on_step,
    )
    pixels = vae.apply({"params": params["vae"]}, z / vae.config.scaling_factor, method="decode").astype(jnp.float32)
    images = jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return images, jnp.isfinite(pixels).all(axis=(1, 2, 3))


def _denoiser(params: Mapping[str, Params], inputs: Mapping[str, Any], program: Program) -> sampling.Denoise:
    """The guided network as a function of z and t: all that does not change from step to step is computed here."""
    modules = dict(program.modules)
    unet, controlnet = modules["unet"], modules.get("controlnet")
    branches = _BRANCHES[program.guidance]
    context, added_cond = _text_conditions(params, inputs, program)
    latents = _image_latents(params, inputs, modules)
    blank = None if latents is None else jnp.zeros_like(latents)
    image = None if latents is None else stack_branches(*(latents if seen else blank for _, seen in branches))
    control = stack_branches(*[inputs["control"]] * len(branches)) if controlnet is not None else None
    batch = inputs["z"].shape[0]
    cond = None
    if program.guidance == "embedded":
        w, w_image = (
            jnp.full((batch,), inputs[name] - 1.0, jnp.float32) for name in ("guidance_scale", "image_guidance_scale")
        )
        embedded = w_image if unet.config.embeds_image_guidance else None
        cond = guidance_embedding(w, unet.config.time_cond_proj_dim, embedded)

    def denoise(z: Float[Array, "b h w c"], t: Array) -> Float[Array, "b h w c"]:
        z = stack_branches(*[z] * len(branches))
        times = jnp.full((z.shape[0],), t)
        residuals = {}
        if controlnet is not None:
            down, mid = controlnet.apply(
                {"params": params["controlnet"]}, z, times, context, control, inputs["control_scale"], added_cond
            )
            residuals = {"down_residuals": down, "mid_residual": mid}
        sample = z if image is None else jnp.concatenate([z, image], axis=-1)
        variables = {"params": params["unet"]}
        with _sharing(inputs, t, len(branches)):
            prediction, _ = unet.apply(variables, sample, times, context, cond, added_cond, **residuals)
        return _guided(prediction.astype(jnp.float32), inputs, program.guidance)

    return denoise


def _sharing(inputs: Mapping[str, Any], t: Array, branches: int) -> AbstractContextManager[Any]:
    if "shared_until" not in inputs:
        return contextlib.nullcontext()
    return shared_attention(t > inputs["shared_until"], branches)


def _guided(
    prediction: Float[Array, "nb h w c"], inputs: Mapping[str, Any], guidance: Guidance
) -> Float[Array, "b h w c"]:
    s_T, s_I = inputs["guidance_scale"], inputs["image_guidance_scale"]
    branches = split_branches(prediction, len(_BRANCHES[guidance]))
    if len(branches) == 1:
        return branches[0]
    if guidance == "instruct_pix2pix":
        uncond, image_only, full = branches
        return sampling.instruct_pix2pix_guidance(uncond, image_only, full, s_T, s_I)
    uncond, cond = branches
    return sampling.classifier_free_guidance(uncond, cond, s_T)


def _text_conditions(
    params: Mapping[str, Params], inputs: Mapping[str, Any], program: Program
) -> tuple[Float[Array, "nb s d"], dict[str, Array] | None]:
    modules = dict(program.modules)
    encoders = {name: module for name, module in modules.items() if name.startswith("text_encoder")}
    is_xl = modules["unet"].config.addition_embed_type == "text_time"
    branches = _BRANCHES[program.guidance]
    if program.zero_null_text or all(seen for seen, _ in branches):
        text = encode_text(encoders, params, inputs["ids"], is_xl)
        null = jax.tree.map(jnp.zeros_like, text)
    else:
        ids = stack_branches(inputs["null_ids"], inputs["ids"])
        both = encode_text(encoders, params, ids, is_xl)
        null, text = zip(*(split_branches(features, 2) for features in both), strict=True)
    context, pooled = stack_branches(*(text if seen else null for seen, _ in branches))
    if not is_xl:
        return context, None
    return context, {"text_embeds": pooled, "time_ids": jnp.concatenate([inputs["time_ids"]] * len(branches))}


def _image_latents(
    params: Mapping[str, Params], inputs: Mapping[str, Any], modules: Mapping[str, Any]
) -> Float[Array, "b h w c"] | None:
    """What is concatenated to the noisy latents.

    InstructPix2Pix: the mode of the image's latents, *not* multiplied by the scaling factor (Brooks et al., 2023).
    Inpainting: the mask, and the scaled latents of the image with the masked pixels gray.
    """
    if "image" not in inputs:
        return None
    vae, image = modules["vae"], inputs["image"]
    if "mask" not in inputs:
        return vae.apply({"params": params["vae"]}, image, method="encode").mode()
    latents = vae.apply({"params": params["vae"]}, image * (1.0 - inputs["mask"]), method="encode").mode()
    step = vae.config.downscale
    mask = inputs["mask"][:, ::step, ::step]  # nearest neighbor, as PyTorch's interpolate takes it
    return jnp.concatenate([mask, latents * vae.config.scaling_factor], axis=-1)
