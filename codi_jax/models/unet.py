"""The conditional UNet of Stable Diffusion 1.x, 2.x and SDXL (Rombach et al., 2022; Podell et al., 2023).

Built from the ``config.json`` of diffusers' ``UNet2DConditionModel``, pruned shapes included: its parameter tree is
that model's state dict. Tensors are NHWC.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from codi_jax.models.config import Params
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.kernels.group_norm import GroupNorm
from codi_jax.models.layers import TimestepEmbedding, conv, timestep_embedding
from codi_jax.models.network import Network
from codi_jax.models.unet_blocks import DownBlock2D, MidBlock2D, UpBlock2D
from codi_jax.models.unet_config import UNetConfig


class UNetEncoder(Network):
    """The contracting half: input convolution, time embedding, down blocks and mid block.

    The UNet continues it with a decoder, the ControlNet with its output convolutions.

    Attributes:
      config: the model's ``config.json``.
      dtype: the computation's dtype; parameters may be stored in another.
      attention: the kernel, see `codi_jax.models.kernels.attention`.
      remat: whether each residual and each transformer block is recomputed in the backward pass instead of stored.
      scan_layers: whether consecutive transformer blocks (up to ten in SDXL) are compiled as a loop, which takes much
        less time.
    """

    config: Any
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: bool = False
    scan_layers: bool = False

    def setup(self) -> None:
        config = self.config
        self.conv_in = conv(config.block_out_channels[0], dtype=self.dtype)
        width = 4 * config.block_out_channels[0]
        self.time_embedding = TimestepEmbedding(width, getattr(config, "time_cond_proj_dim", None), self.dtype)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(width, None, self.dtype)
        self.down_blocks = [self._down_block(i) for i in range(config.num_blocks)]
        if config.mid_block_type is not None:
            self.mid_block = self._mid_block()

    def _down_block(self, i: int) -> DownBlock2D:
        config = self.config
        return DownBlock2D(
            features=config.block_out_channels[i],
            in_features=config.block_out_channels[max(i - 1, 0)],
            num_layers=config.layers[i],
            transformer_layers=config.down_transformer_layers(i),
            num_heads=config.heads[i],
            add_downsample=i < config.num_blocks - 1,
            **self._common(),
        )

    def _mid_block(self) -> MidBlock2D:
        config = self.config
        depth = config.transformer_layers[-1]
        depth = depth[0] if isinstance(depth, tuple) else depth
        return MidBlock2D(
            features=config.block_out_channels[-1],
            transformer_layers=(depth,) if config.mid_block_type == "UNetMidBlock2DCrossAttn" else (),
            num_heads=config.heads[-1],
            **self._common(),
        )

    def _common(self) -> dict[str, Any]:
        names = ("config", "attention", "remat", "scan_layers", "dtype")
        return {name: getattr(self, name) for name in names}

    def embed_time(
        self,
        timesteps: Int[Array, "b"] | Float[Array, "b"],
        timestep_cond: Float[Array, "b c"] | None = None,
        added_cond: dict[str, Array] | None = None,
    ) -> Float[Array, "b e"]:
        """Embeds time, guidance (``timestep_cond``) and SDXL's image sizes and pooled text (``added_cond``)."""
        config = self.config
        flags: dict[str, Any] = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        sinusoids = timestep_embedding(timesteps, config.block_out_channels[0], **flags)
        temb = self.time_embedding(sinusoids.astype(self.dtype), timestep_cond)
        if config.addition_embed_type == "text_time":
            if added_cond is None or not {"text_embeds", "time_ids"} <= added_cond.keys():
                raise ValueError("an SDXL model needs added_cond with 'text_embeds' [b, d] and 'time_ids' [b, 6].")
            ids = added_cond["time_ids"]
            sizes = timestep_embedding(ids.reshape(-1), config.addition_time_embed_dim, **flags)
            sizes = sizes.reshape(ids.shape[0], -1).astype(self.dtype)
            temb = temb + self.add_embedding(
                jnp.concatenate([added_cond["text_embeds"].astype(self.dtype), sizes], axis=-1)
            )
        elif added_cond:
            raise ValueError("added_cond was given, but the model has no addition_embed_type to take it.")
        return temb

    def encode(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"], context: Float[Array, "b s d"]
    ) -> tuple[Array, tuple[Array, ...], dict[str, Array]]:
        """Runs the down blocks and the mid block on the output of ``conv_in``.

        Returns:
          The lowest features, the skip connections in the order of creation, and the intermediates.
        """
        skips, intermediates = (x,), {}
        for i, block in enumerate(self.down_blocks):
            x, block_skips, before_downsampler = block(x, temb, context)
            skips += block_skips
            intermediates[f"down_blocks_{i}"] = x
            intermediates[f"down_blocks_{i}/before_downsampler"] = before_downsampler
        if self.config.mid_block_type is not None:
            x = self.mid_block(x, temb, context)
            intermediates["mid_block"] = x
        return x, skips, intermediates

    def check_inputs(self, sample: Array, encoder_hidden_states: Array) -> None:
        """Refuses inputs with a wrong width, in a clearer message than a failing matrix product gives."""
        config = self.config
        if sample.shape[-1] != config.in_channels:
            raise ValueError(
                f"sample has {sample.shape[-1]} channels (shape {sample.shape}, NHWC), but the model takes "
                f"in_channels = {config.in_channels}: 4 for text-to-image, 8 for InstructPix2Pix, 9 for inpainting."
            )
        for dim in config.context_dims:
            if encoder_hidden_states.shape[-1] != dim:
                raise ValueError(
                    f"encoder_hidden_states are {encoder_hidden_states.shape[-1]} wide, but the model's "
                    f"cross_attention_dim is {dim}: these are text features of another model family."
                )


class UNet2DCondition(UNetEncoder):
    """The denoising network.

    Attributes:
      config: a `UNetConfig`.
      dtype: the computation's dtype.
      attention: the attention kernel.
      remat: recompute blocks in the backward pass.
      scan_layers: compile consecutive transformer blocks as a loop.
    """

    config: UNetConfig

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.up_blocks = [self._up_block(i) for i in range(config.num_blocks)]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.norm_eps, self.dtype)
        self.conv_out = conv(config.out_channels, dtype=self.dtype)

    def _up_block(self, i: int) -> UpBlock2D:
        config = self.config
        return UpBlock2D(
            features=config.block_out_channels[::-1][i],
            num_layers=config.layers[::-1][i] + 1,
            transformer_layers=config.up_transformer_layers(i),
            num_heads=config.heads[::-1][i],
            add_upsample=i < config.num_blocks - 1,
            **self._common(),
        )

    def __call__(
        self,
        sample: Float[Array, "b h w c_in"],
        timesteps: Int[Array, "b"] | Float[Array, "b"],
        encoder_hidden_states: Float[Array, "b s d"],
        timestep_cond: Float[Array, "b c_w"] | None = None,
        added_cond: dict[str, Array] | None = None,
        down_residuals: tuple[Array, ...] | None = None,
        mid_residual: Float[Array, "b h_low w_low c_low"] | None = None,
    ) -> tuple[Float[Array, "b h w c_out"], dict[str, Array]]:
        """Predicts the noise, the velocity or the clean latent, whichever the model was trained for.

        Args:
          sample: noisy latents, followed by the image or mask latents in the channels for 8- and 9-channel models.
          timesteps: training times, 0 to 999, one per sample.
          encoder_hidden_states: text features.
          timestep_cond: guidance embedding, for models with ``time_cond_proj_dim``.
          added_cond: for SDXL, ``{"text_embeds": [b, d], "time_ids": [b, 6]}``.
          down_residuals: a ControlNet's outputs, one for each skip connection.
          mid_residual: a ControlNet's output for the lowest features.

        Returns:
          The prediction, and the intermediates: the output of every block by name (``down_blocks_0``, ``mid_block``,
          ``up_blocks_0``, …, and ``down_blocks_0/before_downsampler``), for feature distillation.

        Raises:
          ValueError: if inputs do not fit the model.
        """
        self.check_inputs(sample, encoder_hidden_states)
        context = encoder_hidden_states.astype(self.dtype)
        temb = self.embed_time(timesteps, timestep_cond, added_cond)
        x, skips, intermediates = self.encode(self.conv_in(sample.astype(self.dtype)), temb, context)
        return self.decode(x, skips, intermediates, temb, context, down_residuals, mid_residual)

    def decode(
        self,
        x: Float[Array, "b h_low w_low c_low"],
        skips: tuple[Array, ...],
        intermediates: dict[str, Array],
        temb: Float[Array, "b e"],
        context: Float[Array, "b s d"],
        down_residuals: tuple[Array, ...] | None = None,
        mid_residual: Float[Array, "b h_low w_low c_low"] | None = None,
    ) -> tuple[Float[Array, "b h w c_out"], dict[str, Array]]:
        """The expanding half, from what `encode` returned; arguments as in `__call__`."""
        if down_residuals is not None:
            if len(down_residuals) != len(skips):
                raise ValueError(
                    f"the ControlNet gives {len(down_residuals)} residuals, but the UNet has {len(skips)} skip "
                    "connections: they are of different architectures."
                )
            skips = tuple(s + r.astype(s.dtype) for s, r in zip(skips, down_residuals, strict=True))
        if mid_residual is not None:
            x = x + mid_residual.astype(x.dtype)
        intermediates = dict(intermediates)
        for i, block in enumerate(self.up_blocks):
            skips, block_skips = skips[: -block.num_layers], skips[-block.num_layers :]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = block(x, block_skips, temb, context, size)
            intermediates[f"up_blocks_{i}"] = x
        return self.conv_out(nn.silu(self.conv_norm_out(x))), intermediates

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters for training from scratch, float32."""
        config = self.config
        size = 2**config.num_blocks  # small, and divisible by every downsampler
        cond = None if config.time_cond_proj_dim is None else jnp.zeros((1, config.time_cond_proj_dim))
        return dict(
            self.init(
                key,
                jnp.zeros((1, size, size, config.in_channels)),
                jnp.zeros((1,), jnp.int32),
                jnp.zeros((1, 1, config.context_dims[0])),
                cond,
                config.example_added_cond(),
            )["params"]
        )
