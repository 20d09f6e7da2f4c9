"""The ``config.json`` of the UNet, and the part of it that the ControlNet shares."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from codi_jax.models.config import (
    Channels,
    ConfigError,
    Depth,
    Epsilon,
    Layers,
    ModelConfig,
    Range,
    Side,
    per_block,
    require_even,
)

DownBlockType = Literal["CrossAttnDownBlock2D", "DownBlock2D"]
UpBlockType = Literal["CrossAttnUpBlock2D", "UpBlock2D"]
MidBlockType = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]

_MAX_DEPTH = 400  # SDXL has 34


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """The keys that UNet and ControlNet share, for the contracting half, with diffusers' defaults."""

    ignored_keys: ClassVar[frozenset[str]] = frozenset({
        "dtype", "use_memory_efficient_attention", "split_head_dim",  # from diffusers' former Flax models
    })  # fmt: skip

    in_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Range(0, 1)] = 0
    down_block_types: tuple[DownBlockType, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: MidBlockType | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: Literal[False] | tuple[Literal[False], ...] = False
    block_out_channels: tuple[Channels, ...] = (320, 640, 1280, 1280)
    layers_per_block: Layers | tuple[Layers, ...] = 2
    downsample_padding: Literal[1] = 1
    mid_block_scale_factor: Annotated[float, Range(1.0, 1.0)] = 1.0
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Channels = 32
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Channels | tuple[Channels, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth | tuple[Depth, ...], ...] = 1
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Channels | tuple[Channels, ...] = 8
    num_attention_heads: Channels | tuple[Channels, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_embed_type_num_heads: Channels = 64
    addition_time_embed_dim: Channels | None = None
    num_class_embeds: None = None
    # True in SD 2.1: queries and keys in float32. `dot_product_attention` always accumulates scores in float32.
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default"] = "default"
    projection_class_embeddings_input_dim: Channels | None = None

    def __post_init__(self) -> None:
        n = self.num_blocks
        for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block"):
            per_block(getattr(self, key), n, key)
        for heads, channels in zip(self.heads, self.block_out_channels, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                raise ConfigError(
                    f"block_out_channels = {channels} must be divisible by the {heads} attention heads "
                    f"(attention_head_dim) and by norm_num_groups = {self.norm_num_groups}."
                )
        if (depth := sum(sum(self.down_transformer_layers(block)) for block in range(n))) > _MAX_DEPTH:
            raise ConfigError(f"the model has {depth} transformer blocks on its way down; {_MAX_DEPTH} can be built.")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ConfigError(
                "addition_embed_type = 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim."
            )
        if self.addition_embed_type and self.text_embeds_dim < 1:
            raise ConfigError(
                f"projection_class_embeddings_input_dim = {self.projection_class_embeddings_input_dim} has no room for "
                f"the text next to six embeddings of addition_time_embed_dim = {self.addition_time_embed_dim}."
            )
        require_even(self, "addition_time_embed_dim")
        if self.block_out_channels[0] % 2:
            raise ConfigError(f"block_out_channels = {self.block_out_channels[0]} must be even in the first block.")

    @property
    def num_blocks(self) -> int:
        """The number of resolutions."""
        return len(self.down_block_types)

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads of each block.

        ``attention_head_dim`` is misnamed in every published file: it is the number of heads, as diffusers reads it.
        """
        key = "attention_head_dim" if self.num_attention_heads is None else "num_attention_heads"
        return per_block(getattr(self, key), self.num_blocks, key)

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of residual blocks of each down block."""
        return per_block(self.layers_per_block, self.num_blocks, "layers_per_block")

    @property
    def context_dims(self) -> tuple[int, ...]:
        """The width of ``encoder_hidden_states`` at each block."""
        return per_block(self.cross_attention_dim, self.num_blocks, "cross_attention_dim")

    @property
    def transformer_layers(self) -> tuple[int | tuple[int, ...], ...]:
        """The number of transformer blocks of each down block, one number or one per attention."""
        return per_block(self.transformer_layers_per_block, self.num_blocks, "transformer_layers_per_block")

    def example_added_cond(self) -> dict[str, Array] | None:
        """Zeros in the shapes of SDXL's ``added_cond``, for initialization; ``None`` for models without."""
        if self.addition_embed_type is None:
            return None
        return {"text_embeds": jnp.zeros((1, self.text_embeds_dim)), "time_ids": jnp.zeros((1, 6))}

    @property
    def text_embeds_dim(self) -> int:
        """The width of SDXL's pooled text: the projection's input minus six embedded sizes."""
        assert self.projection_class_embeddings_input_dim is not None
        assert self.addition_time_embed_dim is not None
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    def down_transformer_layers(self, block: int) -> tuple[int, ...]:
        """The depth of each `Transformer2DModel` of a down block; empty for a block without attention."""
        if self.down_block_types[block] == "DownBlock2D":
            return ()
        return per_block(self.transformer_layers[block], self.layers[block], f"transformer_layers_per_block[{block}]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """The ``config.json`` of a ``UNet2DConditionModel``."""

    class_names: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel", "FlaxUNet2DConditionModel")

    sample_size: Side | tuple[Side, Side] | None = None
    out_channels: Channels = 4
    center_input_sample: Literal[False] = False
    up_block_types: tuple[UpBlockType, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    dropout: Annotated[float, Range(0.0, 0.0)] = 0.0
    reverse_transformer_layers_per_block: tuple[Depth | tuple[Depth, ...], ...] | None = None
    dual_cross_attention: Literal[False] = False
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: Annotated[float, Range(1.0, 1.0)] = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: Channels | None = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    # Not in diffusers: the guidance embedding is for two weights, the text's and the image's.
    embeds_image_guidance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embeds_image_guidance and (self.time_cond_proj_dim is None or self.time_cond_proj_dim % 4):
            raise ConfigError(
                f"embeds_image_guidance = true needs a time_cond_proj_dim that 4 divides: {self.time_cond_proj_dim}."
            )
        require_even(self, "time_cond_proj_dim")
        if len(self.up_block_types) != self.num_blocks:
            raise ConfigError(
                f"up_block_types has {len(self.up_block_types)} entries and down_block_types {self.num_blocks}; "
                "a UNet needs as many of each."
            )
        if self.transformer_layers_are_nested and self.reverse_transformer_layers_per_block is None:
            raise ConfigError(
                "a transformer_layers_per_block with a list for each block needs reverse_transformer_layers_per_block, "
                "because an up block has one attention more."
            )

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.embeds_image_guidance:
            del values["embeds_image_guidance"]  # diffusers warns about unknown keys
        return values

    @property
    def transformer_layers_are_nested(self) -> bool:
        """Whether the attentions of one block differ in depth, as in SSD-1B."""
        return any(isinstance(layers, tuple) for layers in self.transformer_layers)

    def up_transformer_layers(self, block: int) -> tuple[int, ...]:
        """The depth of each `Transformer2DModel` of an up block; empty for a block without attention."""
        if self.up_block_types[block] == "UpBlock2D":
            return ()
        reverse = self.reverse_transformer_layers_per_block
        layers = self.transformer_layers[::-1] if reverse is None else reverse
        num_layers = self.layers[::-1][block] + 1
        return per_block(layers[block], num_layers, f"reverse_transformer_layers_per_block[{block}]")
