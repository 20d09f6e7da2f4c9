"""What a picture shows, as a network reads it, against what was asked for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codi_jax.data.avatars.looks import random_look
from codi_jax.data.avatars.vocabulary import KINDS
from codi_jax.evaluation.attributes import Reader, labels, questions, shown_shares
from codi_jax.io.weights import save_model
from codi_jax.models.attribute_reader import AttributeReader, AttributeReaderConfig
from codi_jax.models.config import WeightsError


def network(names: str) -> AttributeReader:
    return AttributeReader(AttributeReaderConfig(labels=names, block_out_channels=(8, 16), sample_size=16))


def test_every_value_has_one_output() -> None:
    names = labels().split(",")
    assert len(set(names)) == len(names) == sum(len(each.values) for each in questions())
    for each in questions():
        kind, attribute, value = names[each.start].split("/")
        assert (kind, attribute, value) == (each.kind or "avatar", each.attribute, each.values[0])
    assert {name.split("/")[0] for name in names} == {"avatar", *KINDS}


def test_what_is_read_are_the_largest_outputs_of_the_kind_that_is_shown(tmp_path: Path) -> None:
    """With a bias for the answers and weights of nothing, all pictures show one look."""
    module = network(labels())
    params = jax.tree.map(jnp.zeros_like, jax.jit(module.random_params)(jax.random.key(0)))
    look = random_look(np.random.default_rng(3), kind="person")
    bias = np.zeros(len(labels().split(",")), "f4")
    for each in questions():
        if each.kind in (None, "person") and each.attribute in look:
            bias[each.start + each.values.index(look[each.attribute])] = 1
    bias[questions()[1].start] = 9  # of monsters, which no picture shows
    params["classifier"]["bias"] = jnp.asarray(bias)
    save_model(tmp_path, None, module, params)
    seen = Reader(tmp_path, batch_size=4).read(np.zeros((6, 64, 64, 3), np.uint8))
    assert len(seen) == 6
    assert all({name: each[name] for name in look} == look for each in seen)


def test_a_reader_of_other_attributes_is_refused(tmp_path: Path) -> None:
    module = network("avatar/kind/monster,avatar/kind/tree")
    save_model(tmp_path, None, module, jax.jit(module.random_params)(jax.random.key(0)))
    with pytest.raises(WeightsError, match="was trained on other attributes"):
        Reader(tmp_path)


def test_another_kind_shows_nothing_that_was_asked_for() -> None:
    asked = {"kind": "planet", "color": "red", "ring": "thin", "background": "blue"}
    seen = [
        {**asked, "moon": "moon"},  # which nobody asked about
        {**asked, "ring": "thick"},
        {**asked, "kind": "monster"},
    ]
    np.testing.assert_allclose(shown_shares(seen, [asked] * 3), [1, 0.75, 0])
