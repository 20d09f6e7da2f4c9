"""A model's networks, without their parameters, and how training changes them."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from codi_jax.models.config import Params
from codi_jax.models.controlnet import controlnet_from_unet
from codi_jax.models.unet import UNet2DCondition

_EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of a ControlNet's condition embedding, one per VAE resolution


@dataclass(frozen=True)
class Networks:
    """The networks of a model, without their parameters: hashable, and static in a compiled program.

    Examples:
      >>> Model.from_pretrained("assets/avatars").networks.task

    Attributes:
      unet: the denoising network; ``None`` for an autoencoder alone.
      vae: the autoencoder; its configuration has the scaling factor of the latents.
      text_encoder: the prompt encoder; ``None`` if features are cached.
      text_encoder_2: SDXL's second.
      controlnet: ``None`` for a model without one.
      vae_parts: the number of chunks in which a batch of images is encoded, one after another: more take less memory.
    """

    unet: Any
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    controlnet: Any = None
    vae_parts: int = 1

    def by_name(self) -> dict[str, Any]:
        """The existing networks, by their name in the model's folder."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "vae_parts"}
        return {name: network for name, network in named.items() if network is not None}

    def with_options(self, **options: Any) -> "Networks":
        """The networks with other computation options, such as ``scan_layers``, where they have them."""
        changed = {
            name: replace(network, **{key: value for key, value in options.items() if hasattr(network, key)})
            for name, network in self.by_name().items()
        }
        return replace(self, **changed)

    def recomputing(self, *names: str, remat: bool = True) -> "Networks":
        """The networks, with activation recomputation in the backward pass for those named."""
        networks = self.by_name()
        return replace(self, **{name: replace(networks[name], remat=remat) for name in names if name in networks})

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders, by name."""
        return {name: network for name, network in self.by_name().items() if name.startswith("text_encoder")}

    @property
    def task(self) -> str | None:
        """``"text-to-image"``, ``"edit"`` or ``"inpaint"``; ``None`` for any other UNet."""
        if self.unet is None:
            return None
        latents = self.vae.config.latent_channels
        tasks = {latents: "text-to-image", 2 * latents: "edit", 2 * latents + 1: "inpaint"}
        return tasks.get(self.unet.config.in_channels)

    @property
    def is_instruct_pix2pix(self) -> bool:
        """Whether the UNet takes the latents of a source image along with the noisy ones."""
        return self.task == "edit"

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet is an SDXL one: conditioned on image sizes and pooled text."""
        return self.unet is not None and self.unet.config.addition_embed_type == "text_time"


def add_controlnet(networks: Networks) -> Networks:
    """The networks plus a ControlNet, a copy of the UNet's encoder, for condition images of the VAE's size."""
    channels = _EMBEDDING_CHANNELS[: len(networks.vae.config.block_out_channels)]
    abstract = networks.unet.abstract_params()
    controlnet, _ = controlnet_from_unet(networks.unet, abstract, jax.random.key(0), channels)
    return replace(networks, controlnet=controlnet)


def init_controlnet(networks: Networks, unet_params: Params, key: Key[Array, ""]) -> Params:
    """Initial parameters for the ControlNet of `add_controlnet`: the UNet's, with zero output layers."""
    channels = networks.controlnet.config.conditioning_embedding_out_channels
    return controlnet_from_unet(networks.unet, unet_params, key, channels)[1]


def widen_unet(unet: UNet2DCondition) -> UNet2DCondition:
    """A text-to-image UNet that also takes the latents of a source image: twice as many input channels."""
    return replace(unet, config=replace(unet.config, in_channels=2 * unet.config.in_channels))


def widen_params(params: Params) -> Params:
    """The parameters for `widen_unet`, which do not look at the source image yet.

    The new input channels of the first convolution are zeros (Brooks et al., 2023, section 3.2).

    Args:
      params: the UNet's parameters.
    """
    kernel = params["conv_in"]["kernel"]
    widened = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=2)
    return {**params, "conv_in": {**params["conv_in"], "kernel": widened}}


def refuse_guidance_input(unet: Any, remedy: str) -> None:
    """Refuses a UNet that takes guidance as an input, for training that provides none.

    Args:
      unet: the module of the teacher, or of the trained model.
      remedy: what to do instead, which ends the sentence.

    Raises:
      ValueError: if the UNet takes guidance as an input.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"the teacher takes its guidance as an input (time_cond_proj_dim), {remedy}.")


def require_instruct_pix2pix(networks: Networks, flag: str) -> None:
    """Refuses a model that takes no source image.

    Args:
      networks: the model's networks.
      flag: the flag that named the model, for the message.

    Raises:
      ValueError: if the model is not an InstructPix2Pix model.
    """
    if not networks.is_instruct_pix2pix:
        channels, latents = networks.unet.config.in_channels, networks.vae.config.latent_channels
        raise ValueError(
            f"{flag}: its UNet has {channels} input channels, but an InstructPix2Pix model's has {2 * latents}: "
            "train one with train_instruct_pix2pix_flax.py first."
        )
