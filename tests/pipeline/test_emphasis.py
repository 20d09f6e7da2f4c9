"""Prompts with weights, and of any length: the pieces as A1111's web UI documents them, the features by PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import make_tokenizer
from pairs import PROMPTS, Pairs, assert_same_picture, latents, run_theirs
from transformers import CLIPTokenizer

from codi_jax.pipeline.emphasis import Piece, parse_emphasis
from codi_jax.pipeline.text import tokenize, tokenize_chunks

# From the documentation of ``parse_prompt_attention``.
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
    ],
}  # fmt: skip
OTHERS = {
    "": [("", 1.0)],
    "a) b]": [("a) b]", 1.0)],
    "at 5:2) sharp": [("at 5:2) sharp", 1.0)],
    "(a:b)": [("a:b", 1.1)],
    "[a:.5)": [("a:.5)", 1 / 1.1)],
    "a BREAK (b BREAK c:2)": [("a", 1.0), (None, 1.0), ("b", 2.0), (None, 1.0), ("c", 2.0)],
    "BREAKING": [("BREAKING", 1.0)],
    "(" * 1000: [("", 1.0)],
}
PROMPT = "a (red:1.5) cat and [two] big dogs that see a (very (old)) house by the sea"
RUN = {"steps": 2, "guidance_scale": 3.0}


@pytest.mark.parametrize(("prompt", "pieces"), [*DOCUMENTED.items(), *OTHERS.items()])
def test_pieces(prompt: str, pieces: list[Piece]) -> None:
    assert parse_emphasis(prompt) == pieces


def theirs(pipeline: Any, prompts: list[str], negative: str, chunks: int, *, is_sdxl: bool) -> dict[str, torch.Tensor]:
    """The arguments of diffusers' pipeline: the features of all chunks, one after another, times the weights."""
    given: dict[str, torch.Tensor] = {}
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if is_sdxl:
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    for name, texts in {"prompt_embeds": prompts, "negative_prompt_embeds": [negative] * len(prompts)}.items():
        by_text, pooled = [], []
        for text in texts:
            of_encoders = []
            for tokenizer, encoder in pairs:
                tokens = [(t, w) for piece, w in parse_emphasis(text) for t in tokenizer(piece).input_ids[1:-1]]
                room, features, factors = tokenizer.model_max_length - 2, [], []
                for part in (tokens[first : first + room] for first in range(0, chunks * room, room)):
                    ids = [tokenizer.bos_token_id, *(token for token, _ in part), tokenizer.eos_token_id]
                    ids += [tokenizer.pad_token_id] * (room + 2 - len(ids))
                    with torch.no_grad():
                        out = encoder(torch.tensor([ids]), output_hidden_states=True)
                    features.append(out.hidden_states[-2] if is_sdxl else out.last_hidden_state)
                    factors += [1.0, *(weight for _, weight in part), *[1.0] * (room + 1 - len(part))]
                    last = out[0] if len(features) == 1 else last
                joined = torch.cat(features, 1).double()
                weighted = joined * torch.tensor(factors).double()[None, :, None]
                of_encoders.append(weighted * (joined.mean() / weighted.mean()))
            by_text.append(torch.cat(of_encoders, -1).float())
            pooled.append(last)
        given[name] = torch.cat(by_text)
        if is_sdxl:
            given[name.replace("prompt_embeds", "pooled_prompt_embeds")] = torch.cat(pooled)
    return given


@pytest.mark.parametrize("family", ["text-to-image", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_pictures_equal_diffusers(pairs: Pairs, family: str) -> None:
    pair = pairs(family)
    prompts, negative = [PROMPT, PROMPTS[1]], "a (bad:0.7) picture"
    embeds = theirs(pair.theirs, prompts, negative, chunks=4, is_sdxl=family == "sdxl")
    ids, _ = tokenize_chunks(pair.ours.tokenizers["tokenizer"], prompts, pair.ours.networks.text_encoder, True)
    assert ids.shape[1] == 4
    wanted = run_theirs(
        family, pair.theirs, latents(), prompt=None, num_inference_steps=2, guidance_scale=3.0, **embeds
    )
    made = pair.ours(prompts, negative_prompt=negative, weighted_prompts=True, latents=latents(), **RUN)
    assert_same_picture(made, wanted)


def test_short_prompts_without_weights_are_unchanged(pairs: Pairs) -> None:
    model = pairs("text-to-image").ours
    plain = model(PROMPTS, latents=latents(), **RUN)
    for option in ("long_prompts", "weighted_prompts"):
        assert_same_picture(model(PROMPTS, latents=latents(), **{option: True}, **RUN), plain)


def test_parentheses_mean_nothing_unless_told(pairs: Pairs) -> None:
    model = pairs("text-to-image").ours
    ids, weights = tokenize_chunks(model.tokenizers["tokenizer"], ["(a)"], model.networks.text_encoder, False)
    np.testing.assert_array_equal(ids[:, 0], model.tokenize(["(a)"])["text_encoder"])
    assert (weights == 1).all()


def test_the_end_and_the_padding_are_the_tokenizers_own(pairs: Pairs, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")  # as in SD 2.x and SDXL
    encoder, prompts = pairs("text-to-image").ours.networks.text_encoder, ["a cat", ""]
    ids, _ = tokenize_chunks(tokenizer, prompts, encoder, False)
    np.testing.assert_array_equal(ids[:, 0], tokenize(tokenizer, prompts, encoder))


def test_a_pause_ends_a_chunk(pairs: Pairs) -> None:
    model = pairs("text-to-image").ours
    ids, _ = tokenize_chunks(model.tokenizers["tokenizer"], ["a BREAK b"], model.networks.text_encoder, True)
    for chunk, letter in zip(ids[0], "ab", strict=True):
        np.testing.assert_array_equal(chunk, model.tokenize([letter])["text_encoder"][0])
