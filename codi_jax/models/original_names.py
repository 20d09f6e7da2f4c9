"""The names that tensors have in the original code of Stable Diffusion: one table, read in both directions.

The code of Rombach et al. (2022) and Podell et al. (2023) numbers the UNet's blocks where diffusers nests them, and
OpenCLIP keeps the projections of queries, keys and values in one tensor.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from codi_jax.models.config import Params
from codi_jax.models.names import torch_name

Kind = Literal["same", "window", "transposed", "query", "key", "value"]
"""How a tensor is kept: as here; with a 1 × 1 window; transposed; or as a third of the rows of a larger one."""

THIRDS: tuple[Kind, ...] = ("query", "key", "value")
"""The thirds of a tensor of projections, from the first row."""


@dataclass(frozen=True)
class Original:
    """Where a tensor is in an original file.

    Attributes:
      name: its name there, without the network's prefix.
      kind: how it is kept there.
    """

    name: str
    kind: Kind = "same"


_UNET_LAYERS = {
    ("conv_in",): "input_blocks.0.0",
    ("conv_norm_out",): "out.0",
    ("conv_out",): "out.2",
    ("time_embedding", "linear_1"): "time_embed.0",
    ("time_embedding", "linear_2"): "time_embed.2",
    ("add_embedding", "linear_1"): "label_emb.0.0",
    ("add_embedding", "linear_2"): "label_emb.0.2",
    ("mid_block", "resnets_0"): "middle_block.0",
    ("mid_block", "attentions_0"): "middle_block.1",
    ("mid_block", "resnets_1"): "middle_block.2",
}
_CONTROLNET_LAYERS = {
    ("controlnet_mid_block",): "middle_block_out.0",
    ("controlnet_cond_embedding", "conv_in"): "input_hint_block.0",
}
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip

_VAE = (
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r".down.\1.downsample.conv."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r".up.\1.upsample.conv."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
_OPEN_CLIP_PROJECTION = re.compile(r"(?P<block>.*)\.self_attn\.(?P<which>[qkv])_proj\.(?P<leaf>weight|bias)")


def unet_originals(params: Params) -> dict[str, Original]:
    """Where each tensor of a UNet or a ControlNet is, by its name in diffusers.

    Args:
      params: the network's parameters, or their shapes.
    """
    blocks = _UNET_LAYERS | dict(_unet_blocks(params)) | dict(_controlnet_blocks(params))
    found = {}
    for path in _paths(params):
        depth = next((n for n in range(len(path) - 1, 0, -1) if path[:n] in blocks), 0)
        if not depth:
            continue
        *rest, leaf = path[depth:]
        inner = [_RESNET.get(rest[0], rest[0]), *rest[1:]] if rest else []
        if "attentions" in path[depth - 1]:
            inner = [torch_name((*rest, "kernel")).removesuffix(".weight")] if rest else []
        parts = [blocks[path[:depth]], *inner, torch_name((leaf,))]
        found[torch_name(path)] = Original(".".join(parts))
    return found


def _unet_blocks(params: Params) -> Iterator[tuple[tuple[str, ...], str]]:
    """Residual blocks, attentions and samplers of a UNet or a ControlNet by their number in the original code."""
    number = 1  # 0 is conv_in
    for block, layers in _numbered(params, "down_blocks"):
        for name, _ in _numbered(layers, "resnets"):
            yield (block, name), f"input_blocks.{number}.0"
            yield (block, name.replace("resnets", "attentions")), f"input_blocks.{number}.1"
            number += 1
        if "downsamplers_0" in layers:
            yield (block, "downsamplers_0", "conv"), f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block, layers in _numbered(params, "up_blocks"):
        for name, _ in _numbered(layers, "resnets"):
            yield (block, name), f"output_blocks.{number}.0"
            yield (block, name.replace("resnets", "attentions")), f"output_blocks.{number}.1"
            number += 1
        yield (block, "upsamplers_0"), f"output_blocks.{number - 1}.{2 if 'attentions_0' in layers else 1}"


def _controlnet_blocks(params: Params) -> Iterator[tuple[tuple[str, ...], str]]:
    if "controlnet_cond_embedding" not in params:
        return
    yield from _CONTROLNET_LAYERS.items()
    number = 2
    for name, _ in _numbered(params["controlnet_cond_embedding"], "blocks"):
        yield ("controlnet_cond_embedding", name), f"input_hint_block.{number}"
        number += 2
    yield ("controlnet_cond_embedding", "conv_out"), f"input_hint_block.{number}"
    for index, (name, _) in enumerate(_numbered(params, "controlnet_down_blocks")):
        yield (name,), f"zero_convs.{index}.0"


def vae_originals(params: Params) -> dict[str, Original]:
    """The same for an autoencoder, whose decoder's blocks are numbered from the largest resolution."""
    last = len(_numbered(params["decoder"], "up_blocks")) - 1
    found = {}
    for path in _paths(params):
        name = torch_name(path)
        original, kind = _renamed(name, _VAE), "same"
        original = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", original)
        if attention := re.fullmatch(r"(.*\.attn_1)\.(.*)\.(weight|bias)", original):
            block, layer, leaf = attention.groups()
            original = f"{block}.{_VAE_ATTENTION[layer]}.{leaf}"
            kind = "window" if layer != "group_norm" and leaf == "weight" else "same"
        found[name] = Original(original, kind)
    return found


def clip_originals(params: Params) -> dict[str, Original]:
    """The same for a text encoder in the form of transformers (SD 1.x, and the first one of SDXL)."""
    return {name: Original(name) for name in map(torch_name, _paths(params))}


def open_clip_originals(params: Params) -> dict[str, Original]:
    """The same for a text encoder in the form of OpenCLIP (SD 2.x, and the second one of SDXL)."""
    found = {}
    for name in map(torch_name, _paths(params)):
        original, kind = _renamed(name, _OPEN_CLIP), "same"
        if projection := _OPEN_CLIP_PROJECTION.fullmatch(original):
            original = f"{projection['block']}.attn.in_proj_{projection['leaf']}"
            kind = THIRDS["qkv".index(projection["which"])]
        elif name == "text_projection.weight":
            original, kind = "text_projection", "transposed"
        found[name] = Original(original, kind)
    return found


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _paths(params: Params, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _paths(value, (*above, name))
        else:
            yield (*above, name)


def _numbered(tree: Any, name: str) -> list[tuple[str, Any]]:
    count = sum(key.startswith(f"{name}_") for key in tree)
    return [(f"{name}_{i}", tree[f"{name}_{i}"]) for i in range(count)]
