"""Prompts to the features that a UNet attends to."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codi_jax.hub import ModelFolder
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.config import Params
from codi_jax.weight_files import WeightsError

_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find_tokenizer(folder: ModelFolder) -> tuple[Path, ...]:
    """The files of a CLIP tokenizer, all in one folder on this machine.

    Raises:
      WeightsError: if there is none.
    """
    files = tuple(path for path in map(folder.find, _TOKENIZER_FILES) if path is not None)
    names = {path.name for path in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise WeightsError(f"There is no vocab.json with merges.txt in {folder}: {folder.describe_contents()}.")
    return files


def tokenize(tokenizer: Any, prompts: Sequence[str], text_encoder: CLIPTextModel) -> Int[np.ndarray, "b s"]:
    """Turns prompts into padded token ids; warns of every prompt that is too long, and says what was cut off.

    Args:
      tokenizer: a CLIP tokenizer of transformers.
      prompts: b texts.
      text_encoder: the encoder that the ids are for.

    Raises:
      ValueError: if the tokenizer has tokens that the encoder does not know.
    """
    config = text_encoder.config
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    ids = tokenizer(list(prompts), **options).input_ids.astype(np.int32)
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer made token {ids.max()}, but the text encoder knows {config.vocab_size}: "
            "they are not of the same model."
        )
    for prompt, whole in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(whole) > length:
            cut = tokenizer.decode(whole[length - 1 : -1]).strip()
            warnings.warn(
                f"The prompt {prompt[:40]!r}... has {len(whole)} tokens and the text encoder takes {length}. "
                f"This was cut off: {cut!r}.",
                stacklevel=2,
            )
    return ids


def encode_text(
    text_encoders: Mapping[str, CLIPTextModel],
    params: Mapping[str, Params],
    ids: Mapping[str, Int[Array, "b s"]],
    is_xl: bool,
) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
    """Encodes token ids as Stable Diffusion does.

    SD 1.x and 2.x attend to the last hidden state. SDXL attends to the last but one of both encoders, side by side, and
    adds the pooled output of the second to the time embedding (Podell et al., 2023, section 2.1).

    Args:
      text_encoders: ``text_encoder``, and for SDXL ``text_encoder_2``.
      params: their parameters, under the same names.
      ids: token ids for each, under the same names.
      is_xl: whether to read them as SDXL does.

    Returns:
      The features, and the pooled output of the last encoder.
    """
    outputs: list[Any] = [
        text_encoders[name].apply({"params": params[name]}, ids[name]) for name in sorted(text_encoders)
    ]
    if is_xl:
        context = jnp.concatenate([out.hidden_states[-2] for out in outputs], axis=-1)
    else:
        context = outputs[0].last_hidden_state
    return context, outputs[-1].pooled
