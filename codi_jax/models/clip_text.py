"""CLIP's text encoders (Radford et al., 2021) as Stable Diffusion uses them, with and without the final projection."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from codi_jax.models.config import Channels, ConfigError, Epsilon, ModelConfig, Params, Range, Token
from codi_jax.models.kernels.attention import dot_product_attention
from codi_jax.models.layers import dense
from codi_jax.models.network import Network

_PLAIN, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """What the layers of CLIP's two towers depend on."""

    hidden_size: Channels
    intermediate_size: Channels
    num_hidden_layers: Annotated[int, Range(1, 128)] = 12
    num_attention_heads: Channels
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size = {self.hidden_size} is not divisible by "
                f"num_attention_heads = {self.num_attention_heads}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(TransformerConfig):
    """The ``config.json`` of a ``CLIPTextModel`` or ``CLIPTextModelWithProjection``."""

    class_names: ClassVar[tuple[str, ...]] = (
        _PLAIN,
        _PROJECTED,
        "FlaxCLIPTextModel",
        "FlaxCLIPTextModelWithProjection",
    )
    # How a transformers model was made, named, returned or generated from: none of it affects a forward pass.
    ignored_keys: ClassVar[frozenset[str]] = frozenset({
        "model_type", "transformers_version", "torch_dtype", "dtype", "initializer_factor", "initializer_range",
        "attention_dropout", "dropout", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
        "tie_word_embeddings", "torchscript", "is_encoder_decoder", "is_decoder", "gradient_checkpointing",
        "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "add_cross_attention", "pruned_heads",
    })  # fmt: skip

    architectures: tuple[str, ...] = (_PLAIN,)
    vocab_size: Annotated[int, Range(1, 1 << 24)] = 49408
    hidden_size: Channels = 512
    intermediate_size: Channels = 2048
    projection_dim: Channels = 512
    num_attention_heads: Channels = 8
    max_position_embeddings: Annotated[int, Range(2, 1 << 16)] = 77
    pad_token_id: Token | None = 1
    bos_token_id: Token | None = 49406
    eos_token_id: Token = 49407

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eos_token_id >= self.vocab_size:
            raise ConfigError(f"eos_token_id = {self.eos_token_id} is not among vocab_size = {self.vocab_size} tokens.")

    @property
    def with_projection(self) -> bool:
        """Whether the pooled output goes through ``text_projection`` (SDXL's second encoder)."""
        return self.architectures[0].endswith("WithProjection")

    def to_dict(self) -> dict[str, Any]:
        """The complete ``config.json``, as transformers writes it."""
        values = super().to_dict()
        del values["_class_name"]
        values["architectures"] = [_PROJECTED if self.with_projection else _PLAIN]
        return {**values, "model_type": "clip_text_model"}

    @classmethod
    def _check_class(cls, mapping: Mapping[str, Any], where: str) -> None:
        architectures = mapping.get("architectures") or [_PLAIN]
        if mapping.get("model_type", "clip_text_model") != "clip_text_model" or architectures[0] not in cls.class_names:
            name = mapping.get("architectures") or mapping.get("model_type")
            raise ConfigError(f"{where}: this is the configuration of {name}, not of a CLIP text encoder.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CLIPTextOutput:
    """What a text encoder returns.

    Attributes:
      last_hidden_state: ``[b, s, d]``, after the final layer norm. SD 1.x and 2.x condition on it.
      hidden_states: the embeddings and every layer's output, without the final norm. SDXL conditions on ``[-2]``.
      pooled: ``[b, d]``, the state at the end-of-text token, projected if the model has a projection.
    """

    last_hidden_state: Float[Array, "b s d"]
    hidden_states: tuple[Float[Array, "b s d"], ...]
    pooled: Float[Array, "b p"]


class CLIPAttention(nn.Module):
    """Multi-head self-attention, causal for text and not for images."""

    config: TransformerConfig
    dtype: Any
    is_causal: bool = True

    def setup(self) -> None:
        d = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (dense(d, dtype=self.dtype) for _ in range(4))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        query, key, value = (project(x).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        # 77 tokens: no flash kernel is worth its launch here.
        out = dot_product_attention(query, key, value, implementation="xla", is_causal=self.is_causal)
        return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nn.Module):
    """Two dense layers with CLIP's sigmoid approximation of GELU, or the exact one (OpenCLIP)."""

    config: TransformerConfig
    dtype: Any

    def setup(self) -> None:
        self.fc1 = dense(self.config.intermediate_size, dtype=self.dtype)
        self.fc2 = dense(self.config.hidden_size, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = self.fc1(x)
        if self.config.hidden_act == "quick_gelu":
            x = x * jax.nn.sigmoid(1.702 * x)
        else:
            x = jax.nn.gelu(x, approximate=False)
        return self.fc2(x)


class CLIPEncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    config: TransformerConfig
    dtype: Any
    is_causal: bool = True

    def setup(self) -> None:
        self.self_attn = CLIPAttention(self.config, self.dtype, self.is_causal)
        self.layer_norm1 = layer_norm(self.config, self.dtype)
        self.mlp = CLIPMLP(self.config, self.dtype)
        self.layer_norm2 = layer_norm(self.config, self.dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers; returns its input and the output of every layer."""

    config: TransformerConfig
    remat: bool
    dtype: Any
    is_causal: bool = True

    def setup(self) -> None:
        layer = nn.remat(CLIPEncoderLayer) if self.remat else CLIPEncoderLayer
        count = self.config.num_hidden_layers
        self.layers = [layer(self.config, self.dtype, self.is_causal) for _ in range(count)]

    def __call__(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s d"], ...]:
        states = (x,)
        for layer in self.layers:
            x = layer(x)
            states += (x,)
        return states


class CLIPTextEmbeddings(nn.Module):
    """Token embeddings plus learned positions."""

    config: CLIPTextConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.token_embedding = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.position_embedding = nn.Embed(config.max_position_embeddings, config.hidden_size, dtype=self.dtype)

    def __call__(self, input_ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))[None]


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the final norm: the ``text_model`` of published state dicts."""

    config: CLIPTextConfig
    remat: bool
    dtype: Any

    def setup(self) -> None:
        self.embeddings = CLIPTextEmbeddings(self.config, self.dtype)
        self.encoder = CLIPEncoder(self.config, self.remat, self.dtype)
        self.final_layer_norm = layer_norm(self.config, self.dtype)

    def __call__(self, input_ids: Int[Array, "b s"]) -> CLIPTextOutput:
        states = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(states[-1])
        # pad_token_id may equal eos_token_id: the first occurrence ends the text. Files written before transformers
        # 4.31 say eos_token_id = 2, which no tokenizer has: there the end of text is the highest id.
        is_eos = input_ids == self.config.eos_token_id
        positions = jnp.argmax(input_ids if self.config.eos_token_id == 2 else is_eos, axis=-1)
        pooled = jnp.take_along_axis(last, positions[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, states, pooled)


class CLIPTextModel(Network):
    """The text encoder.

    Attributes:
      config: a `CLIPTextConfig`.
      dtype: the computation's dtype.
      attention: accepted for symmetry with the other models; 77 tokens always take the plain kernel.
      remat: recompute layers in the backward pass.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: bool = False

    def setup(self) -> None:
        self.text_model = CLIPTextTransformer(self.config, self.remat, self.dtype)
        if self.config.with_projection:
            self.text_projection = dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, input_ids: Int[Array, "b s"]) -> CLIPTextOutput:
        """Encodes token ids.

        Args:
          input_ids: from the model's own tokenizer, padded; at most ``max_position_embeddings`` long.

        Returns:
          Hidden states and the pooled output.

        Raises:
          ValueError: for sequences that are too long.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens, but the text encoder has positions for "
                f"{self.config.max_position_embeddings}."
            )
        out = self.text_model(input_ids)
        if self.config.with_projection:
            out = dataclasses.replace(out, pooled=self.text_projection(out.pooled))
        return out

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Parameters for training from scratch, float32."""
        return dict(self.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def encode_text(
    text_encoders: Mapping[str, CLIPTextModel],
    params: Mapping[str, Any],
    ids: Mapping[str, Int[Array, "b *k s"]],
    is_sdxl: bool,
    weights: Mapping[str, Float[Array, "b k s"]] | None = None,
) -> tuple[Float[Array, "b n d"], Float[Array, "b p"]]:
    """Encodes token ids as Stable Diffusion does.

    SD 1.x and 2.x attend to the last hidden state. SDXL attends to the second-to-last of both encoders, concatenated,
    and adds the pooled output of the second to the time embedding (Podell et al., 2023, section 2.1).

    Args:
      text_encoders: ``text_encoder``, and for SDXL ``text_encoder_2``.
      params: their parameters, under the same names.
      ids: token ids for each, under the same names. Texts in k chunks are encoded one chunk after another, and attended
        to as one text; the pooled output is the first chunk's.
      is_sdxl: whether to use them as SDXL does.
      weights: factors on the features of the tokens, under the same names, after which each text's mean is restored.

    Returns:
      The features, and the pooled output of the last encoder.
    """
    features, pooled = [], jnp.empty(0)
    for name in sorted(text_encoders):
        of_encoder = ids[name]
        out: Any = text_encoders[name].apply({"params": params[name]}, of_encoder.reshape(-1, of_encoder.shape[-1]))
        states = out.hidden_states[-2] if is_sdxl else out.last_hidden_state
        states = states.reshape(len(of_encoder), -1, states.shape[-1])
        features.append(states if weights is None else _weighted(states, weights[name]))
        pooled = out.pooled.reshape(len(of_encoder), -1, out.pooled.shape[-1])[:, 0]
    return jnp.concatenate(features, axis=-1), pooled


def _weighted(features: Float[Array, "b n d"], weights: Float[Array, "b k s"]) -> Float[Array, "b n d"]:
    weights = weights.reshape(*features.shape[:2], 1).astype(features.dtype)
    old, new = features.mean((1, 2), keepdims=True), (features * weights).mean((1, 2), keepdims=True)
    return features * weights * (old / new)


def layer_norm(config: TransformerConfig, dtype: Any) -> nn.LayerNorm:
    """The layer norm, with the variance as PyTorch computes it."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False)
