"""The published architectures, as in their ``config.json`` files: to plan and measure without weights.

Only keys that differ from diffusers' defaults are listed; the files themselves list more of the defaults.
"""

from typing import Any

Config = dict[str, Any]

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

SD15_UNET: Config = {"sample_size": 64, "cross_attention_dim": 768}
SD21_UNET: Config = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET: Config = {
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
SMALL_SD_UNET: Config = {**SD15_UNET, "layers_per_block": 1}
TINY_SD_UNET: Config = {
    **SD15_UNET,
    "layers_per_block": 1,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [CROSS_DOWN] * 3,
    "up_block_types": [CROSS_UP] * 3,
    "mid_block_type": None,
}

UNETS: dict[str, Config] = {
    "sd-1.4": SD15_UNET,
    "sd-1.5": SD15_UNET,
    "sd-2.1": SD21_UNET,
    "sdxl-base": SDXL_UNET,
    "sd-instruct-pix2pix": {**SD15_UNET, "in_channels": 8},
    "sdxl-instruct-pix2pix": {**SDXL_UNET, "in_channels": 8},
    "sd-inpainting": {**SD15_UNET, "in_channels": 9},
    "lcm-sdxl": {**SDXL_UNET, "time_cond_proj_dim": 256},
    "small-sd": SMALL_SD_UNET,
    "tiny-sd": TINY_SD_UNET,
}

_NOT_CONTROLNET = {"sample_size", "up_block_types"}
CONTROLNETS: dict[str, Config] = {
    "controlnet-sd-1.5": {k: v for k, v in SD15_UNET.items() if k not in _NOT_CONTROLNET},
    "controlnet-sdxl": {k: v for k, v in SDXL_UNET.items() if k not in _NOT_CONTROLNET},
}

VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}

TEXT_ENCODERS: dict[str, Config] = {
    "clip-vit-l (sd-1.x, sdxl)": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0,
    },
    "openclip-vit-h (sd-2.x)": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
        "projection_dim": 512, "hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0,
    },
    "openclip-vit-g (sdxl)": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
        "projection_dim": 1280, "hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0,
    },
}  # fmt: skip
