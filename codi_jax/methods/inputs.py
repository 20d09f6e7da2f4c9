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
    """

    unet: Any
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    controlnet: Any = None


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """What a prediction is conditioned on. A tree of arrays, so branches are stacked with `stack_branches`.

    Attributes:
      context: text features.
      added_cond: SDXL's ``{"text_embeds": [b, p], "time_ids": [b, 6]}``.
      control: condition images in [0, 1], [b, H, W, 3].
    """

    context: Float[Array, "b s d"] | Any
    added_cond: dict[str, Array] | Any = None
    control: Float[Array, "b hp wp ch"] | Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A batch, ready for a method.

    Attributes:
      z0: clean latents, times the scaling factor, float32.
      cond: the condition.
      null: the same with the null text in place of the prompt, where ``frozen`` has it.
    """

    z0: Float[Array, "b h w c"] | Any
    cond: Condition
    null: Condition | None = None


def prepare(modules: Modules, frozen: Frozen, batch: Batch, key: Key[Array, ""]) -> Inputs:
    """Encodes a batch, or takes what is cached in it.

    Args:
      modules: of the model.
      frozen: parameters of ``vae``, ``text_encoder`` and ``text_encoder_2``, unless the batch has their outputs; and
        ``null_context`` (and ``null_pooled``) where the null text is needed.
      batch: ``pixels`` or ``moments``; ``input_ids`` or ``context`` (and ``pooled``); ``conditioning`` where the task
        has condition images; ``time_ids`` for SDXL, and only for SDXL.
      key: for the latents' sample.
    """
    context, pooled = _text(modules, frozen, batch)
    control = to_unit(batch["conditioning"]) if "conditioning" in batch else None
    cond = Condition(context, _added_cond(pooled, batch), control)
    null = None
    if "null_context" in frozen:
        null_context, null_pooled = (
            _repeat(frozen.get(name), len(context)) for name in ("null_context", "null_pooled")
        )
        null = Condition(null_context.astype(context.dtype), _added_cond(null_pooled, batch), control)
    z0 = posterior(modules.vae, frozen, batch).sample(key) * modules.vae.config.scaling_factor
    return Inputs(z0, cond, null)


def to_signed(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [-1, 1], as the VAE takes them."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_unit(pixels: UInt8[Array, "b hp wp 3"]) -> Float[Array, "b hp wp 3"]:
    """Images in [0, 1], as a ControlNet takes them."""
    return pixels.astype(jnp.float32) / 255.0


def posterior(vae: Any, frozen: Frozen, batch: Batch) -> DiagonalGaussian:
    """The distribution of the latents, without the scaling factor: from the VAE, or from cached ``moments``.

    Args:
      vae: its module.
      frozen: ``vae``, its parameters.
      batch: ``pixels``, uint8, or ``moments``, mean beside log-variance.
    """
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean, logvar)
    return vae.apply({"params": frozen["vae"]}, to_signed(batch["pixels"]), method="encode")


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
