"""Pruning levels by name: the published ones, and a user's own."""

from pathlib import Path

import yaml

from codi_jax.models.pruning import LEVELS, KeptBlocks


def find_level(name: str, table: Path | None = None) -> KeptBlocks:
    """The blocks that a level keeps.

    Args:
      name: the level's name.
      table: a YAML file of levels by name, in the notation of `KeptBlocks.from_dict`. Default: `LEVELS`.

    Raises:
      ConfigError: if the definition of the level is not valid.
      ValueError: if the level does not exist, or the file cannot be read.
    """
    levels = LEVELS if table is None else _read(table.expanduser())
    if name not in levels:
        where = "" if table is None else f" in --distill_table {table}"
        raise ValueError(f"--distill_level {name}: there is no such level{where}; there are {', '.join(levels)}.")
    return KeptBlocks.from_dict(name, levels[name])


def _read(table: Path) -> dict:
    try:
        levels = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--distill_table {table} cannot be read as YAML: {reason}.") from None
    if not isinstance(levels, dict):
        raise ValueError(f"--distill_table {table} holds no levels by name.")
    return levels
