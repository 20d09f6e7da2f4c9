"""The attributes of avatars: which values they have, how they are said, and how DiceBear draws them.

Four kinds of pictures, each one of DiceBear's styles (https://www.dicebear.com, version 10) with only those of its
parts that can be told apart at 64 pixels and named by a word: monsters (Critters), plants (Sprouts) and planets
(Planets), all CC0 1.0, and people (Personas by Draftbit, CC BY 4.0).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Place = Literal["adjective", "with", "in", "background", "none"]
Look = Mapping[str, str]
"""An avatar: ``kind``, and a value for each attribute of the kind that applies."""


@dataclass(frozen=True)
class Value:
    """One value of an attribute.

    Attributes:
      phrase: how it is said, with other attributes in braces; empty for a part that is not there.
      options: DiceBear's options that draw it.
    """

    phrase: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind.

    Attributes:
      place: where its phrase stands in a caption. ``with``: among what the avatar has; ``in``: among what it wears;
        ``none``: in the phrase of another attribute.
      values: its values by name, in the order of the classifier's outputs.
      changes: instructions to change it, with the ``{new}`` and the ``{old}`` phrase, and the ``{noun}``.
      removals: instructions for a value without a phrase.
      unless: another attribute, and those of its values with which this one cannot be seen.
    """

    place: Place
    values: Mapping[str, Value]
    changes: tuple[str, ...]
    removals: tuple[str, ...] = ()
    unless: tuple[str, frozenset[str]] | None = None

    def applies(self, look: Look) -> bool:
        """Whether the attribute can be seen."""
        return self.unless is None or look[self.unless[0]] not in self.unless[1]


@dataclass(frozen=True)
class Kind:
    """One kind of avatar.

    Attributes:
      style: the name of DiceBear's style.
      nouns: what captions call it; instructions take the first.
      pronoun: what instructions call it.
      attributes: its attributes by name.
      options: DiceBear's options that are the same for all, with the seed of whatever has no option: where the stars
        are, and how a ring is tilted.
      held_out: pairs of attributes some of whose combinations are in the validation split only.
    """

    style: str
    nouns: tuple[str, ...]
    pronoun: str
    attributes: Mapping[str, Attribute]
    options: Mapping[str, Any]
    held_out: tuple[tuple[str, str], ...]

    def position(self, attribute: str, value: str) -> int:
        """The position of a value among those of its attribute."""
        return [*self.attributes[attribute].values].index(value)


COLORS = {
    "red": "#ef4444", "orange": "#fb923c", "yellow": "#facc15", "green": "#4ade80", "blue": "#60a5fa",
    "purple": "#a78bfa", "pink": "#f9a8d4", "white": "#f1f5f9",
}  # fmt: skip
BACKGROUNDS = {
    "red": "#9f1239", "orange": "#c2410c", "green": "#166534", "blue": "#1d4ed8", "purple": "#6d28d9",
    "gray": "#64748b", "black": "#1e293b",
}  # fmt: skip
_HAIR = {
    "black": "#362c47", "brown": "#8b5a3c", "blond": "#facc15", "red": "#dc2626", "blue": "#3b82f6", "pink": "#ec4899",
}  # fmt: skip
_SKIN = {"light": "#ffdbb4", "tan": "#edb98a", "brown": "#ae5d29", "dark": "#614335"}
_CLOTHES = {
    "red": "#e24553", "yellow": "#f3b63a", "green": "#4fae57", "blue": "#456dff", "purple": "#7555ca",
    "pink": "#f55d81",
}  # fmt: skip


def _colors(option: str, colors: Mapping[str, str]) -> dict[str, Value]:
    return {name: Value(name, {option: [color]}) for name, color in colors.items()}


def _variants(part: str, variants: Mapping[str, tuple[str, str]]) -> dict[str, Value]:
    """Values by name, from DiceBear's variant and the phrase."""
    return {name: Value(phrase, {f"{part}Variant": variant}) for name, (variant, phrase) in variants.items()}


def _optional(part: str, absent: Value, variants: Mapping[str, tuple[str, str]]) -> dict[str, Value]:
    """Like `_variants`, with a first value for the part's absence."""
    present = {
        name: Value(value.phrase, {**value.options, f"{part}Probability": 100})
        for name, value in _variants(part, variants).items()
    }
    name = absent.phrase or "nothing"
    return {name: Value(absent.phrase, {f"{part}Probability": 0}), **present}


def _color(noun: str, option: str, colors: Mapping[str, str]) -> Attribute:
    changes = (f"make {noun} {{new}}", f"paint {noun} {{new}}", f"change the color of {noun} to {{new}}")
    return Attribute("adjective", _colors(option, colors), changes)


def _part(noun: str, values: Mapping[str, Value], *changes: str) -> Attribute:
    return Attribute("with", values, ("give it {new}", *changes, f"change its {noun} to {{new}}"))


def _addition(values: Mapping[str, Value], *changes: str) -> Attribute:
    """A part that may be missing."""
    return Attribute("with", values, ("add {new}", *changes), ("remove {old}", "take away {old}"))


_BACKGROUND = Attribute(
    "background",
    _colors("backgroundColor", BACKGROUNDS),
    ("make the background {new}", "change the background to {new}", "put it on a {new} background"),
)
_NOTHING = Value("")
_STILL = {"animationVariant": "none", "seed": "1"}

_MONSTER = Kind(
    "critters",
    ("monster", "creature"),
    "it",
    {
        "color": _color("the {noun}", "bodyColor", COLORS),
        "body": Attribute(
            "adjective",
            _variants("body", {
                "rounded": ("dome", "rounded"), "square": ("block", "square"), "slim": ("tower", "slim"),
                "wide": ("squat", "wide"), "bell-shaped": ("bell", "bell-shaped"),
            }),
            ("make the {noun} {new}", "give it a {new} body", "change its shape to {new}"),
        ),
        "top": _addition(
            _optional("top", _NOTHING, {
                "horns": ("horns", "two horns"), "round ears": ("earsRound", "round ears"),
                "pointed ears": ("earsPointy", "pointed ears"), "antenna": ("antenna", "an antenna"),
                "leaf": ("sprout", "a leaf"), "spikes": ("spikes", "three spikes"),
            }),
            "give it {new}", "put {new} on its head",
        ),
        "eyes": _part(
            "eyes",
            _variants("eyes", {
                "one": ("mono", "one eye"), "two": ("round", "two eyes"), "three": ("trio", "three eyes"),
                "closed": ("closedLine", "closed eyes"), "angry": ("angry", "angry eyes"),
                "happy": ("happy", "laughing eyes"),
            }),
            "let it have {new}",
        ),
        "mouth": _part(
            "mouth",
            _variants("mouth", {
                "smile": ("smile", "a smile"), "frown": ("frown", "a frown"), "open": ("open", "an open mouth"),
                "teeth": ("teeth", "big teeth"), "zigzag": ("zigzag", "a zigzag mouth"),
                "straight": ("line", "a straight mouth"),
            }),
        ),
        "background": _BACKGROUND,
    },
    {**_STILL, "patternProbability": 0, "cheeksProbability": 0, "accentColor": ["#fef3c7"], "scale": 1.1},
    (("color", "body"), ("color", "top"), ("eyes", "mouth"), ("body", "eyes")),
)  # fmt: skip

_PLANT = Kind(
    "sprouts",
    ("pot", "flower pot"),
    "it",
    {
        "color": _color("the {noun}", "potColor", COLORS),
        "pot": Attribute(
            "adjective",
            _variants("pot", {
                "flared": ("taper", "flared"), "round": ("round", "round"), "bowl-shaped": ("bowl", "bowl-shaped"),
                "rimmed": ("rim", "rimmed"),
            }),
            ("make the {noun} {new}", "change the shape of the {noun} to {new}"),
        ),
        "plant": _part(
            "plant",
            _variants("plant", {
                "cactus": ("cactus", "a cactus"), "flower": ("flower", "a flower"), "tulip": ("tulip", "a tulip"),
                "palm tree": ("palm", "a palm tree"), "bush": ("bush", "a bush"), "grass": ("grass", "grass"),
                "aloe": ("succulent", "an aloe"), "seedling": ("sprout", "a seedling"),
            }),
            "replace {old} by {new}", "plant {new} in it",
        ),
        "eyes": _part(
            "eyes",
            _variants("eyes", {
                "open": ("round", "open eyes"), "closed": ("closedLine", "closed eyes"),
                "angry": ("angry", "angry eyes"), "happy": ("happy", "laughing eyes"),
            }),
        ),
        "mouth": _part(
            "mouth",
            _variants("mouth", {
                "smile": ("smile", "a smile"), "frown": ("frown", "a frown"), "open": ("open", "an open mouth"),
                "straight": ("line", "a straight mouth"),
            }),
        ),
        "background": _BACKGROUND,
    },
    {
        **_STILL, "patternProbability": 0, "cheeksProbability": 0, "plantColor": ["#22c55e"],
        "bloomColor": ["#f472b6"],
    },
    (("color", "plant"), ("plant", "pot"), ("eyes", "mouth"), ("color", "eyes")),
)  # fmt: skip

_PLANET = Kind(
    "planets",
    ("planet",),
    "it",
    {
        "color": _color("the {noun}", "planetColor", COLORS),
        "surface": Attribute(
            "adjective",
            _optional("surface", Value("smooth"), {
                "striped": ("banded", "striped"), "cratered": ("cratered", "cratered"),
                "earthlike": ("terra", "earthlike"),
            }),
            ("make the {noun} {new}", "give it a {new} surface", "change its surface to {new}"),
        ),
        "ring": _addition(
            _optional("ring", _NOTHING, {
                "thin": ("thin", "a thin ring"), "double": ("double", "a double ring"),
                "thick": ("bold", "a thick ring"),
            }),
            "give it {new}",
        ),
        "moon": _addition(
            _optional("moons", _NOTHING, {"moon": ("one", "a moon")}), "give it {new}",
        ),
        "stars": _addition(
            _optional("star", _NOTHING, {"stars": ("sparkle", "stars")}), "fill the sky with {new}",
        ),
        "background": _BACKGROUND,
    },
    {**_STILL, "shadeVariant": "soft", "moonColor": ["#fef3c7"], "scale": 1.1},
    (("color", "surface"), ("surface", "ring"), ("color", "ring"), ("surface", "background")),
)  # fmt: skip

_PERSON = Kind(
    "personas",
    ("person",),
    "the person",
    {
        "skin": Attribute(
            "with",
            {name: Value(f"{name} skin", {"skinColor": [color]}) for name, color in _SKIN.items()},
            ("give the person {new}", "change the skin to {new}"),
        ),
        "hair": Attribute(
            "with",
            _variants("hair", {
                "long": ("extraLong", "long {hair color} hair"), "short": ("shortCombover", "short {hair color} hair"),
                "curly": ("curly", "curly {hair color} hair"), "pigtails": ("pigtails", "{hair color} pigtails"),
                "bob": ("bobCut", "a {hair color} bob"), "mohawk": ("mohawk", "a {hair color} mohawk"),
                "bald": ("bald", "a bald head"), "beanie": ("beanie", "a red beanie"), "cap": ("cap", "an orange cap"),
            }),
            ("give the person {new}", "change the hair to {new}"),
        ),
        "hair color": Attribute(
            "none",
            {name: Value(name, {"hairColor": [color]}) for name, color in _HAIR.items()},
            ("make the hair {new}", "dye the hair {new}", "turn the hair {new}"),
            unless=("hair", frozenset({"bald", "beanie", "cap"})),
        ),
        "glasses": _addition(
            {
                "nothing": Value("", {"eyesVariant": "open"}),
                "glasses": Value("glasses", {"eyesVariant": "glasses"}),
                "sunglasses": Value("sunglasses", {"eyesVariant": "sunglasses"}),
            },
            "give the person {new}", "put {new} on the person",
        ),
        "mouth": Attribute(
            "with",
            _variants("mouth", {
                "smile": ("bigSmile", "a big smile"), "frown": ("frown", "a frown"),
                "open": ("surprise", "an open mouth"), "lips": ("lips", "pink lips"),
            }),
            ("give the person {new}", "change the mouth to {new}"),
            unless=("beard", frozenset({"beard"})),  # which has a mouth of its own
        ),
        "beard": _addition(
            _optional("facialHair", _NOTHING, {
                "mustache": ("pyramid", "a mustache"), "goatee": ("goatee", "a goatee"),
            }) | {
                "beard": Value("a full beard", {
                    "facialHairVariant": "beardMustache", "facialHairProbability": 100, "mouthVariant": "bigSmile",
                }),
            },
            "give the person {new}",
        ),
        "shirt": Attribute(
            "in",
            _variants("clothes", {
                "plain": ("squared", "a plain {shirt color} shirt"),
                "checkered": ("checkered", "a checkered {shirt color} shirt"),
            }),
            ("put the person in {new}", "change the shirt to {new}", "dress the person in {new}"),
        ),
        "shirt color": Attribute(
            "none",
            _colors("clothingColor", _CLOTHES),
            ("make the shirt {new}", "turn the shirt {new}", "change the color of the shirt to {new}"),
        ),
        "background": _BACKGROUND,
    },
    {"seed": "1", "noseVariant": "smallRound", "facialHairColor": ["#5b4636"], "scale": 1.15},
    (("hair", "shirt color"), ("hair", "glasses"), ("skin", "hair"), ("mouth", "beard")),
)  # fmt: skip

KINDS: Mapping[str, Kind] = MappingProxyType(
    {"monster": _MONSTER, "plant": _PLANT, "planet": _PLANET, "person": _PERSON}
)
"""All kinds by name, in the order of the classifier's outputs."""
