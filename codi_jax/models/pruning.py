"""Pruned UNets: which blocks of a UNet stay, and how they are kept (Kim et al., 2023, section 3).

A `KeptBlocks` lists, from the highest resolution to the lowest, the layers that stay in the down block and in the up
block of the same resolution. A layer is a residual block and the attention behind it, if any; the remaining layers are
renumbered, so that the student's layer 1 may be the teacher's layer 2. Without its lowest resolutions a student has
fewer blocks: its first up block is then a later one of the teacher. `LEVELS` has the published levels in the notation
for user-defined ones (`KeptBlocks.from_dict`).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from codi_jax.models.config import ConfigError, Params
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

Mid = Literal["keep", "first", "drop"]
Features = tuple[tuple[str, str], ...]
"""Names of intermediates to compare: the student's and the teacher's."""


@dataclass(frozen=True)
class Layer:
    """A layer of the teacher that stays.

    Attributes:
      index: the layer's index in its block.
      transformer_blocks: the attention's transformer blocks that stay. Default: all.
    """

    index: int
    transformer_blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Resolution:
    """The layers that stay at one resolution, going down and going up."""

    down: tuple[Layer, ...]
    up: tuple[Layer, ...]


@dataclass(frozen=True)
class KeptBlocks:
    """The blocks of a UNet that stay.

    Attributes:
      name: the name in messages.
      resolutions: one entry per resolution of the teacher, from the highest; ``None`` for the lowest ones, if they are
        removed.
      mid: whether the mid block stays, or its first residual block, or nothing of it.
      features: the teacher's intermediates by the student's, if they differ from `feature_pairs`.
    """

    name: str
    resolutions: tuple[Resolution | None, ...]
    mid: Mid = "keep"
    features: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # a mapping has no hash

    @classmethod
    def from_dict(cls, name: str, mapping: Any) -> "KeptBlocks":
        """Reads the notation of `LEVELS`.

        ``{"resolutions": [{"down": LAYERS, "up": LAYERS} or None, …], "mid": "keep" | "first" | "drop", "features":
        {student's tap: teacher's tap}}``; the last two are optional. LAYERS is a list of numbers, or, where transformer
        blocks are removed, ``{number: [numbers of those that stay]}``.

        Args:
          name: the name for messages.
          mapping: the notation, for instance from a YAML file.

        Raises:
          ConfigError: if it is invalid.
        """
        known = {"resolutions", "mid", "features"}
        if not isinstance(mapping, Mapping) or "resolutions" not in mapping or not mapping.keys() <= known:
            raise ConfigError(f"{name}: a level has resolutions, and if need be mid and features: {mapping}.")
        if (mid := mapping.get("mid", "keep")) not in get_args(Mid):
            raise ConfigError(f"{name}: mid = {mid!r} is not possible: it is one of {', '.join(get_args(Mid))}.")
        resolutions, features = mapping["resolutions"], mapping.get("features", {})
        if not isinstance(resolutions, list) or not isinstance(features, Mapping):
            raise ConfigError(
                f"{name}: resolutions is a list, one entry for each, and features maps intermediates to intermediates."
            )
        return cls(name, tuple(_read_resolution(name, entry) for entry in resolutions), mid, dict(features))

    @property
    def kept(self) -> tuple[Resolution, ...]:
        """The resolutions that stay."""
        return tuple(resolution for resolution in self.resolutions if resolution is not None)


def _read_resolution(name: str, entry: Any) -> Resolution | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or entry.keys() != {"down", "up"}:
        raise ConfigError(f"{name}: a resolution has the layers of down and of up, or is null: {entry}.")
    return Resolution(*(_read_layers(name, entry[direction]) for direction in ("down", "up")))


def _read_layers(name: str, entry: Any) -> tuple[Layer, ...]:
    indices = list(entry) if isinstance(entry, list | Mapping) else []
    blocks = [entry[i] for i in indices] if isinstance(entry, Mapping) else [None] * len(indices)
    if not all(_is_rising(numbers) for numbers in (indices, *blocks) if numbers is not None):
        raise ConfigError(f"{name}: layers are rising numbers, such as [0, 2] or {{0: [0, 1], 2: [0]}}: {entry}.")
    return tuple(Layer(i, None if kept is None else tuple(kept)) for i, kept in zip(indices, blocks, strict=True))


def _is_rising(numbers: Any) -> bool:
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        return False
    return numbers[0] >= 0 and all(low < high for low, high in itertools.pairwise(numbers))


# ---- The published levels


_PLAIN = {"down": [0], "up": [0, 2]}
_BK_TINY = {"resolutions": [_PLAIN, _PLAIN, _PLAIN, None], "mid": "drop"}
_WHOLE = {"down": [0, 1], "up": [0, 1, 2]}


def _shallow(down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, dict[int, list[int]]]:
    """A resolution with all its layers, and the first few transformer blocks of each."""
    return {"down": {i: [*range(n)] for i, n in enumerate(down)}, "up": {i: [*range(n)] for i, n in enumerate(up)}}


LEVELS: dict[str, dict[str, Any]] = {
    # SD 1.x and 2.x (Kim et al., 2023, section 3.1).
    "bk_base": {"resolutions": [_PLAIN] * 4},
    "bk_small": {"resolutions": [_PLAIN] * 4, "mid": "drop"},
    "bk_tiny": _BK_TINY,
    # segmind/small-sd and segmind/tiny-sd; in the second, the block that replaces the first up block is trained to
    # match it.
    "sd_small": {"resolutions": [_PLAIN] * 4},
    "sd_tiny": {**_BK_TINY, "features": {"down_blocks_2": "up_blocks_0"}},
    # SDXL (Gupta et al., 2024). The configurations of segmind/SSD-1B and segmind/Segmind-Vega say how many transformer
    # blocks stay, but not which.
    "ssd_1b": {"resolutions": [_WHOLE, _shallow((2, 2), (2, 1, 1)), _shallow((4, 4), (4, 4, 10))], "mid": "first"},
    "vega": {"resolutions": [_WHOLE, _shallow((1, 1), (1, 1, 1)), _shallow((2, 2), (2, 2, 2))], "mid": "first"},
}
"""The levels by name. The original code's ``sd_small`` and ``sd_tiny`` are BK-SDM's base and tiny."""


def whole(config: UNetConfig) -> KeptBlocks:
    """All blocks of a UNet."""
    layers = [(tuple(map(Layer, range(n))), tuple(map(Layer, range(n + 1)))) for n in config.layers]
    mid: Mid = "drop" if config.mid_block_type is None else "keep"
    return KeptBlocks("the whole UNet", tuple(Resolution(*each) for each in layers), mid)


# ---- Pruning


def prune(unet: UNet2DCondition, params: Params, kept_blocks: KeptBlocks) -> tuple[UNet2DCondition, Params]:
    """The student that starts as the teacher's remaining blocks.

    Args:
      unet: the teacher's module.
      params: the teacher's parameters; the student's share their arrays. Abstract ones work too.
      kept_blocks: the blocks that stay.

    Returns:
      The student's module, with a complete configuration, and its parameters.

    Raises:
      ConfigError: if they are for another architecture, or the remaining blocks do not fit each other.
    """
    config = pruned_config(unet.config, kept_blocks)
    offset = unet.config.num_blocks - config.num_blocks
    pruned = {
        name: tree for name, tree in params.items() if not name.startswith(("down_blocks_", "up_blocks_", "mid_"))
    }
    for i, resolution in enumerate(kept_blocks.kept):
        up = config.num_blocks - 1 - i
        pruned[f"down_blocks_{i}"] = _prune_block(params[f"down_blocks_{i}"], resolution.down)
        pruned[f"up_blocks_{up}"] = _prune_block(params[f"up_blocks_{up + offset}"], resolution.up)
    pruned[f"down_blocks_{config.num_blocks - 1}"].pop("downsamplers_0", None)
    if kept_blocks.mid != "drop":
        # diffusers takes the depth of the mid block's attention from the lowest down block.
        blocks = kept_blocks.kept[-1].down[0].transformer_blocks
        layers = (Layer(0, blocks), Layer(1)) if kept_blocks.mid == "keep" else (Layer(0),)
        pruned["mid_block"] = _prune_block(params["mid_block"], layers)
        if kept_blocks.mid == "first":
            pruned["mid_block"].pop("attentions_0", None)
    return dataclasses.replace(unet, config=config), pruned


def _prune_block(block: Params, layers: Sequence[Layer]) -> Params:
    pruned = {name: tree for name, tree in block.items() if not name.startswith(("resnets_", "attentions_"))}
    for i, layer in enumerate(layers):
        if f"resnets_{layer.index}" in block:
            pruned[f"resnets_{i}"] = block[f"resnets_{layer.index}"]
        if f"attentions_{layer.index}" in block:
            pruned[f"attentions_{i}"] = _prune_attention(block[f"attentions_{layer.index}"], layer.transformer_blocks)
    return pruned


def _prune_attention(attention: Params, kept: tuple[int, ...] | None) -> Params:
    if kept is None:
        return attention
    pruned = {name: tree for name, tree in attention.items() if not name.startswith("transformer_blocks_")}
    return pruned | {f"transformer_blocks_{i}": attention[f"transformer_blocks_{j}"] for i, j in enumerate(kept)}


def pruned_config(config: UNetConfig, kept_blocks: KeptBlocks) -> UNetConfig:
    """The student's ``config.json``.

    Args:
      config: the teacher's configuration.
      kept_blocks: the blocks that stay.

    Raises:
      ConfigError: as in `prune`.
    """
    _check(config, kept_blocks)
    count = len(kept_blocks.kept)

    def kept(value: Any) -> Any:
        return value[:count] if isinstance(value, tuple) else value

    down, up = _depths(config, kept_blocks)
    is_nested = any(len({*d, *u}) > 1 for d, u in zip(down, reversed(up), strict=True))
    student = dataclasses.replace(
        config,
        **{key: kept(getattr(config, key)) for key in _PER_BLOCK},
        up_block_types=config.up_block_types[-count:],
        layers_per_block=_as_one([len(resolution.down) for resolution in kept_blocks.kept]),
        transformer_layers_per_block=_as_one([_as_one(depths) for depths in down]),
        reverse_transformer_layers_per_block=tuple(map(_as_one, up)) if is_nested else None,
        mid_block_type={"keep": config.mid_block_type, "first": "UNetMidBlock2D", "drop": None}[kept_blocks.mid],
    )
    _check_widths(config, student, kept_blocks)
    return student


_PER_BLOCK = (
    "block_out_channels", "down_block_types", "attention_head_dim", "num_attention_heads", "cross_attention_dim",
    "only_cross_attention",
)  # fmt: skip


def _as_one(values: Sequence[Any]) -> Any:
    """The common value if all are equal, else all of them."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _depths(config: UNetConfig, kept_blocks: KeptBlocks) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """How many transformer blocks of each attention stay, going down and going up; one number without attention."""

    def of_layers(depths: tuple[int, ...], layers: tuple[Layer, ...], i: int) -> tuple[Any, ...]:
        if not depths:
            return (config.transformer_layers[i],)  # which changes nothing
        return tuple(depths[x.index] if x.transformer_blocks is None else len(x.transformer_blocks) for x in layers)

    down: list[tuple[Any, ...]] = []
    up: list[tuple[Any, ...]] = []
    for i, resolution in enumerate(kept_blocks.kept):
        down.append(of_layers(config.down_transformer_layers(i), resolution.down, i))
        up.insert(0, of_layers(config.up_transformer_layers(config.num_blocks - 1 - i), resolution.up, i))
    return down, up


def feature_pairs(config: UNetConfig, kept_blocks: KeptBlocks) -> Features:
    """The intermediates to compare: the output of every remaining block in the student and in the teacher.

    The output of the student's lowest block has no downsampler, so it is compared with the teacher's output before its
    downsampler (Kim et al., 2023, section 3.2).

    Args:
      config: the teacher's configuration.
      kept_blocks: the blocks that stay.

    Raises:
      ConfigError: as in `prune`, or if ``kept_blocks.features`` names a tap that does not exist.
    """
    student = pruned_config(config, kept_blocks)
    lowest, offset = student.num_blocks - 1, config.num_blocks - student.num_blocks
    pairs = {f"down_blocks_{i}": f"down_blocks_{i}" for i in range(student.num_blocks)}
    if offset:
        pairs[f"down_blocks_{lowest}"] = f"down_blocks_{lowest}/before_downsampler"
    if student.mid_block_type is not None:
        pairs["mid_block"] = "mid_block"
    pairs |= {f"up_blocks_{i}": f"up_blocks_{i + offset}" for i in range(student.num_blocks)}
    pairs |= kept_blocks.features
    for name, intermediates in (("student", pairs.keys()), ("teacher", pairs.values())):
        if absent := sorted(set(intermediates) - _intermediates(student if name == "student" else config)):
            raise ConfigError(f"{kept_blocks.name}: the {name} has no {absent[0]} to compare features of.")
    return tuple(pairs.items())


def _intermediates(config: UNetConfig) -> set[str]:
    intermediates = {"mid_block"} if config.mid_block_type is not None else set()
    for i in range(config.num_blocks):
        intermediates |= {f"down_blocks_{i}", f"down_blocks_{i}/before_downsampler", f"up_blocks_{i}"}
    return intermediates


# ---- Checks


def _check(config: UNetConfig, kept_blocks: KeptBlocks) -> None:
    """Refuses blocks that this UNet does not have, and blocks that would leave skip connections unused."""
    n, kept = config.num_blocks, kept_blocks.kept
    if len(kept_blocks.resolutions) != n:
        fitting = [name for name, level in LEVELS.items() if len(level["resolutions"]) == n]
        raise ConfigError(
            f"{kept_blocks.name} is for UNets of {len(kept_blocks.resolutions)} resolutions, and this one has {n}: "
            f"take {', '.join(fitting) + ', or ' if fitting else ''}a table of your own."
        )
    if not kept or kept_blocks.resolutions[: len(kept)] != kept:
        raise ConfigError(
            f"{kept_blocks.name}: only the lowest resolutions can go: null stands at the end, after one that stays."
        )
    if kept_blocks.mid != "drop" and config.mid_block_type is None:
        raise ConfigError(f"{kept_blocks.name} keeps the mid block, and this UNet has none.")
    for i, resolution in enumerate(kept):
        up = n - 1 - i
        depths = config.down_transformer_layers(i)
        _check_layers(kept_blocks.name, f"down_blocks.{i}", resolution.down, config.layers[i], depths)
        depths = config.up_transformer_layers(up)
        _check_layers(kept_blocks.name, f"up_blocks.{up}", resolution.up, config.layers[i] + 1, depths)
        skips, layers = len(resolution.down) + 1, len(resolution.up)
        if skips != layers:
            raise ConfigError(
                f"{kept_blocks.name} leaves {skips} skip connections to up_blocks.{up}, those of down_blocks.{i} and "
                f"the one into it, and keeps {layers} layers there: keep one for each."
            )


def _check_layers(name: str, block: str, layers: tuple[Layer, ...], count: int, depths: tuple[int, ...]) -> None:
    for layer in layers:
        if layer.index >= count:
            raise ConfigError(f"{name} keeps layer {layer.index} of {block}, which has {count}, from 0 to {count - 1}.")
        if layer.transformer_blocks is None:
            continue
        depth = depths[layer.index] if depths else 0
        if layer.transformer_blocks[-1] >= depth:
            raise ConfigError(
                f"{name} keeps transformer block {layer.transformer_blocks[-1]} in layer {layer.index} of {block}, "
                f"which has {depth} of them."
            )


def _check_widths(config: UNetConfig, student: UNetConfig, kept_blocks: KeptBlocks) -> None:
    """Refuses layers that would get inputs they were not made for."""
    offset = config.num_blocks - student.num_blocks
    teachers, students = _inputs(config), _inputs(student)
    for i, resolution in enumerate(kept_blocks.kept):
        up = student.num_blocks - 1 - i
        for here, there, layers in (
            (f"down_blocks.{i}", f"down_blocks.{i}", resolution.down),
            (f"up_blocks.{up}", f"up_blocks.{up + offset}", resolution.up),
        ):
            for j, layer in enumerate(layers):
                wanted, given = teachers[there, layer.index], students[here, j]
                if wanted != given:
                    where = f"{kept_blocks.name}: layer {layer.index} of {there}"
                    raise ConfigError(f"{where} takes {wanted}, and what stays gives it {given}.")
    lowest = [(each.block_out_channels[-1], each.heads[-1]) for each in (config, student)]
    if kept_blocks.mid != "drop" and lowest[0] != lowest[1]:
        raise ConfigError(
            f"{kept_blocks.name} keeps the mid block, which takes {lowest[0][0]} channels in {lowest[0][1]} heads, and "
            f"what stays gives it {lowest[1][0]} in {lowest[1][1]}: drop it too."
        )


def _inputs(config: UNetConfig) -> dict[tuple[str, int], str]:
    """The input of each layer of each block, in words."""
    channels, skips = config.block_out_channels, [config.block_out_channels[0]]
    inputs, below = {}, channels[0]
    for i, width in enumerate(channels):
        for j in range(config.layers[i]):
            inputs[f"down_blocks.{i}", j] = f"{below} channels"
            below = width
            skips.append(width)
        if i < config.num_blocks - 1:
            skips.append(width)
    for i, width in enumerate(channels[::-1]):
        for j in range(config.layers[::-1][i] + 1):
            inputs[f"up_blocks.{i}", j] = f"{below} channels and a skip connection of {skips.pop()}"
            below = width
    return inputs
