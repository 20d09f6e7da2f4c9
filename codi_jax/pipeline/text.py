"""Turns prompts into token ids."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from codi_jax.io.hub import ModelFolder
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.config import WeightsError
from codi_jax.pipeline.emphasis import parse_emphasis

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


def prompt_inputs(
    tokenizers: Mapping[str, Any],
    text_encoders: Mapping[str, CLIPTextModel],
    prompts: Sequence[str],
    negative_prompt: str | None,
    *,
    is_long: bool,
    is_weighted: bool,
) -> dict[str, Any]:
    """The texts as inputs of `codi_jax.pipeline.generation.generate`.

    Args:
      tokenizers: the model's tokenizers, by name.
      text_encoders: its text encoders, by name.
      prompts: the prompts.
      negative_prompt: the text that guidance points away from, for all of them.
      is_long: whether texts may have more tokens than the encoders take, which then read them in chunks.
      is_weighted: whether parentheses weigh words, see `codi_jax.pipeline.emphasis`; implies ``is_long``.

    Raises:
      ValueError: as in `tokenize`.
    """
    inputs: dict[str, Any] = {"ids": {}, "null_ids": {}, "weights": {}, "null_weights": {}}
    for name, tokenizer in tokenizers.items():
        encoder = name.replace("tokenizer", "text_encoder")
        if is_long or is_weighted:
            texts = [*prompts, negative_prompt or ""]
            ids, weights = tokenize_chunks(tokenizer, texts, text_encoders[encoder], is_weighted)
            inputs["weights"][encoder], inputs["null_weights"][encoder] = weights[:-1], weights[-1:]
            inputs["ids"][encoder], null_ids = ids[:-1], ids[-1:]
        else:
            inputs["ids"][encoder] = tokenize(tokenizer, prompts, text_encoders[encoder])
            null_ids = tokenize(tokenizer, [negative_prompt or ""], text_encoders[encoder])
        inputs["null_ids"][encoder] = null_ids
    for name in ("null_ids", "null_weights"):
        inputs[name] = {encoder: each.repeat(len(prompts), axis=0) for encoder, each in inputs[name].items()}
    return {name: value for name, value in inputs.items() if value}


def tokenize(tokenizer: Any, prompts: Sequence[str], text_encoder: CLIPTextModel) -> Int[np.ndarray, "b s"]:
    """Turns prompts into padded token ids; warns about every prompt that is too long and says what was cut off.

    Args:
      tokenizer: a CLIP tokenizer of transformers.
      prompts: b texts.
      text_encoder: the encoder that the ids are for.

    Raises:
      ValueError: if the tokenizer has tokens that the encoder does not know.
    """
    length = _length(tokenizer, text_encoder)
    words = _words_of_several_tokens(tokenizer)
    prompts = [_with_all_tokens(prompt, words) for prompt in prompts]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    ids = tokenizer(prompts, **options).input_ids.astype(np.int32)
    _require_known(ids, text_encoder)
    for prompt, whole in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(whole) > length:
            cut = tokenizer.decode(whole[length - 1 : -1]).strip()
            warnings.warn(
                f"The prompt {prompt[:40]!r}... has {len(whole)} tokens and the text encoder takes {length}. "
                f"This was cut off: {cut!r}.",
                stacklevel=2,
            )
    return ids


def tokenize_chunks(
    tokenizer: Any, prompts: Sequence[str], text_encoder: CLIPTextModel, is_weighted: bool
) -> tuple[Int[np.ndarray, "b k s"], Float[np.ndarray, "b k s"]]:
    """Turns prompts of any length into chunks of token ids, as many as the longest needs, and the tokens' weights.

    Args:
      tokenizer: a CLIP tokenizer of transformers.
      prompts: b texts.
      text_encoder: the encoder that the ids are for.
      is_weighted: whether parentheses weigh words, see `codi_jax.pipeline.emphasis`; else all weights are 1.

    Raises:
      ValueError: as in `tokenize`.
    """
    room = _length(tokenizer, text_encoder) - 2
    words = _words_of_several_tokens(tokenizer)
    chunks = []
    for prompt in prompts:
        parts: list[list[tuple[int, float]]] = [[]]
        for text, weight in parse_emphasis(prompt) if is_weighted else [(prompt, 1.0)]:
            if text is None:
                parts.append([])
                continue
            for token in tokenizer(_with_all_tokens(text, words), verbose=False).input_ids[1:-1]:
                if len(parts[-1]) == room:
                    parts.append([])
                parts[-1].append((token, weight))
        chunks.append(parts)
    shape = len(prompts), max(map(len, chunks)), room + 2
    # As the tokenizer writes a short text: the end of the text, and padding.
    empty = tokenizer("", padding="max_length", max_length=room + 2).input_ids
    ids, weights = np.broadcast_to(np.asarray(empty, np.int32), shape).copy(), np.ones(shape, np.float32)
    for index, parts in enumerate(chunks):
        for number, part in enumerate(parts):
            end = 1 + len(part)
            ids[index, number, 1:end] = [token for token, _ in part]
            ids[index, number, end] = tokenizer.eos_token_id
            weights[index, number, 1:end] = [weight for _, weight in part]
    _require_known(ids, text_encoder)
    return ids, weights


def _length(tokenizer: Any, text_encoder: CLIPTextModel) -> int:
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    if length < 2:  # the tokens that begin and end a text
        raise WeightsError(f"the tokenizer's model_max_length = {length} has no room for a text; CLIP's is 77.")
    return length


def _require_known(ids: Int[np.ndarray, "..."], text_encoder: CLIPTextModel) -> None:
    if ids.max() >= (size := text_encoder.config.vocab_size):
        raise ValueError(
            f"the tokenizer made token {ids.max()}, but the text encoder knows {size}: "
            "they are not from the same model."
        )


def _words_of_several_tokens(tokenizer: Any) -> dict[str, str]:
    """The new words of more than one token, and how diffusers writes their tokens: ``word word_1 word_2``."""
    added = tokenizer.added_tokens_encoder
    words = {}
    for word in (word for word in added if f"{word}_1" in added):
        count = next(number for number in range(1, len(added) + 1) if f"{word}_{number}" not in added)
        words[word] = " ".join([word, *(f"{word}_{number}" for number in range(1, count))])
    return words


def _with_all_tokens(prompt: str, words: Mapping[str, str]) -> str:
    """The prompt with all tokens of its words."""
    for word, tokens in words.items():
        prompt = prompt.replace(word, tokens)
    return prompt
