"""A small model of every family: every switch of it, few channels."""

from codi_jax.models.published import CROSS_DOWN, CROSS_UP, DOWN, UP, Config

_NOT_CONTROLNET = {"sample_size", "up_block_types"}

# Widths differ, so that a confusion of two of them cannot pass.
TINY_SD15: Config = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": [CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP],
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
}
TINY_SD21: Config = {**TINY_SD15, "attention_head_dim": [2, 8], "use_linear_projection": True, "upcast_attention": True}
TINY_SDXL: Config = {
    **TINY_SD15,
    "block_out_channels": [32, 48, 64],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "cross_attention_dim": 24 + 20,
}
TINY_UNETS: dict[str, Config] = {
    "sd-1.x": TINY_SD15,
    "sd-2.x": TINY_SD21,
    "sdxl": TINY_SDXL,
    "instruct-pix2pix": {**TINY_SD15, "in_channels": 8},
    "sdxl-instruct-pix2pix": {**TINY_SDXL, "in_channels": 8},
    "inpainting": {**TINY_SD15, "in_channels": 9},
    "guidance-embedding": {**TINY_SD15, "time_cond_proj_dim": 16},
    "four-blocks": {
        **TINY_SD15,
        "sample_size": 16,
        "block_out_channels": [16, 32, 48, 64],
        "down_block_types": [CROSS_DOWN] * 3 + [DOWN],
        "up_block_types": [UP] + [CROSS_UP] * 3,
    },
    "bk-base": {**TINY_SD15, "layers_per_block": 1},
    "layers-per-block": {**TINY_SD15, "layers_per_block": [1, 3]},
    "bk-tiny": {
        **TINY_SD15,
        "layers_per_block": 1,
        "down_block_types": [CROSS_DOWN] * 2,
        "up_block_types": [CROSS_UP] * 2,
        "mid_block_type": None,
    },
    "mid-without-attention": {**TINY_SD15, "mid_block_type": "UNetMidBlock2D"},
    "ssd-1b": {
        **TINY_SDXL,
        "transformer_layers_per_block": [1, [2, 1], [3, 2]],
        "reverse_transformer_layers_per_block": [[3, 1, 2], [2, 1, 1], 1],
    },
}

_TINY_CONTROLNET = {"conditioning_embedding_out_channels": [4, 8, 12]}
TINY_CONTROLNETS: dict[str, Config] = {
    "sd-1.x": {**{k: v for k, v in TINY_SD15.items() if k not in _NOT_CONTROLNET}, **_TINY_CONTROLNET},
    "sdxl": {**{k: v for k, v in TINY_SDXL.items() if k not in _NOT_CONTROLNET}, **_TINY_CONTROLNET},
    "bgr": {
        **{k: v for k, v in TINY_SD15.items() if k not in _NOT_CONTROLNET},
        **_TINY_CONTROLNET,
        "controlnet_conditioning_channel_order": "bgr",
    },
}

TINY_VAE: Config = {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
}
TINY_TEXT: Config = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 3,
    "max_position_embeddings": 16, "projection_dim": 20, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98,
}  # fmt: skip
