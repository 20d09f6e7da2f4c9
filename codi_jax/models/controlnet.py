"""ControlNet: a copy of the UNet's encoder that reads an image (Zhang et al., 2023), for SD 1.x, 2.x and SDXL."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from codi_jax.models.config import Channels, ConfigError, Params
from codi_jax.models.layers import conv, zero_conv
from codi_jax.models.unet import UNet2DCondition, UNetEncoder
from codi_jax.models.unet_config import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """The ``config.json`` of a ``ControlNetModel``.

    Beyond diffusers, ``mid_block_type`` may be null and ``layers_per_block`` a list, so that a ControlNet can be the
    copy of a pruned UNet's encoder.
    """

    class_names: ClassVar[tuple[str, ...]] = ("ControlNetModel", "FlaxControlNetModel")
    # diffusers' former Flax ControlNet wrote them; neither enters a forward pass.
    ignored_keys: ClassVar[frozenset[str]] = EncoderConfig.ignored_keys | {"dropout", "sample_size"}

    conditioning_channels: Channels = 3
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    conditioning_embedding_out_channels: tuple[Channels, ...] = (16, 32, 96, 256)
    global_pool_conditions: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditioning_embedding_out_channels:
            raise ConfigError("conditioning_embedding_out_channels needs at least one entry.")

    @property
    def conditioning_downscale(self) -> int:
        """How many times larger the condition image is than the latents, on each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetConditioningEmbedding(nn.Module):
    """A small convolutional network from the condition image to features of the latents' size, ending in zeros."""

    features: int
    channels: tuple[int, ...]
    dtype: Any

    def setup(self) -> None:
        self.conv_in = conv(self.channels[0], dtype=self.dtype)
        blocks = []
        for narrow, wide in zip(self.channels[:-1], self.channels[1:], strict=True):
            blocks += [conv(narrow, dtype=self.dtype), conv(wide, stride=2, dtype=self.dtype)]
        self.blocks = blocks
        self.conv_out = zero_conv(self.features, 3, dtype=self.dtype)

    def __call__(self, image: Float[Array, "b hp wp ch"]) -> Float[Array, "b h w c"]:
        x = nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """The conditioning network.

    Attributes:
      config: a `ControlNetConfig`.
      dtype: the computation's dtype.
      attention: the attention kernel.
      remat: recompute blocks in the backward pass.
      scan_layers: compile consecutive transformer blocks as a loop.
    """

    config: ControlNetConfig

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.block_out_channels[0], config.conditioning_embedding_out_channels, self.dtype
        )
        channels = [config.block_out_channels[0]]
        for i, features in enumerate(config.block_out_channels):
            has_downsampler = i < config.num_blocks - 1
            channels += [features] * (config.layers[i] + has_downsampler)
        self.controlnet_down_blocks = [zero_conv(c, dtype=self.dtype) for c in channels]
        self.controlnet_mid_block = zero_conv(config.block_out_channels[-1], dtype=self.dtype)

    def __call__(
        self,
        sample: Float[Array, "b h w c_in"],
        timesteps: Int[Array, "b"] | Float[Array, "b"],
        encoder_hidden_states: Float[Array, "b s d"],
        controlnet_cond: Float[Array, "b h_image w_image c_image"],
        conditioning_scale: float | Float[Array, ""] = 1.0,
        added_cond: dict[str, Array] | None = None,
    ) -> tuple[tuple[Array, ...], Float[Array, "b h_low w_low c_low"]]:
        """Computes what the condition adds to the UNet's features.

        Args:
          sample: noisy latents.
          timesteps: training times, one per sample.
          encoder_hidden_states: text features.
          controlnet_cond: the condition image in [0, 1], RGB, at the size of the final image.
          conditioning_scale: a factor on every output.
          added_cond: SDXL's ``text_embeds`` and ``time_ids``.

        Returns:
          One residual for each of the UNet's skip connections, and one for its lowest features.

        Raises:
          ValueError: if inputs do not fit the model or each other.
        """
        self.check_inputs(sample, encoder_hidden_states)
        self._check_condition(sample, controlnet_cond)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = jnp.flip(controlnet_cond, axis=-1)
        context = encoder_hidden_states.astype(self.dtype)
        temb = self.embed_time(timesteps, added_cond=added_cond)
        x = self.conv_in(sample.astype(self.dtype)) + self.controlnet_cond_embedding(controlnet_cond.astype(self.dtype))
        x, skips, _ = self.encode(x, temb, context)
        scale = jnp.asarray(conditioning_scale, self.dtype)
        residuals = tuple(block(s) * scale for block, s in zip(self.controlnet_down_blocks, skips, strict=True))
        return residuals, self.controlnet_mid_block(x) * scale

    def _check_condition(self, sample: Array, controlnet_cond: Array) -> None:
        scale = self.config.conditioning_downscale
        wanted = (sample.shape[0], sample.shape[1] * scale, sample.shape[2] * scale, self.config.conditioning_channels)
        if controlnet_cond.shape != wanted:
            raise ValueError(
                f"the condition image has shape {controlnet_cond.shape}, but these latents need {wanted} "
                "(batch, height, width, channels): resize the condition to the size of the image."
            )

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters for training from scratch, float32."""
        config = self.config
        size = 2**config.num_blocks
        pixels = size * config.conditioning_downscale
        return dict(
            self.init(
                key,
                jnp.zeros((1, size, size, config.in_channels)),
                jnp.zeros((1,), jnp.int32),
                jnp.zeros((1, 1, config.context_dims[0])),
                jnp.zeros((1, pixels, pixels, config.conditioning_channels)),
                added_cond=config.example_added_cond(),
            )["params"]
        )


@dataclasses.dataclass(frozen=True)
class ControlNets:
    """Several ControlNets with a condition each, whose outputs add up.

    Attributes:
      nets: the networks; the parameters are by their numbers, from ``"0"``.
    """

    nets: tuple[ControlNet, ...]

    @property
    def dtype(self) -> Any:
        """The computation's dtype."""
        return self.nets[0].dtype

    def abstract_params(self, dtype: DTypeLike | None = None) -> Params:
        """The parameter trees by number, as `codi_jax.models.network.Network.abstract_params`."""
        return {str(number): net.abstract_params(dtype) for number, net in enumerate(self.nets)}

    def apply(
        self,
        variables: Mapping[str, Any],
        sample: Float[Array, "b h w c_in"],
        timesteps: Int[Array, "b"] | Float[Array, "b"],
        encoder_hidden_states: Float[Array, "b s d"],
        controlnet_cond: Float[Array, "b h_image w_image c_all"],
        conditioning_scale: Float[Array, "k"] | None = None,
        added_cond: dict[str, Array] | None = None,
    ) -> tuple[tuple[Array, ...], Float[Array, "b h_low w_low c_low"]]:
        """The sum of the networks' outputs; arguments and errors as in `ControlNet.__call__`.

        Args:
          variables: ``{"params": parameters}``.
          sample: noisy latents.
          timesteps: training times, one per sample.
          encoder_hidden_states: text features.
          controlnet_cond: the networks' condition images, one after another along the channels.
          conditioning_scale: a factor for each network. Default: 1.
          added_cond: SDXL's ``text_embeds`` and ``time_ids``.
        """
        ends = np.cumsum([net.config.conditioning_channels for net in self.nets])[:-1]
        images = jnp.split(controlnet_cond, ends, axis=-1)
        scales = jnp.ones(len(self.nets)) if conditioning_scale is None else conditioning_scale
        inputs = sample, timesteps, encoder_hidden_states
        outputs = [
            net.apply({"params": variables["params"][str(number)]}, *inputs, images[number], scales[number], added_cond)
            for number, net in enumerate(self.nets)
        ]
        return jax.tree.map(lambda *each: sum(each[1:], each[0]), *outputs)


def controlnet_from_unet(
    unet: UNet2DCondition,
    unet_params: Params,
    key: Array,
    conditioning_embedding_out_channels: tuple[Channels, ...] = (16, 32, 96, 256),
) -> tuple[ControlNet, Params]:
    """A new ControlNet for a UNet: the encoder's weights copied, every output zero.

    Added to the UNet it changes nothing until it is trained (Zhang et al., 2023, section 3.1).

    Args:
      unet: the UNet's module.
      unet_params: its parameters; their arrays are shared, not copied.
      key: for the weights of the condition embedding, the only random ones.
      conditioning_embedding_out_channels: the widths of that embedding; one entry more than halvings of resolution.

    Returns:
      The module and its parameters.
    """
    shared = {field.name: getattr(unet.config, field.name) for field in dataclasses.fields(EncoderConfig)}
    config = ControlNetConfig(**shared, conditioning_embedding_out_channels=conditioning_embedding_out_channels)
    module = ControlNet(config, unet.dtype, unet.attention, unet.remat, unet.scan_layers)
    abstract = module.abstract_params()

    embedding = ControlNetConditioningEmbedding(
        config.block_out_channels[0], config.conditioning_embedding_out_channels, jnp.float32
    )
    size = config.conditioning_downscale
    image = jnp.zeros((1, size, size, config.conditioning_channels))
    params: Params = {"controlnet_cond_embedding": embedding.init(key, image)["params"]}
    for name, tree in abstract.items():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            params[name] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
        elif name != "controlnet_cond_embedding":
            params[name] = unet_params[name]
    # The ControlNet has no use for a distilled UNet's guidance embedding.
    params["time_embedding"] = {k: v for k, v in unet_params["time_embedding"].items() if k != "cond_proj"}
    return module, params
