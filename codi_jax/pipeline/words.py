"""New words for a model: textual inversion (Gal et al., 2023)."""

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from codi_jax.io.textual_inversion import load_words
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.config import Params, WeightsError

if TYPE_CHECKING:
    from codi_jax.pipeline.model import Model


def add(model: "Model", source: str | Path, word: str | None, **hub: Any) -> "Model":
    """The model with the words of a file; arguments and errors as in `codi_jax.pipeline.model.Model.add_words`.

    A word of n vectors is n tokens: the word, and ``word_1`` to ``word_{n-1}`` as in diffusers, which
    `codi_jax.pipeline.text.tokenize` puts behind it.
    """
    encoders = model.networks.text_encoders
    widths = {name: encoder.config.hidden_size for name, encoder in encoders.items()}
    for name, vectors in load_words(source, widths, word, **hub).items():
        for encoder, of_encoder in vectors.items():
            model = _with_tokens(model, encoder, name, of_encoder)
    return model


def _with_tokens(model: "Model", encoder: str, word: str, vectors: Float[np.ndarray, "n d"]) -> "Model":
    """The model with a word for one of its text encoders."""
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer = copy.deepcopy(model.tokenizers[name])
    tokens = [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise WeightsError(f"the word {known[0]!r} already means something to this model: give it another name.")
    tokenizer.add_tokens(tokens)
    ids = np.asarray(tokenizer.convert_tokens_to_ids(tokens))
    network = _with_room(model.networks.text_encoders[encoder], int(ids.max()) + 1, tokenizer.eos_token_id)
    if encoder in model.params:
        model = model.with_params({encoder: _with_rows(model.params[encoder], ids, vectors)})
    files = {each: paths for each, paths in model.tokenizer_files.items() if each != name}
    return model.replace(
        networks=dataclasses.replace(model.networks, **{encoder: network}),
        tokenizers={**model.tokenizers, name: tokenizer},
        tokenizer_files=files,
    )


def _with_room(encoder: CLIPTextModel, count: int, eos: int) -> CLIPTextModel:
    """The text encoder for this many tokens."""
    # Old files leave the end of the text to the highest token, which a new word would be.
    size = max(count, encoder.config.vocab_size)
    return encoder.clone(config=dataclasses.replace(encoder.config, vocab_size=size, eos_token_id=eos))


def _with_rows(params: Params, ids: np.ndarray, vectors: Float[np.ndarray, "n d"]) -> Params:
    """The parameters of a text encoder with these embeddings of tokens."""
    text_model = params["text_model"]
    table = text_model["embeddings"]["token_embedding"]["embedding"]
    more = max(int(ids.max()) + 1 - len(table), 0)
    table = jnp.pad(table, [(0, more), (0, 0)]).at[ids].set(jnp.asarray(vectors, table.dtype))
    embeddings = {**text_model["embeddings"], "token_embedding": {"embedding": table}}
    return {**params, "text_model": {**text_model, "embeddings": embeddings}}
