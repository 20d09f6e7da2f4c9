"""The names of parameters: a path in a Flax tree is a name in the PyTorch state dict, by one rule."""

import re


def torch_name(path: tuple[str, ...]) -> str:
    """The name in the state dict of the parameter at ``path`` in the tree.

    A number at the end of a name is a list index (``resnets_1`` -> ``resnets.1``), except in ``linear_1``, a name.
    ``kernel``, ``scale`` and ``embedding`` are ``weight``; every other leaf keeps its name.
    """
    *modules, leaf = path
    parts = [re.sub(r"(?<!^linear)_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*parts, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])
