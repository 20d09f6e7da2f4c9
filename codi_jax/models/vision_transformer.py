"""Vision transformers that metrics compare images by: CLIP's image tower, and DINO's and DINOv2's networks.

Radford et al., 2021 (arXiv 2103.00020); Caron et al., 2021 (arXiv 2104.14294); Oquab et al., 2023 (arXiv 2304.07193).
All three are one network, with parts that some lack: a norm before the layers (CLIP), a bias of the patches (DINO), a
projection behind them (CLIP). DINOv2's scales of the layers' outputs are folded into the dense layers before them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from codi_jax.models.clip_text import CLIPEncoder, TransformerConfig, layer_norm
from codi_jax.models.config import Channels, ConfigError, Epsilon, Params, Side, WeightsError
from codi_jax.models.layers import dense
from codi_jax.models.network import Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(TransformerConfig):
    """What a forward pass needs of the ``config.json`` of CLIP's image tower, a ``ViTModel`` or a ``Dinov2Model``.

    Attributes:
      model_type: ``clip_vision_model``, ``vit`` or ``dinov2``.
      projection_dim: width of CLIP's projection.
    """

    class_names: ClassVar[tuple[str, ...]] = ("VisionTransformer",)

    model_type: Literal["clip_vision_model", "vit", "dinov2"]
    hidden_size: Channels = 768
    intermediate_size: Channels = 3072
    num_attention_heads: Channels = 12
    image_size: Side = 224
    patch_size: Side = 16
    num_channels: Literal[3] = 3
    hidden_act: Literal["quick_gelu", "gelu"] = "gelu"
    layer_norm_eps: Epsilon = 1e-6
    qkv_bias: Literal[True] = True
    use_swiglu_ffn: Literal[False] = False
    projection_dim: Channels | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size = {self.patch_size} is more than image_size = {self.image_size}.")

    @classmethod
    def from_published(cls, mapping: Mapping[str, Any], where: str) -> "VisionTransformerConfig":
        """Reads the ``config.json`` of a CLIP model, a ViT or DINOv2; keys without an effect here are ignored.

        Raises:
          ConfigError: for another class of model, or an unsupported value.
        """
        kind, values = mapping.get("model_type"), dict(mapping)
        if kind == "clip":
            values = {**_object(mapping, "vision_config", where), "projection_dim": mapping.get("projection_dim", 512)}
            kind = "clip_vision_model"
        if kind == "clip_vision_model":
            values = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | values
        elif kind == "vit":
            values = {"layer_norm_eps": 1e-12} | values
        elif kind == "dinov2":
            ratio, width = values.get("mlp_ratio", 4), values.get("hidden_size", 768)
            if not isinstance(ratio, int) or not isinstance(width, int):
                raise ConfigError(
                    f"{where}: mlp_ratio = {ratio!r:.80} and hidden_size = {width!r:.80} are no integers."
                )
            values = {"patch_size": 14, "intermediate_size": ratio * width} | values
        else:
            raise ConfigError(f"{where}: model_type = {kind!r:.80} is not supported; only clip, vit and dinov2 are.")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls.from_dict({name: values[name] for name in values if name in known} | {"model_type": kind}, where)

    @property
    def is_clip(self) -> bool:
        """Whether this is CLIP's image tower."""
        return self.model_type == "clip_vision_model"


def _object(mapping: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is missing or is not an object.")
    return value


class Embeddings(nn.Module):
    """Patches as tokens, behind one for the whole image, plus learned positions."""

    config: VisionTransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        config, width = self.config, self.config.hidden_size
        size = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            width, size, size, "VALID", use_bias=not config.is_clip, dtype=self.dtype, name="patch_embedding"
        )(pixels)
        tokens = patches.reshape(len(pixels), -1, width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,)).astype(tokens.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), tokens], axis=1)
        positions = nn.Embed(x.shape[1], width, dtype=self.dtype, name="position_embedding")
        return x + positions(jnp.arange(x.shape[1]))[None]


class VisionTransformer(Network):
    """Images to one vector each.

    Attributes:
      config: a `VisionTransformerConfig`.
      dtype: the computation's dtype.
    """

    config: VisionTransformerConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.embeddings = Embeddings(config, self.dtype)
        if config.is_clip:
            self.pre_layrnorm = layer_norm(config, self.dtype)  # spelled as in the published files
        self.encoder = CLIPEncoder(config, False, self.dtype, is_causal=False)
        self.post_layernorm = layer_norm(config, self.dtype)
        if config.projection_dim is not None:
            self.visual_projection = dense(config.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """The state of the token for the whole image behind the last norm, and CLIP's projection.

        Args:
          pixels: normalized images of ``image_size`` pixels.

        Raises:
          ValueError: for images of another size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"images of {pixels.shape[1:3]} pixels, but the network takes {size} × {size}.")
        x = self.embeddings(pixels)
        if self.config.is_clip:
            x = self.pre_layrnorm(x)
        x = self.post_layernorm(self.encoder(x)[-1][:, 0])
        return x if self.config.projection_dim is None else self.visual_projection(x)

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters to train from nothing, float32."""
        size = self.config.image_size
        return dict(self.init(key, jnp.zeros((1, size, size, 3)))["params"])


# A ViT's names, as transformers writes them, and this network's, which are CLIP's.
_RENAMED: tuple[tuple[str, Any], ...] = (
    (r"^(vit|dinov2)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$", "embeddings.position_embedding.weight"),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".self_attn.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.(layernorm_before|norm1)\.", ".layer_norm1."),
    (r"\.(layernorm_after|norm2)\.", ".layer_norm2."),
    (r"^layernorm\.", "post_layernorm."),
)
_UNUSED = re.compile(r"^(pooler\.|embeddings\.mask_token$|classifier\.|(.*\.)?position_ids$)")
_SCALED = {"layer_scale1.lambda1": "self_attn.out_proj", "layer_scale2.lambda1": "mlp.fc2"}


def published_tensors(config: VisionTransformerConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a published file under this network's names.

    Args:
      config: the network's configuration.
      tensors: arrays, or what NumPy reads as such, by their names in the file: of a whole CLIP, its image tower's are
        taken.

    Raises:
      WeightsError: if a scale of DINOv2 has no layer.
    """
    if config.is_clip:
        tower = {name: each for name, each in tensors.items() if name.startswith(("vision_model.", "visual_"))}
        named = {name.removeprefix("vision_model."): each for name, each in tower.items()}
        return {name: each for name, each in named.items() if not _UNUSED.match(name)}
    named = {_renamed(name): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if not _UNUSED.match(name)}
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        if name in named:  # without the leading axes of one
            array = np.asarray(named[name])
            named[name] = array.reshape(array.shape[-1:] if name.endswith("class_embedding") else array.shape[-2:])
    for name in [name for name in named if name.endswith(tuple(_SCALED))]:
        layer, _, kind = name.partition(".layer_scale")
        scale, dense_layer = np.asarray(named.pop(name)), f"{layer}.{_SCALED[f'layer_scale{kind}']}"
        for part in ("weight", "bias"):
            if f"{dense_layer}.{part}" not in named:
                raise WeightsError(f"{name} scales a layer that is missing: {dense_layer}.{part}.")
            array = np.asarray(named[f"{dense_layer}.{part}"])
            named[f"{dense_layer}.{part}"] = array * scale.reshape(-1, *[1] * (array.ndim - 1))
    return named


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
