"""Turns prompts into token ids."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from codi_jax.io.hub import ModelFolder
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.config import WeightsError

_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find_tokenizer(folder: ModelFolder) -> tuple[Path, ...]:
    """The files of a CLIP tokenizer, all in one local folder.

    Raises:
      WeightsError: if there is none.
    """
    files = tuple(path for path in map(folder.find, _TOKENIZER_FILES) if path is not None)
    names = {path.name for path in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise WeightsError(f"There is no vocab.json with merges.txt in {folder}: {folder.describe_contents()}.")
    return files


def tokenize(tokenizer: Any, prompts: Sequence[str], text_encoder: CLIPTextModel) -> Int[np.ndarray, "b s"]:
    """Turns prompts into padded token ids; warns about every prompt that is too long and says what was cut off.

    Args:
      tokenizer: a CLIP tokenizer of transformers.
      prompts: b texts.
      text_encoder: the encoder that the ids are for.

    Raises:
      ValueError: if the tokenizer has tokens that the encoder does not know.
    """
    config = text_encoder.config
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if length < 2:  # the tokens that begin and end a text
        raise WeightsError(f"the tokenizer's model_max_length = {length} has no room for a text; CLIP's is 77.")
    prompts = [_with_all_tokens(tokenizer, prompt) for prompt in prompts]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    ids = tokenizer(prompts, **options).input_ids.astype(np.int32)
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer made token {ids.max()}, but the text encoder knows {config.vocab_size}: "
            "they are not from the same model."
        )
    for prompt, whole in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(whole) > length:
            cut = tokenizer.decode(whole[length - 1 : -1]).strip()
            warnings.warn(
                f"The prompt {prompt[:40]!r}... has {len(whole)} tokens and the text encoder takes {length}. "
                f"This was cut off: {cut!r}.",
                stacklevel=2,
            )
    return ids


def _with_all_tokens(tokenizer: Any, prompt: str) -> str:
    """The prompt with every token of its new words, ``word word_1 word_2``, as diffusers writes them."""
    added = tokenizer.added_tokens_encoder
    for word in (word for word in added if f"{word}_1" in added and word in prompt):
        count = next(number for number in range(1, len(added) + 1) if f"{word}_{number}" not in added)
        prompt = prompt.replace(word, " ".join([word, *(f"{word}_{number}" for number in range(1, count))]))
    return prompt
