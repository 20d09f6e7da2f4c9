"""Guidance: combines the predictions for several conditions at one z_t into one.

A `Guidance` says which predictions are needed, in which order they are stacked into one batch, and how they are
combined. Both losses and samplers pass it to `codi_jax.pipeline.prediction.predict`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from codi_jax.diffusion.schedule import Latents

Scale = Num[ArrayLike, ""] | Num[ArrayLike, " b"]
"""A guidance scale: one for all samples, or one per sample."""
Branch = Literal["null", "image_only", "full"]
"""A condition to predict for: neither text nor image, the image and the null text, or everything."""
Tree = TypeVar("Tree")

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guidance:
    """How the predictions for several conditions become one; create it with the class methods.

    Examples:
      >>> guidance = Guidance.classifier_free(7.5)
      >>> guidance.branches
      ('null', 'full')

    Attributes:
      branches: the conditions to predict for, in the order in which they are stacked.
      is_embedded: whether the network takes the guidance as an input, so that one prediction is enough.
      scale: the text's guidance scale; if it is embedded, LCM's weight w, the scale minus one.
      image_scale: the same for the source image of an edit.
      rescale: φ of `rescaled_guidance`; ``None`` does not rescale.
    """

    branches: tuple[Branch, ...] = field(default=("full",), metadata=_STATIC)
    is_embedded: bool = field(default=False, metadata=_STATIC)
    scale: Scale | Any = None
    image_scale: Scale | Any = None
    rescale: Scale | Any = None

    @classmethod
    def none(cls) -> "Guidance":
        """The prediction for the full condition."""
        return cls()

    @classmethod
    def embedded(cls, w: Scale, w_image: Scale | None = None) -> "Guidance":
        """The guidance weight as an input of a guidance-distilled network (Luo et al., 2023, section 4.2).

        Args:
          w: the guidance scale minus one.
          w_image: the image's guidance scale minus one, for a network that takes both.
        """
        return cls(is_embedded=True, scale=w, image_scale=w_image)

    @classmethod
    def classifier_free(cls, scale: Scale, rescale: Scale | None = None) -> "Guidance":
        """Guides away from the unconditional prediction, see `classifier_free_guidance`.

        Args:
          scale: s.
          rescale: φ, see `rescaled_guidance`.
        """
        return cls(("null", "full"), scale=scale, rescale=rescale)

    @classmethod
    def edit(cls, scale: Scale, image_scale: Scale | None = None) -> "Guidance":
        """InstructPix2Pix, with one scale for the text and one for the image; see `instruct_pix2pix_guidance`.

        Args:
          scale: s_T, the text's scale.
          image_scale: s_I, the image's scale; ``None`` is 1, for which two predictions are enough.
        """
        branches: tuple[Branch, ...] = ("image_only", "full") if image_scale is None else ("null", "image_only", "full")
        return cls(branches, scale=scale, image_scale=image_scale)

    def combine(self, predictions: Float[Array, "nb h w c"]) -> Latents:
        """Combines the predictions of the stacked branches into one."""
        first, *others = split_branches(predictions, len(self.branches))
        if not others:
            return first
        if len(others) == 1:
            guided = classifier_free_guidance(first, others[0], self.scale)
            return guided if self.rescale is None else rescaled_guidance(guided, others[0], self.rescale)
        image_only, full = others
        return instruct_pix2pix_guidance(first, image_only, full, self.scale, self.image_scale)

    def embedding(self, batch: int, dim: int, embeds_image: bool) -> Float[Array, "b {dim}"] | None:
        """The input of a guidance-distilled network, see `guidance_embedding`; ``None`` if nothing is embedded.

        Args:
          batch: b.
          dim: the network's ``time_cond_proj_dim``.
          embeds_image: whether the network takes the image's weight too.
        """
        if not self.is_embedded:
            return None
        w_image = _for_each(self.image_scale, batch) if embeds_image else None
        return guidance_embedding(_for_each(self.scale, batch), dim, w_image)


def _for_each(scale: Scale, batch: int) -> Float[Array, " b"]:
    return jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (batch,))


def choose_guidance(
    scale: float | int,
    image_scale: float | int,
    *,
    embeds_guidance: bool,
    is_edit: bool,
    rescale: float | int = 0,
) -> Guidance:
    """The cheapest guidance that computes what the scales ask for, as diffusers' pipelines read them.

    Args:
      scale: the text's scale; 1 or less is no guidance at all, see `is_guided`.
      image_scale: the image's scale, for InstructPix2Pix; 1 is no image guidance, less is no guidance at all.
      embeds_guidance: whether the UNet has a guidance embedding (``time_cond_proj_dim``).
      is_edit: whether the UNet is an InstructPix2Pix model.
      rescale: φ of `rescaled_guidance`; 0 does not rescale.
    """
    s_T, s_I = np.float32(scale), np.float32(image_scale)
    if embeds_guidance:
        return Guidance.embedded(s_T - np.float32(1), s_I - np.float32(1))
    if not is_guided(scale, image_scale if is_edit else 1):
        return Guidance.none()
    if not is_edit:
        return Guidance.classifier_free(s_T, np.float32(rescale) if rescale else None)
    return Guidance.edit(s_T, None if image_scale == 1 else s_I)


def stack_branches(*branches: Tree) -> Tree:
    """Stacks the inputs of several predictions into one batch, in the given order.

    Everywhere in this package that order is ``[uncond, cond]``, and for InstructPix2Pix ``[uncond, image_only, full]``
    (diffusers' pipeline for InstructPix2Pix has the opposite order: text, image, uncond).

    Args:
      branches: arrays, or trees of arrays, with a leading batch axis.

    Returns:
      The same tree, with the branches one after the other along the batch axis.
    """
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *branches)


def split_branches(prediction: Float[Array, "b ..."], count: int) -> list[Float[Array, "_b ..."]]:
    """Splits the prediction for a batch of `stack_branches` into ``count`` branches, in the order of the stack."""
    return jnp.split(prediction, count)


def is_guided(guidance_scale: float | int, image_guidance_scale: float | int = 1.0) -> bool:
    """Whether scales ask for guidance: the text's must be above 1, and the image's (of an edit) at least 1.

    All of diffusers' pipelines do this: at lower scales they use the conditional prediction as it is, although in the
    formulas below a scale of 0 would give the unconditional one.

    Args:
      guidance_scale: the text's scale.
      image_guidance_scale: the image's scale, for InstructPix2Pix.
    """
    return guidance_scale > 1 and image_guidance_scale >= 1


def classifier_free_guidance(uncond: Latents, cond: Latents, guidance_scale: Scale) -> Latents:
    """ε_u + s (ε_c − ε_u) (Ho and Salimans, 2021, equation 6, with s = 1 + w).

    Args:
      uncond: the prediction without the condition.
      cond: the prediction with it.
      guidance_scale: s, one for all samples or one per sample; 1 is no guidance.

    Returns:
      The guided prediction.
    """
    return uncond + _latent_rank(guidance_scale) * (cond - uncond)


def rescaled_guidance(guided: Latents, cond: Latents, rescale: Scale) -> Latents:
    """φ (std(ε_c) / std(ε_g)) ε_g + (1 − φ) ε_g (Lin et al., 2024, section 3.4): less contrast at high scales.

    Args:
      guided: the guided prediction, ε_g.
      cond: the prediction with the condition, ε_c.
      rescale: φ, one for all samples or one per sample.

    Returns:
      The rescaled prediction.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = cond.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
    return guided * (1 + _latent_rank(rescale) * (ratio - 1))


def instruct_pix2pix_guidance(
    uncond: Latents, image_only: Latents, full: Latents, guidance_scale: Scale, image_guidance_scale: Scale
) -> Latents:
    """ε_u + s_I (ε_i − ε_u) + s_T (ε_t − ε_i) (Brooks et al., 2023, equation 3).

    At s_I = 1 the ε_u cancel, and two passes suffice: ``classifier_free_guidance(image_only, full, guidance_scale)``.

    Args:
      uncond: the prediction with neither text nor image, ε_u.
      image_only: the prediction with the image and the null text, ε_i.
      full: the prediction with both, ε_t.
      guidance_scale: s_T, one for all samples or one per sample.
      image_guidance_scale: s_I, one for all samples or one per sample.

    Returns:
      The guided prediction.
    """
    s_T, s_I = _latent_rank(guidance_scale), _latent_rank(image_guidance_scale)
    return uncond + s_I * (image_only - uncond) + s_T * (full - image_only)


def _latent_rank(scale: Scale) -> Array:
    scale = jnp.asarray(scale)
    return scale.reshape(scale.shape + (1,) * (4 - scale.ndim))


def guidance_embedding(
    w: Float[Array, " b"], dim: int = 256, w_image: Float[Array, " b"] | None = None
) -> Float[Array, "b {dim}"]:
    """The embedding of a guidance weight for a guidance-distilled network: sin ‖ cos of 1000 w (Luo et al., 2023).

    ``w`` is LCM's weight, the usual guidance scale *minus 1*: a pipeline embeds ``guidance_scale - 1``.

    Args:
      w: guidance weights.
      dim: the network's ``time_cond_proj_dim``, an even number.
      w_image: image guidance weights, for a network that takes both: each is embedded in half of ``dim``.

    Returns:
      The embeddings, float32, with frequencies 10000^(−i/(dim/2 − 1)): first the sines, then the cosines.
    """
    if w_image is not None:
        return jnp.concatenate([guidance_embedding(w, dim // 2), guidance_embedding(w_image, dim // 2)], axis=1)
    frequencies = 10_000.0 ** -np.linspace(0, 1, dim // 2)
    angles = 1000 * w.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
