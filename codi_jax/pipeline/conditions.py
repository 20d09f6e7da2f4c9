"""From a batch of data to what a method computes with: latents and conditions.

All of it runs inside the compiled step. The modules are static and their parameters are arguments; a gradient reaches
those that it is taken for, such as those of a text encoder that is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from codi_jax.models.clip_text import encode_text
from codi_jax.models.config import Params
from codi_jax.models.controlnet import controlnet_from_unet
from codi_jax.models.vae import DiagonalGaussian

Batch = Mapping[str, Any]
Frozen = Mapping[str, Any]
"""What is not trained, by name: the parameters of ``vae``, ``text_encoder``, …; see `null_text` for the null text."""


_EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of a ControlNet's condition embedding, as many as the VAE has resolutions


@dataclass(frozen=True)
class Modules:
    """The modules of a model, without their parameters: hashable, and static in a compiled program.

    Attributes:
      unet: the denoising network.
      vae: its configuration has the scaling factor of the latents.
      text_encoder: of the prompts; ``None`` where features are cached.
      text_encoder_2: SDXL's second.
      controlnet: where there is one.
      vae_parts: in how many parts, one after the other, a batch of images is encoded: more take less memory.
    """

    unet: Any
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    controlnet: Any = None
    vae_parts: int = 1

    @property
    def edits(self) -> bool:
        """Whether the UNet takes the latents of a source image beside the noisy ones: InstructPix2Pix."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels


def add_controlnet(modules: Modules) -> Modules:
    """The modules with a ControlNet that is the copy of the UNet's encoder, for condition images of the VAE's size."""
    channels = _EMBEDDING_CHANNELS[: len(modules.vae.config.block_out_channels)]
    abstract = modules.unet.abstract_params()
    controlnet, _ = controlnet_from_unet(modules.unet, abstract, jax.random.key(0), channels)
    return replace(modules, controlnet=controlnet)


def init_controlnet(modules: Modules, unet_params: Params, key: Key[Array, ""]) -> Params:
    """New parameters for the ControlNet of `add_controlnet`: the UNet's, and outputs of zeros."""
    channels = modules.controlnet.config.conditioning_embedding_out_channels
    return controlnet_from_unet(modules.unet, unet_params, key, channels)[1]


def widen_for_edits(unet: Any, params: Params) -> tuple[Any, Params]:
    """A text-to-image UNet that also takes the latents of a source image, and does not look at them yet.

    The new input channels of the first convolution are zeros (Brooks et al., 2023, section 3.2).

    Args:
      unet: its module.
      params: of the UNet.

    Returns:
      The module with twice as many input channels, and its parameters.
    """
    config = replace(unet.config, in_channels=2 * unet.config.in_channels)
    kernel = params["conv_in"]["kernel"]
    widened = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=2)
    return replace(unet, config=config), {**params, "conv_in": {**params["conv_in"], "kernel": widened}}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """What a prediction is conditioned on. A tree of arrays, so branches are stacked with `stack_branches`.

    Attributes:
      context: text features.
      added_cond: SDXL's ``{"text_embeds": [b, p], "time_ids": [b, 6]}``.
      control: a ControlNet's condition images in [0, 1], [b, H, W, 3].
      image: latents of the source image of an edit, *not* times the scaling factor.
      guidance: the embedding of guidance weights, for a network with ``time_cond_proj_dim``.
    """

    context: Float[Array, "b s d"] | Any
    added_cond: dict[str, Array] | Any = None
    control: Float[Array, "b hp wp ch"] | Any = None
    image: Float[Array, "b h w c"] | Any = None
    guidance: Float[Array, "b e"] | Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A batch, ready for a method.

    Attributes:
      z0: clean latents, times the scaling factor, float32; ``None`` where the batch has none, but prompts alone.
      cond: the condition.
      null: what guidance leads away from, where ``frozen`` has the null text: that text in place of the prompt, and
        for an edit zeros in place of the image.
      image_only: for an edit, the null text and the image.
    """

    z0: Float[Array, "b h w c"] | Any
    cond: Condition
    null: Condition | None = None
    image_only: Condition | None = None


def prepare(modules: Modules, frozen: Frozen, batch: Batch, key: Key[Array, ""]) -> Inputs:
    """Encodes a batch, or takes what is cached in it.

    Args:
      modules: of the model.
      frozen: parameters of ``vae``, ``text_encoder`` and ``text_encoder_2``, unless the batch has their outputs; and
        ``null_context`` (and ``null_pooled``) where the null text is needed.
      batch: ``pixels`` or ``moments``, or neither; ``input_ids`` or ``context`` (and ``pooled``); ``conditioning``
        where the task has condition images, or for an edit ``conditioning_moments``; ``time_ids`` for SDXL, and only
        for SDXL.
      key: for the latents' sample.
    """
    context, pooled = _text(modules, frozen, batch)
    z0 = None
    if "pixels" in batch or "moments" in batch:
        z0 = posterior(modules.vae, frozen, batch, modules.vae_parts).sample(key) * modules.vae.config.scaling_factor
    control = image = None
    if modules.edits:
        image = image_latents(modules.vae, frozen, batch, modules.vae_parts)
    elif "conditioning" in batch:
        control = to_unit(batch["conditioning"])
    cond = Condition(context, _added_cond(pooled, batch), control, image)
    if "null_context" not in frozen:
        return Inputs(z0, cond)
    null_context, null_pooled = (_repeat(frozen.get(name), len(context)) for name in ("null_context", "null_pooled"))
    without_text = replace(cond, context=null_context.astype(context.dtype), added_cond=_added_cond(null_pooled, batch))
    if image is None:
        return Inputs(z0, cond, without_text)
    return Inputs(z0, cond, replace(without_text, image=jnp.zeros_like(image)), without_text)


def image_latents(vae: Any, frozen: Frozen, batch: Batch, parts: int = 1) -> Float[Array, "b h w c"]:
    """The latents of the source image of an edit: the *mode*, and not times the scaling factor (Brooks et al., 2023).

    Args:
      vae: its module.
      frozen: ``vae``, its parameters.
      batch: ``conditioning``, uint8, or ``conditioning_moments``.
      parts: see `posterior`.

    Raises:
      ValueError: if there is no source image.
    """
    if "conditioning_moments" in batch:
        return posterior(vae, frozen, {"moments": batch["conditioning_moments"]}).mode()
    if "conditioning" not in batch:
        raise ValueError(
            "An InstructPix2Pix model needs source images, and the data has none: name their column with "
            "--original_image_column."
        )
    return posterior(vae, frozen, {"pixels": batch["conditioning"]}, parts).mode()


def refuse_guidance_input(unet: Any, remedy: str) -> None:
    """Refuses a UNet that takes its guidance as an input, for training that does not give it one.

    Args:
      unet: module of the teacher, or of the model that is trained.
      remedy: what to do instead, which ends the sentence.

    Raises:
      ValueError: if it does.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"the teacher takes its guidance as an input (time_cond_proj_dim), {remedy}.")


def drop_conditions(inputs: Inputs, key: Key[Array, ""], probability: float | int) -> Inputs:
    """Takes text and image from some of the samples of an edit, so that guidance can do without (Brooks et al., 2023).

    With r uniform in [0, 1): the text goes if r < 2p, the image if p ≤ r < 3p. So of all samples p lose the text alone,
    p both, and p the image alone. What replaces the text is the null condition's, pooled output included.

    Args:
      inputs: with the null condition.
      key: of the draw.
      probability: p, at most 1/3.

    Returns:
      The same, but for what `cond` is, and `image_only`: a sample that has lost its image has none in any branch.
    """
    assert inputs.null is not None
    r = jax.random.uniform(key, (len(inputs.z0),))
    without_text, without_image = r < 2 * probability, (r >= probability) & (r < 3 * probability)

    def pick(dropped: Array, null: Array, kept: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * (kept.ndim - 1)), null, kept)

    cond, null = inputs.cond, inputs.null
    text = (cond.context, cond.added_cond), (null.context, null.added_cond)
    context, added_cond = jax.tree.map(lambda kept, null: pick(without_text, null, kept), *text)
    image = None if cond.image is None else pick(without_image, null.image, cond.image)
    image_only = None if inputs.image_only is None else replace(inputs.image_only, image=image)
    cond = replace(cond, context=context, added_cond=added_cond, image=image)
    return replace(inputs, cond=cond, image_only=image_only)


def to_signed(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [-1, 1], as the VAE takes them."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_unit(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [0, 1], as a ControlNet takes them."""
    return pixels.astype(jnp.float32) / 255.0


def posterior(vae: Any, frozen: Frozen, batch: Batch, parts: int = 1) -> DiagonalGaussian:
    """The distribution of the latents, without the scaling factor: from the VAE, or from cached ``moments``.

    Args:
      vae: its module.
      frozen: ``vae``, its parameters.
      batch: ``pixels``, uint8, or ``moments``, mean beside log-variance.
      parts: in how many parts, one after the other, the images are encoded; it divides their number.
    """
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean, logvar)

    def encode(pixels: UInt8[Array, "b hp wp 3"]) -> DiagonalGaussian:
        return vae.apply({"params": frozen["vae"]}, to_signed(pixels), method="encode")

    if parts == 1:
        return encode(batch["pixels"])
    # Each part takes a sample of every so many, so that it lies on all devices.
    pixels = batch["pixels"].reshape(-1, parts, *batch["pixels"].shape[1:]).swapaxes(0, 1)
    encoded = jax.lax.map(lambda part: jax.tree.leaves(encode(part)), pixels)
    mean, logvar = (x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in encoded)
    return DiagonalGaussian(mean, logvar)


def null_text(modules: Modules, params: Mapping[str, Params], ids: Mapping[str, Array], *, zeros: bool = False) -> dict:
    """The text that guidance leads away from, for ``frozen``; computed once, before training.

    Args:
      modules: with the text encoders.
      params: of the text encoders, by name.
      ids: of the empty prompt, [1, s], by the name of the encoder.
      zeros: whether it is zeros of that shape instead: SDXL's ``force_zeros_for_empty_prompt``.

    Returns:
      ``null_context`` [1, s, d], and for SDXL ``null_pooled`` [1, p].
    """
    context, pooled = encode_prompts(modules, params, ids)
    is_xl = modules.text_encoder_2 is not None
    null = {"null_context": context, "null_pooled": pooled} if is_xl else {"null_context": context}
    return jax.tree.map(jnp.zeros_like, null) if zeros else null


def encode_prompts(
    modules: Modules, params: Mapping[str, Any], ids: Mapping[str, Array]
) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
    """The features of token ids, and their pooled output, by the text encoders that the model has."""
    return encode_text(_text_encoders(modules), params, ids, modules.text_encoder_2 is not None)


def _text(modules: Modules, frozen: Frozen, batch: Batch) -> tuple[Float[Array, "b s d"], Array | None]:
    if "context" in batch:
        return batch["context"], batch.get("pooled")
    return encode_prompts(modules, frozen, batch["input_ids"])


def _text_encoders(modules: Modules) -> dict[str, Any]:
    encoders = {"text_encoder": modules.text_encoder, "text_encoder_2": modules.text_encoder_2}
    return {name: module for name, module in encoders.items() if module is not None}


def _added_cond(pooled: Array | None, batch: Batch) -> dict[str, Any] | None:
    return {"text_embeds": pooled, "time_ids": batch["time_ids"]} if "time_ids" in batch else None


def _repeat(x: Array | None, count: int) -> Any:
    return None if x is None else jnp.repeat(x, count, axis=0)
