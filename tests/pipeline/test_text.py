"""Prompts to token ids, against transformers."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import TEXT, make_tokenizer
from transformers import CLIPTokenizer

from codi_jax.io.hub import ModelFolder
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import WeightsError
from codi_jax.pipeline.text import find_tokenizer, tokenize

LENGTH = TEXT["max_position_embeddings"]  # with the first and the last token
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # each word is one token of the tests' tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder(**changes: Any) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig.from_dict({**TEXT, **changes}))


def words(count: int) -> str:
    return " ".join(LETTERS[:count])


def theirs(tokenizer: CLIPTokenizer, prompts: list[str], length: int) -> np.ndarray:
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids  # fmt: skip


def test_short_prompts_are_padded_without_a_warning(tokenizer: CLIPTokenizer) -> None:
    prompts = ["", "A cat.", words(LENGTH - 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizer, prompts, encoder())
    np.testing.assert_array_equal(ids, theirs(tokenizer, prompts, LENGTH))
    assert ids.dtype == np.int32
    assert ids.shape == (3, LENGTH)


def test_the_padding_is_the_tokenizers_own(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    padded_with_bang = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")  # as in SD 2.x and SDXL
    ids = tokenize(padded_with_bang, ["a"], encoder())
    np.testing.assert_array_equal(ids[0, 3:], padded_with_bang.convert_tokens_to_ids("!"))


@pytest.mark.parametrize("too_many", [1, 3])
def test_a_long_prompt_is_cut_and_the_warning_says_where(tokenizer: CLIPTokenizer, too_many: int) -> None:
    fits = LENGTH - 2
    prompt = words(fits + too_many)
    with pytest.warns(UserWarning, match="cut off") as caught:
        ids = tokenize(tokenizer, ["a short one", prompt], encoder())
    np.testing.assert_array_equal(ids, theirs(tokenizer, ["a short one", prompt], LENGTH))
    (warning,) = caught
    lost = " ".join(LETTERS[fits : fits + too_many])
    assert re.search(r"cut off: '(.*)'", str(warning.message))[1] == lost
    assert f"has {LENGTH + too_many} tokens and the text encoder takes {LENGTH}" in str(warning.message)


def test_the_encoder_may_be_shorter_than_the_tokenizer(tokenizer: CLIPTokenizer) -> None:
    prompt = words(10)
    with pytest.warns(UserWarning, match="cut off: 'g h i j'"):
        ids = tokenize(tokenizer, [prompt], encoder(max_position_embeddings=8))
    np.testing.assert_array_equal(ids, theirs(tokenizer, [prompt], 8))


def test_a_tokenizer_of_another_model_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="made token 513, but the text encoder knows 99: they are not from the same"):
        tokenize(tokenizer, ["a"], encoder(vocab_size=99, bos_token_id=97, eos_token_id=98, pad_token_id=98))


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused(tmp_path: Path, missing: str) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    folder = ModelFolder(str(tmp_path), "tokenizer")
    assert {path.name for path in find_tokenizer(folder)} >= {"vocab.json", "merges.txt", "tokenizer_config.json"}
    (tmp_path / "tokenizer" / missing).unlink()
    with pytest.raises(WeightsError, match=r"no vocab\.json with merges\.txt in .*tokenizer: it holds"):
        find_tokenizer(folder)


@pytest.mark.parametrize("length", [-5, 0, 1])
def test_a_tokenizer_without_room_for_a_text_is_refused(tmp_path: Path, length: int) -> None:
    short = make_tokenizer(tmp_path)
    short.model_max_length = length
    with pytest.raises(WeightsError, match=rf"model_max_length = {length} has no room for a text"):
        tokenize(short, ["a"], encoder())
