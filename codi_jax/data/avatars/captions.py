"""Captions of avatars and instructions to edit them, in varied words and always complete."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codi_jax.data.avatars.looks import Split, random_change, random_look, split_of
from codi_jax.data.avatars.vocabulary import KINDS, Look, Place

_BACKGROUNDS = (" on a {} background", ", on a {} background", " in front of a {} background")
_OPENINGS = ("", "", "a picture of ", "an avatar of ", "a drawing of ")
_REPLACEMENTS = ("replace {old} by {new}", "change {old} to {new}")


def caption(look: Look, rng: np.random.Generator) -> str:
    """A caption that names every attribute of the look, in one of many wordings."""
    kind = KINDS[look["kind"]]
    noun = str(rng.choice(kind.nouns))
    adjectives = _shuffled(_phrases(look, "adjective"), rng)
    parts = _shuffled(_phrases(look, "with"), rng)
    (background,) = _phrases(look, "background")
    worn = _phrases(look, "in")
    named = " ".join([*adjectives, noun])
    if rng.random() < 0.25:  # as tags
        tags = [named, *_shuffled([*parts, *worn, f"{background} background"], rng)]
        return ", ".join(tags)
    text = f"{rng.choice(_OPENINGS)}a {named}"
    if parts:
        text += f" with {_listed(parts)}"
    if worn:
        text += f" in {_listed(worn)}"
    return _with_articles(text + str(rng.choice(_BACKGROUNDS)).format(background))


@dataclass(frozen=True)
class Edit:
    """A change of one attribute.

    Attributes:
      before: the look before the change.
      after: the look after it.
      attribute: the attribute's name.
      instruction: the instruction to change it.
    """

    before: Look
    after: Look
    attribute: str
    instruction: str


def random_edit(rng: np.random.Generator, split: Split, kind: str | None = None) -> Edit:
    """A change of one attribute, in training between two looks of that split, in validation to a look of that split.

    Args:
      rng: the generator of all choices.
      split: the split.
      kind: one of `KINDS`. Default: any.
    """
    kind = kind or str(rng.choice([*KINDS]))
    while True:
        before = random_look(rng, "train" if split == "train" else None, kind)
        name, after = random_change(before, rng)
        if split_of(after) == split:
            return Edit(before, after, name, instruction(before, after, name, rng))


def instruction(before: Look, after: Look, name: str, rng: np.random.Generator) -> str:
    """An instruction that changes one attribute, in one of several wordings.

    Args:
      before: the look before the change.
      after: the look after it.
      name: the attribute.
      rng: the generator of all choices.
    """
    kind = KINDS[before["kind"]]
    attribute = kind.attributes[name]
    old, new = _phrase(before, name), _phrase(after, name)
    templates: Sequence[str] = attribute.changes
    if not new:
        templates = attribute.removals
    elif old and attribute.removals:
        templates = _REPLACEMENTS
    words = {"noun": kind.nouns[0], "new": new, "old": _definite(old)}
    return _with_articles(str(rng.choice(templates)).format(**words))


def _with_articles(text: str) -> str:
    """The text with "an" for "a" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _phrases(look: Look, place: Place) -> list[str]:
    """The phrases of the attributes in a place, without those of parts that are not there."""
    attributes = KINDS[look["kind"]].attributes
    phrases = [_phrase(look, name) for name in look if name != "kind" and attributes[name].place == place]
    return [phrase for phrase in phrases if phrase]


def _phrase(look: Look, name: str) -> str:
    """The phrase of an attribute's value, which may name other attributes."""
    phrase = KINDS[look["kind"]].attributes[name].values[look[name]].phrase
    return re.sub(r"\{(.+?)\}", lambda other: _phrase(look, other[1]), phrase)


def _definite(phrase: str) -> str:
    """The phrase as something already known: "the ring" for "a ring", "the eyes" for "two eyes"."""
    return f"the {re.sub(r'^(an?|one|two|three) ', '', phrase)}"


def _listed(phrases: Sequence[str]) -> str:
    """The phrases as a list: "a", "a and b", "a, b and c"."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def _shuffled(phrases: list[str], rng: np.random.Generator) -> list[str]:
    return [phrases[i] for i in rng.permutation(len(phrases))]
