"""Textual inversion against diffusers, in the formats that its trainers and A1111's web UI write."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import Pairs, assert_same_picture, edit_json, latents, run_theirs
from safetensors.torch import save_file

from codi_jax.models.config import WeightsError
from codi_jax.pipeline.model import Model

WIDTH, SECOND = 24, 20
RUN = {"steps": 2, "guidance_scale": 3.0}


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32))


def of_web_ui(path: Path, tensor: torch.Tensor) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(tensor)}}
    torch.save({**content, "name": "else", "step": 500, "sd_checkpoint": "1a2b", "sd_checkpoint_name": "sd"}, path)


# How a file is written, its ending, and the word.
FORMATS: dict[str, tuple[Callable[[Path, torch.Tensor], Any], str, str]] = {
    "diffusers-bin": (lambda path, tensor: torch.save({"<toy>": tensor[0]}, path), ".bin", "<toy>"),
    "diffusers": (lambda path, tensor: save_file({"<toy>": tensor[0].clone()}, path), ".safetensors", "<toy>"),
    "web-ui-pt": (of_web_ui, ".pt", "style"),
    "web-ui": (lambda path, tensor: save_file({"emb_params": tensor}, path), ".safetensors", "style"),
}


@pytest.mark.parametrize(("kind", "count"), [("diffusers-bin", 1), ("diffusers", 1), ("web-ui-pt", 3), ("web-ui", 3)])
def test_pictures_equal_diffusers(pairs: Pairs, tmp_path: Path, kind: str, count: int) -> None:
    write, ending, word = FORMATS[kind]
    path = tmp_path / f"style{ending}"
    write(path, vectors(count, WIDTH))
    pair = pairs("text-to-image")
    model = pair.ours.add_words(path)
    theirs = type(pair.theirs).from_pretrained(pair.folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion(str(path), token=word)
    prompts = [f"a {word} cat", f"two {word}"]
    options = {"negative_prompt": [f"{word} bad"] * 2, "num_inference_steps": 2, "guidance_scale": 3.0}
    wanted = run_theirs(pair.family, theirs, latents(), prompt=prompts, **options)
    made = model(prompts, negative_prompt=f"{word} bad", latents=latents(), **RUN)
    assert_same_picture(made, wanted)
    assert np.any(made != pair.ours(prompts, negative_prompt=f"{word} bad", latents=latents(), **RUN))
    model.save_pretrained(tmp_path / "saved")
    saved = Model.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(saved(prompts, negative_prompt=f"{word} bad", latents=latents(), **RUN), made)
    again = type(pair.theirs).from_pretrained(tmp_path / "saved", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert_same_picture(run_theirs(pair.family, again, latents(), prompt=prompts, **options), wanted)


def test_words_of_sdxl_have_vectors_for_both_encoders(pairs: Pairs, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"clip_l": vectors(2, WIDTH), "clip_g": vectors(2, SECOND, 1)}, path)
    model = pairs("sdxl").ours.add_words(path)
    ids = model.tokenize(["a style", "a"])
    for name, expected in {"text_encoder": vectors(2, WIDTH), "text_encoder_2": vectors(2, SECOND, 1)}.items():
        table = model.params[name]["text_model"]["embeddings"]["token_embedding"]["embedding"]
        assert len(table) == model.networks.text_encoders[name].config.vocab_size == 516
        np.testing.assert_array_equal(table[ids[name][0, 2:4]], expected)
        old = pairs("sdxl").ours.params[name]["text_model"]["embeddings"]["token_embedding"]["embedding"]
        np.testing.assert_array_equal(table[:514], old)
    # The end of the text is where it was, although the new words have higher numbers.
    assert model.networks.text_encoder_2.config.eos_token_id == 513


def test_the_end_of_the_text_is_no_new_word(pairs: Pairs, tmp_path: Path) -> None:
    """Old configurations do not say what the end is: it was the highest token, which a new word would be."""
    shutil.copytree(pairs("sdxl").folder, tmp_path / "old")
    edit_json(tmp_path / "old" / "text_encoder_2" / "config.json", eos_token_id=2)
    save_file({"clip_l": vectors(1, WIDTH), "clip_g": vectors(1, SECOND, 1)}, tmp_path / "style.safetensors")
    model = Model.from_pretrained(tmp_path / "old")
    assert model.networks.text_encoder_2.config.eos_token_id == 2
    assert model.add_words(tmp_path / "style.safetensors").networks.text_encoder_2.config.eos_token_id == 513


def test_a_name_of_ones_own(pairs: Pairs, tmp_path: Path) -> None:
    path = tmp_path / "style.bin"
    torch.save({"<toy>": vectors(1, WIDTH)[0]}, path)
    model = pairs("text-to-image").ours
    mine = model.add_words(path, "<mine>").tokenize(["<mine>"])["text_encoder"][0, 1]
    assert mine == 514
    assert 514 not in model.add_words(path, "<mine>").tokenize(["<toy>"])["text_encoder"]


REFUSED = {
    "width": ({"<toy>": vectors(1, 768)[0]}, "is a textual inversion for Stable Diffusion 1.x: its vectors have 768"),
    "sdxl": ({"clip_l": vectors(1, WIDTH), "clip_g": vectors(1, 20)}, "is a textual inversion for Stable Diffusion XL"),
    "known": ({"<|endoftext|>": vectors(1, WIDTH)[0]}, "already means something to this model"),
    "lora": ({"a.weight": vectors(4, 4)[None]}, "holds no textual inversion"),
    "scalar": ({"a": torch.tensor(1.0)}, "holds no textual inversion"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_none_for_this_model(pairs: Pairs, tmp_path: Path, what: str) -> None:
    content, message = REFUSED[what]
    save_file(content, tmp_path / "it.safetensors")
    with pytest.raises(WeightsError, match=message):
        pairs("text-to-image").ours.add_words(tmp_path / "it.safetensors")


def test_an_empty_folder(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"There is no learned_embeds\.safetensors or learned_embeds\.bin in"):
        pairs("text-to-image").ours.add_words(tmp_path)


def test_a_file_that_is_not_there_is_not_asked_of_the_hub(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the path of one folder and a file looks like an id."""
    (tmp_path / "embeddings").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"There is no weight file embeddings/bad\.pt"):
        pairs("text-to-image").ours.add_words("embeddings/bad.pt")


def test_one_name_for_two_words(pairs: Pairs, tmp_path: Path) -> None:
    save_file({"<a>": vectors(1, WIDTH)[0], "<b>": vectors(1, WIDTH, 1)[0]}, tmp_path / "two.safetensors")
    model = pairs("text-to-image").ours
    with pytest.raises(WeightsError, match=r"has 2 words \(<a>, <b>\): give no name of your own"):
        model.add_words(tmp_path / "two.safetensors", "<c>")
    ids = model.add_words(tmp_path / "two.safetensors").tokenize(["<a> <b>"])["text_encoder"]
    assert ids[0, 1:3].tolist() == [514, 515]
