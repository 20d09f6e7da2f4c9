"""Avatars: every word of a caption is in the picture, as DiceBear's own resolved options say, and nothing else is."""

import collections
import io
import itertools
import json
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest
import resvg_py
from dicebear import Avatar, Style
from PIL import Image

from codi_jax.data.avatars import looks
from codi_jax.data.avatars.captions import caption, instruction, random_edit
from codi_jax.data.avatars.looks import draw, held_out_pairs, options_of, random_change, random_look, split_of
from codi_jax.data.avatars.vocabulary import KINDS, Look

SEEDS = 300


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def style_of(kind: str) -> tuple[Style, Any]:
    text = resources.files("dicebear_styles").joinpath(f"{KINDS[kind].style}.json").read_text(encoding="utf-8")
    return Style(json.loads(text)), json.loads(text)


def looks_of(kind: str, count: int = SEEDS) -> list[Look]:
    return [random_look(rng_of(seed), kind=kind) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_leaves_nothing_that_has_a_name_to_chance(kind: str) -> None:
    """DiceBear chooses by its seed whatever no option fixes: the same parts and colors for any seed."""
    style, _ = style_of(kind)
    for look in looks_of(kind, 20):
        options = [Avatar(style, {**options_of(look), "seed": seed}).to_json()["options"] for seed in "abc"]
        shown = [
            {name: option for name, option in each.items() if not re.search("Translate|Rotate", name)}
            for each in options
        ]
        assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_rgb_and_the_same_every_time(kind: str) -> None:
    look = random_look(rng_of(0), kind=kind)
    svg = str(Avatar(style_of(kind)[0], options_of(look)))
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=96, height=96))
    np.testing.assert_array_equal(Image.open(io.BytesIO(png)).convert("RGB"), draw(look, 96))
    red, green, blue = draw({**look, "background": "orange"}, 64)[1, 1]
    assert red > green > blue


@pytest.mark.parametrize("kind", KINDS)
def test_dicebear_draws_what_the_look_names(kind: str) -> None:
    style, definition = style_of(kind)
    for look in looks_of(kind, 30):
        resolved = Avatar(style, options_of(look)).to_json()["options"]
        for name in look.keys() - {"kind"}:
            for option, wanted in KINDS[kind].attributes[name].values[look[name]].options.items():
                if option.endswith("Probability"):
                    part = option.removesuffix("Probability")
                    assert (f"{part}Variant" in resolved) == (wanted == 100), (name, look)
                else:
                    assert resolved[option] == wanted, (name, look)
                    variants = definition["components"].get(option.removesuffix("Variant"), {}).get("variants", wanted)
                    assert not option.endswith("Variant") or wanted in variants


@pytest.mark.parametrize("kind", KINDS)
def test_every_change_can_be_seen(kind: str) -> None:
    """In at least three thousandths of the pixels: what cannot be seen cannot be learned."""
    for seed in range(60):
        look = random_look(rng_of(seed), kind=kind)
        name, changed = random_change(look, rng_of(seed))
        differing = (np.abs(draw(look, 64).astype(int) - draw(changed, 64)).max(-1) > 16).mean()
        assert differing > 0.003, (name, look[name], changed[name], differing)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_changes_one_attribute(kind: str) -> None:
    """Only what depends on it may appear or disappear with it: the color of hair that is not there."""
    changed_attributes = set()
    for seed in range(SEEDS):
        look = random_look(rng_of(seed), kind=kind)
        name, after = random_change(look, rng_of(seed))
        changed_attributes.add(name)
        assert look[name] != after[name]
        for other in look.keys() & after.keys() - {name}:
            assert look[other] == after[other]
        for other in look.keys() ^ after.keys():
            unless = KINDS[kind].attributes[other].unless
            assert unless is not None
            assert unless[0] == name
    assert changed_attributes == KINDS[kind].attributes.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_splits_differ_in_combinations_and_share_every_value(kind: str) -> None:
    def pairs(look: Look) -> set[tuple[str, str, str, str]]:
        return {(a, look[a], b, look[b]) for a, b in KINDS[kind].held_out if a in look and b in look}

    shown = [random_look(rng_of(seed), "train", kind) for seed in range(SEEDS)]
    asked = [random_look(rng_of(seed), "validation", kind) for seed in range(SEEDS)]
    trained = set().union(*(pairs(look) for look in shown))
    assert all(pairs(look) - trained for look in asked)
    for name, attribute in KINDS[kind].attributes.items():
        assert {look[name] for look in shown if name in look} == attribute.values.keys()
    # Of each pair of attributes about a fifth of the combinations are held out, by the rule of the docstring.
    for a, b in KINDS[kind].held_out:
        first, second = (list(KINDS[kind].attributes[name].values) for name in (a, b))
        out = {(i, j) for i, j in itertools.product(range(len(first)), range(len(second))) if (i + 2 * j) % 5 == 4}
        assert {(first.index(x[a]), second.index(x[b])) for x in asked if (a, b) in held_out_pairs(x)} <= out
        assert not out & {(first.index(x[a]), second.index(x[b])) for x in shown if a in x and b in x}
        assert 0.1 < len(out) / (len(first) * len(second)) < 0.3
        assert max(collections.Counter(i for i, _ in out).values()) < len(second)
        assert max(collections.Counter(j for _, j in out).values()) < len(first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_names_everything_and_nothing_else(kind: str) -> None:
    """Read back by the phrases: each attribute's value is found, and no other value of it."""
    for seed, look in enumerate(looks_of(kind)):
        text = caption(look, rng_of(seed))
        assert any(noun in text for noun in KINDS[kind].nouns)
        background = re.search(r"(\w+) background", text)
        assert background is not None
        assert background[1] == look["background"]
        rest = text.replace(background[0], "")
        for name in look.keys() - {"kind", "background"}:
            values = KINDS[kind].attributes[name].values
            found = {value for value, each in values.items() if each.phrase and said(each.phrase, rest, look)}
            expected = {look[name]} if values[look[name]].phrase else set()
            assert expected <= found, (name, look, text)
            if KINDS[kind].attributes[name].place != "none":  # the color of hair is also one of shirts
                assert found == expected, (name, look, text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\{", text)


def said(phrase: str, text: str, look: Look) -> bool:
    words = re.sub(r"\{(.+?)\}", lambda name: look.get(name[1], "?"), phrase)
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


@pytest.mark.parametrize("split", ["train", "validation"])
def test_edits_stay_in_their_split(split: looks.Split) -> None:
    for seed in range(SEEDS):
        edit = random_edit(rng_of(seed), split)
        assert split_of(edit.after) == split
        assert split == "validation" or split_of(edit.before) == "train"
        assert edit.before["kind"] == edit.after["kind"]


def test_instructions_say_what_changes() -> None:
    monster = {
        "kind": "monster", "color": "red", "body": "wide", "top": "horns", "eyes": "two", "mouth": "smile",
        "background": "blue",
    }  # fmt: skip
    person = {
        "kind": "person", "skin": "tan", "hair": "bald", "glasses": "nothing", "mouth": "smile", "beard": "nothing",
        "shirt": "plain", "shirt color": "red", "background": "blue",
    }  # fmt: skip

    def instructions(before: Look, name: str, **after: str) -> set[str]:
        return {instruction(before, {**before, **after}, name, rng_of(seed)) for seed in range(40)}

    assert instructions(monster, "top", top="nothing") == {"remove the horns", "take away the horns"}
    assert instructions(monster, "top", top="antenna") == {
        "replace the horns by an antenna", "change the horns to an antenna",
    }  # fmt: skip
    assert instructions({**monster, "top": "nothing"}, "top", top="leaf") == {
        "add a leaf", "give it a leaf", "put a leaf on its head",
    }  # fmt: skip
    assert "make the monster orange" in instructions(monster, "color", color="orange")
    assert "put it on an orange background" in instructions(monster, "background", background="orange")
    hair = {"hair": "long", "hair color": "blue"}
    assert instructions(person, "hair", **hair) == {
        "give the person long blue hair",
        "change the hair to long blue hair",
    }
    assert instructions(person, "shirt", shirt="checkered") >= {"put the person in a checkered red shirt"}


def test_pictures_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    find = looks.importlib.util.find_spec
    monkeypatch.setattr(looks.importlib.util, "find_spec", lambda name: None if name == "resvg_py" else find(name))
    with pytest.raises(ValueError, match=r"pip install \"codi_jax\[avatars\]\""):
        draw(random_look(rng_of(0)), 64)
