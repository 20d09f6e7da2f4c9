"""Looks: which avatars there are, which of them only validation asks for, and how they are drawn.

The split is by combinations. Some pairs of an attribute's values, one in about five, are held out: a training picture
shows none of them, a validation picture at least one. Every value occurs in training, so that validation asks for
something that was never shown, but could be learned. The rule: of each pair of attributes in `Kind.held_out`, the
values at positions i and j in the vocabulary are held out if (i + 2 j) mod 5 = 4.
"""

import functools
import importlib.util
import json
from importlib import resources
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from codi_jax.data.avatars.vocabulary import KINDS, Look

Split = Literal["train", "validation"]


def random_look(rng: np.random.Generator, split: Split | None = None, kind: str | None = None) -> Look:
    """A look of the split, each value as likely as the others as far as the split allows.

    Args:
      rng: the generator of all choices.
      split: the split. Default: either.
      kind: one of `KINDS`. Default: any.
    """
    kind = kind or str(rng.choice([*KINDS]))
    while True:
        values = {name: str(rng.choice([*each.values])) for name, each in KINDS[kind].attributes.items()}
        look = _visible({"kind": kind, **values})
        if split is None or split_of(look) == split:
            return look


def random_change(look: Look, rng: np.random.Generator) -> tuple[str, Look]:
    """The name of an attribute, and the look with another value for it."""
    attributes = KINDS[look["kind"]].attributes
    name = str(rng.choice([name for name in look if name != "kind"]))
    value = str(rng.choice([value for value in attributes[name].values if value != look[name]]))
    hidden = {other: str(rng.choice([*attributes[other].values])) for other in attributes if other not in look}
    changed = {"kind": look["kind"], **{other: {**hidden, **look, name: value}[other] for other in attributes}}
    return name, _visible(changed)


def _visible(look: Look) -> Look:
    """The look without the attributes that do not apply."""
    attributes = KINDS[look["kind"]].attributes
    return {name: value for name, value in look.items() if name == "kind" or attributes[name].applies(look)}


def split_of(look: Look) -> Split:
    """The split that a look belongs to."""
    return "validation" if held_out_pairs(look) else "train"


def held_out_pairs(look: Look) -> list[tuple[str, str]]:
    """The pairs of attributes whose values are held out together."""
    kind = KINDS[look["kind"]]
    return [
        (a, b)
        for a, b in kind.held_out
        if a in look and b in look and (kind.position(a, look[a]) + 2 * kind.position(b, look[b])) % 5 == 4
    ]


def draw(look: Look, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture.

    Args:
      look: a look.
      size: the side of the square, in pixels.

    Raises:
      ValueError: if the packages that draw are not installed.
    """
    require_packages()
    import resvg_py
    from dicebear import Avatar

    svg = str(Avatar(_style(KINDS[look["kind"]].style), options_of(look)))
    png = np.frombuffer(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)), np.uint8)
    return cv2.cvtColor(cv2.imdecode(png, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]


def require_packages() -> None:
    """Raises `ValueError` if the packages that draw are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("dicebear", "dicebear_styles", "resvg_py")):
        raise ValueError('avatars are drawn by packages that are missing: pip install "codi_jax[avatars]".')


def options_of(look: Look) -> dict[str, Any]:
    """DiceBear's options for a look, which leave nothing to its own random choice."""
    kind = KINDS[look["kind"]]
    options: dict[str, Any] = dict(kind.options)
    for name, value in look.items():
        if name != "kind":
            options.update(kind.attributes[name].values[value].options)
    return options


@functools.cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(json.loads(resources.files("dicebear_styles").joinpath(f"{name}.json").read_text(encoding="utf-8")))
