"""Turns a batch of data into what a method computes with: latents and conditions.

All of it runs inside the compiled step. The networks are static and their parameters are arguments; gradients reach the
parameters they are taken for, such as the parameters of a trained text encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from codi_jax.diffusion.guidance import Branch
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models.clip_text import encode_text
from codi_jax.models.config import Params
from codi_jax.models.vae import DiagonalGaussian
from codi_jax.pipeline.networks import Networks

Batch = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NullText:
    """The features of the text that guidance points away from, computed once before training; see `encode_null_text`.

    Attributes:
      context: the features of one prompt.
      pooled: SDXL's pooled output.
    """

    context: Float[Array, "1 s d"] | Any
    pooled: Float[Array, "1 p"] | Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What a training step reads but does not change: the teacher, for any method.

    Examples:
      >>> Frozen({"unet": teacher_params, "vae": vae_params}, model.schedule)

    Attributes:
      params: parameters by network name. The teacher's UNet is ``unet``; networks that are trained directly, without a
        frozen teacher copy, are not here.
      schedule: the noise schedule, including what the student predicts and how it is sampled.
      teacher_schedule: the teacher's own.
      null_text: the null text, if guidance needs it.
      target: for distribution matching, the UNet whose distribution the generator should match.
    """

    params: Mapping[str, Params] | Any
    schedule: NoiseSchedule | Any
    teacher_schedule: NoiseSchedule | Any = None
    null_text: NullText | None = None
    target: Params | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """What a prediction is conditioned on: a tree of arrays, so that branches of guidance can be stacked.

    Attributes:
      context: text features.
      added_cond: SDXL's ``{"text_embeds": [b, p], "time_ids": [b, 6]}``.
      control: a ControlNet's condition images in [0, 1], [b, H, W, 3].
      image: latents to concatenate to the noisy ones: the source image's for an edit, *not* times the scaling factor;
        or the mask and the latents of an image to inpaint.
    """

    context: Float[Array, "b s d"] | Any
    added_cond: dict[str, Array] | Any = None
    control: Float[Array, "b hp wp ch"] | Any = None
    image: Float[Array, "b h w c"] | Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditions:
    """The condition of each sample, and the conditions that guidance points away from.

    Examples:
      >>> Conditions(full=Condition(text_features), null=Condition(null_features))

    Attributes:
      full: the condition.
      null: the null text instead of the prompt, and for an edit zeros instead of the image; ``None`` if there is no
        null text.
      image_only: for an edit, the null text and the image.
      control_scale: a factor on the ControlNet's outputs; ``None`` is 1.
      shared_until: for prompt-to-prompt, the time of each pair down to which the second half of the batch uses the
        attention of the first; see `codi_jax.models.prompt_to_prompt`.
    """

    full: Condition
    null: Condition | None = None
    image_only: Condition | None = None
    control_scale: Float[Array, ""] | Any = None
    shared_until: Float[Array, " n"] | Any = None

    def of(self, branch: Branch) -> Condition:
        """The condition of one branch of guidance.

        Raises:
          ValueError: if there is no null text to guide with.
        """
        condition = getattr(self, branch)
        if condition is None:
            raise ValueError("Guidance needs the null text: give null_text with the frozen networks.")
        return condition


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A batch, ready for a method.

    Attributes:
      z0: clean latents, times the scaling factor, float32; ``None`` if the batch has only prompts.
      conditions: the conditions of the batch's samples.
    """

    z0: Float[Array, "b h w c"] | Any
    conditions: Conditions


def prepare(
    networks: Networks, params: Mapping[str, Any], batch: Batch, key: Key[Array, ""], null_text: NullText | None = None
) -> Inputs:
    """Encodes a batch, or uses what is cached in it.

    Args:
      networks: the model's networks.
      params: the parameters of ``vae``, ``text_encoder`` and ``text_encoder_2``, unless the batch has their outputs.
      batch: ``pixels`` or ``moments``, or neither; ``input_ids`` or ``context`` (and ``pooled``); ``conditioning`` if
        the task has condition images, or for an edit ``conditioning_moments``; ``time_ids`` for SDXL only.
      key: for sampling the latents.
      null_text: the null text, if guidance needs it.

    Raises:
      ValueError: if an edit has no source image.
    """
    context, pooled = _text(networks, params, batch)
    z0 = None
    if "pixels" in batch or "moments" in batch:
        z0 = posterior(networks.vae, params, batch, networks.vae_parts).sample(key)
        z0 = z0 * networks.vae.config.scaling_factor
    control = image = None
    if networks.is_instruct_pix2pix:
        image = image_latents(networks.vae, params, batch, networks.vae_parts)
    elif "conditioning" in batch:
        control = to_unit(batch["conditioning"])
    full = Condition(context, _added_cond(pooled, batch), control, image)
    return Inputs(z0, with_null_text(full, null_text, batch))


def with_null_text(full: Condition, null_text: NullText | None, batch: Batch) -> Conditions:
    """The conditions of all branches, from the prompts' condition.

    Args:
      full: the prompts' condition.
      null_text: the null text; ``None`` without guidance.
      batch: the batch, with ``time_ids`` for SDXL.
    """
    if null_text is None:
        return Conditions(full)
    context, pooled = (_repeat(features, len(full.context)) for features in (null_text.context, null_text.pooled))
    null = replace(full, context=context.astype(full.context.dtype), added_cond=_added_cond(pooled, batch))
    if full.image is None:
        return Conditions(full, null)
    return Conditions(full, replace(null, image=jnp.zeros_like(full.image)), null)


def image_latents(vae: Any, params: Mapping[str, Any], batch: Batch, parts: int = 1) -> Float[Array, "b h w c"]:
    """The latents of an edit's source image: the *mode*, not times the scaling factor (Brooks et al., 2023).

    Args:
      vae: the VAE's module.
      params: the parameters; only ``vae`` is read.
      batch: ``conditioning``, uint8, or ``conditioning_moments``.
      parts: see `posterior`.

    Raises:
      ValueError: if there is no source image.
    """
    if "conditioning_moments" in batch:
        return posterior(vae, params, {"moments": batch["conditioning_moments"]}).mode()
    if "conditioning" not in batch:
        raise ValueError(
            "An InstructPix2Pix model needs source images (conditioning), and the data has none: name their column "
            "with --original_image_column."
        )
    return posterior(vae, params, {"pixels": batch["conditioning"]}, parts).mode()


def drop_conditions(inputs: Inputs, key: Key[Array, ""], probability: float | int) -> Inputs:
    """Drops text and image from some samples of an edit, so that guidance can do without them (Brooks et al., 2023).

    With r uniform in [0, 1): the text is dropped if r < 2p, the image if p ≤ r < 3p. So a fraction p of all samples
    loses the text only, p both, and p the image only. The null text replaces the text, pooled output included.

    Args:
      inputs: the inputs, with the null condition.
      key: for the draw.
      probability: p, at most 1/3.

    Returns:
      The same, except for the full condition and `Conditions.image_only`: a sample that lost its image has none in any
      branch.
    """
    conditions = inputs.conditions
    full, null, image_only = conditions.full, conditions.of("null"), conditions.image_only
    r = jax.random.uniform(key, (len(inputs.z0),))
    without_text, without_image = r < 2 * probability, (r >= probability) & (r < 3 * probability)

    def pick(dropped: Array, null: Array, kept: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * (kept.ndim - 1)), null, kept)

    text = (full.context, full.added_cond), (null.context, null.added_cond)
    context, added_cond = jax.tree.map(lambda kept, null: pick(without_text, null, kept), *text)
    image = None if full.image is None else pick(without_image, null.image, full.image)
    image_only = None if image_only is None else replace(image_only, image=image)
    full = replace(full, context=context, added_cond=added_cond, image=image)
    return replace(inputs, conditions=replace(conditions, full=full, image_only=image_only))


def to_signed(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [-1, 1], as the VAE takes them."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_unit(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [0, 1], as a ControlNet takes them."""
    return pixels.astype(jnp.float32) / 255.0


def posterior(vae: Any, params: Mapping[str, Any], batch: Batch, parts: int = 1) -> DiagonalGaussian:
    """The distribution of the latents, without the scaling factor: from the VAE, or from cached ``moments``.

    Args:
      vae: the VAE's module.
      params: the parameters; only ``vae`` is read.
      batch: ``pixels``, uint8, or ``moments``, mean and log-variance concatenated.
      parts: the number of chunks in which the images are encoded, one after another; it divides the batch size.
    """
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean, logvar)

    def encode(pixels: UInt8[Array, "b hp wp 3"]) -> DiagonalGaussian:
        return vae.apply({"params": params["vae"]}, to_signed(pixels), method="encode")

    if parts == 1:
        return encode(batch["pixels"])
    # Each part is a strided slice of the batch, so that it lies on all devices.
    pixels = batch["pixels"].reshape(-1, parts, *batch["pixels"].shape[1:]).swapaxes(0, 1)
    encoded = jax.lax.map(lambda part: jax.tree.leaves(encode(part)), pixels)
    mean, logvar = (x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in encoded)
    return DiagonalGaussian(mean, logvar)


def encode_null_text(
    networks: Networks, params: Mapping[str, Params], ids: Mapping[str, Array], *, zeros: bool = False
) -> NullText:
    """The features of the text that guidance points away from; computed once, before training.

    Args:
      networks: the model's networks, with the text encoders.
      params: the text encoders' parameters, by name.
      ids: the empty prompt's token ids, [1, s], by encoder name.
      zeros: whether to return zeros of that shape instead: SDXL's ``force_zeros_for_empty_prompt``.
    """
    context, pooled = encode_prompts(networks, params, ids)
    null = NullText(context, pooled if networks.text_encoder_2 is not None else None)
    return jax.tree.map(jnp.zeros_like, null) if zeros else null


def encode_prompts(
    networks: Networks, params: Mapping[str, Any], ids: Mapping[str, Array]
) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
    """The features of token ids, and their pooled output, by the text encoders that the model has."""
    return encode_text(networks.text_encoders, params, ids, networks.text_encoder_2 is not None)


def _text(networks: Networks, params: Mapping[str, Any], batch: Batch) -> tuple[Float[Array, "b s d"], Array | None]:
    if "context" in batch:
        return batch["context"], batch.get("pooled")
    return encode_prompts(networks, params, batch["input_ids"])


def _added_cond(pooled: Array | None, batch: Batch) -> dict[str, Any] | None:
    return {"text_embeds": pooled, "time_ids": batch["time_ids"]} if "time_ids" in batch else None


def _repeat(x: Array | None, count: int) -> Any:
    return None if x is None else jnp.repeat(x, count, axis=0)
