"""The stream of avatars that training reads without files."""

import itertools
import json

import numpy as np
import pytest

from codi_jax.data import DataFlags, load_data, streams
from codi_jax.data.avatars.looks import draw, split_of
from codi_jax.data.avatars.samples import stream
from codi_jax.data.avatars.vocabulary import KINDS
from codi_jax.data.sources import open_source
from codi_jax.io.decoding import decode
from codi_jax.io.images import canny

COUNT = 6


def tokenize(texts: list[str]) -> dict[str, np.ndarray]:
    return {"text_encoder": np.array([[len(text), sum(map(ord, text))] for text in texts])}


def pixels(cell: dict[str, bytes]) -> np.ndarray:
    return np.asarray(decode(cell["bytes"]))


def test_captions_belong_to_their_pictures() -> None:
    rows = list(itertools.islice(stream("avatars:text"), COUNT))
    assert len({row["attributes"] for row in rows}) == COUNT
    for row in rows:
        look = json.loads(row["attributes"])
        assert split_of(look) == "train"
        assert look["background"] in row["text"]
        np.testing.assert_array_equal(pixels(row["image"]), draw(look, 64))
        np.testing.assert_array_equal(pixels(row["conditioning_image"])[..., 0], canny(draw(look, 64)))


def test_edits_belong_to_their_pictures() -> None:
    for row in itertools.islice(stream("avatars:edit:32"), COUNT):
        np.testing.assert_array_equal(pixels(row["input_image"]), draw(json.loads(row["attributes"]), 32))
        np.testing.assert_array_equal(pixels(row["edited_image"]), draw(json.loads(row["edited_attributes"]), 32))


def test_captions_of_an_edit_say_what_changes_in_the_same_words() -> None:
    compared = 0
    for row in itertools.islice(stream("avatars:edit:32"), 4 * COUNT):
        before, after = json.loads(row["attributes"]), json.loads(row["edited_attributes"])
        for name, attribute in KINDS[before["kind"]].attributes.items():
            phrases = [attribute.values[look[name]].phrase if name in look else "" for look in (before, after)]
            if phrases[0] != phrases[1] and all(phrases) and "{" not in "".join(phrases):
                assert phrases[0] in row["original_prompt"]
                assert phrases[1] in row["edited_prompt"]
                words = [
                    row[f"{when}_prompt"].replace(phrase, "").replace(" an ", " a ")
                    for when, phrase in zip(("original", "edited"), phrases, strict=True)
                ]
                compared += words[0] == words[1]
    assert compared > COUNT


def test_training_reads_the_stream_and_resumes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW", 6)  # of what is drawn before the first batch
    flags = DataFlags(dataset_name="avatars:text:32", resolution=32, max_train_samples=24)

    def load():
        return load_data(flags, tokenize, batch_size=4, seed=0, condition="column")

    loader = load()
    batches = [next(loader) for _ in range(4)]
    assert batches[0]["pixels"].shape == batches[0]["conditioning"].shape == (4, 32, 32, 3)
    resumed, position = load(), load()
    for _ in range(2):
        next(position)
    resumed.set_state(position.get_state())
    for batch in batches[2:]:
        again = next(resumed)
        assert again.keys() == batch.keys()
        for name in ("pixels", "conditioning"):
            np.testing.assert_array_equal(again[name], batch[name])


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="--dataset_name avatars:words is not possible: it must be avatars:text or"):
        open_source(dataset_name="avatars:words")
    with pytest.raises(ValueError, match="--dataset_name avatars:text:9 is not possible"):
        open_source(dataset_name="avatars:text:9")
