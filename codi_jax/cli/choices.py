"""Flags with a choice of names, some of which have former names."""

from collections.abc import Mapping
from typing import Any, get_args

import tyro


def choices_with_aliases(kind: Any, aliases: Mapping[str, str]) -> Any:
    """An annotation for a flag of a ``Literal`` type that also accepts former names, which its help does not show.

    Args:
      kind: the ``Literal``.
      aliases: former name -> current name, which becomes the flag's value.
    """
    names = get_args(kind)

    def parse(words: list[str]) -> str:
        name = aliases.get(words[0], words[0])
        if name not in names:
            raise ValueError(f"{words[0]!r} is not one of {', '.join(names)}")
        return name

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=parse,
        is_instance=lambda value: value in names,
        str_from_instance=lambda value: [value],
    )
