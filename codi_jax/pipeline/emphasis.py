r"""Weights of words in a prompt, written as A1111's web UI reads them, and many programs after it.

``(word)`` weighs a word 1.1 times, ``((word))`` 1.21 times, ``[word]`` 1/1.1 times, and ``(word:1.5)`` 1.5 times;
``\(`` and ``\)`` are parentheses of the text; ``BREAK`` ends a chunk of tokens.
"""

import re

Piece = tuple[str | None, float]
"""A text and its weight; ``None`` ends a chunk."""
_STEP = 1.1
_PARTS = re.compile(
    r"\\(?P<escaped>[\\()\[\]])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?\d*\.?\d+)\s*\)|(?P<close>[)\]])"
    r"|\s*\b(?P<pause>BREAK)\b\s*|.",
    re.DOTALL,
)


def parse_emphasis(prompt: str) -> list[Piece]:
    """The pieces of a prompt and their weights.

    Examples:
      >>> parse_emphasis("an (important:1.3) word")
      [('an ', 1.0), ('important', 1.3), (' word', 1.0)]

    A parenthesis that nothing closes reaches to the end, and one that nothing opens is text.
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(first: int, weight: float) -> None:
        pieces[first:] = [(text, old if text is None else old * weight) for text, old in pieces[first:]]

    for part in _PARTS.finditer(prompt):
        closed = {")": "(", "]": "["}.get(part["close"] or "", "")
        if part["open"]:
            opened[part["open"]].append(len(pieces))
        elif part["weight"] and opened["("]:
            weigh(opened["("].pop(), float(part["weight"]))
        elif closed and opened[closed]:
            weigh(opened[closed].pop(), _STEP if closed == "(" else 1 / _STEP)
        elif part["pause"]:
            pieces.append((None, 1.0))
        else:
            pieces.append((part["escaped"] or part[0], 1.0))
    for kind, weight in (("(", _STEP), ("[", 1 / _STEP)):
        for first in opened[kind]:
            weigh(first, weight)
    return _joined(pieces) or [("", 1.0)]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces with those of equal weight that follow each other as one."""
    joined: list[Piece] = []
    for text, weight in pieces:
        before, old = joined[-1] if joined else (None, 0.0)
        if text is not None and before is not None and old == weight:
            joined[-1] = before + text, weight
        else:
            joined.append((text, weight))
    return joined
