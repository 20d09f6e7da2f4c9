"""Names for what is being written, beside what it becomes when it is whole."""

import secrets
import shutil
from pathlib import Path


def partial_path(target: Path) -> Path:
    """A new hidden path beside ``target`` to write to; what killed attempts at the same target have left is removed."""
    prefix = f".{target.name}.partial-"
    for left in target.parent.glob(f"{_escaped(prefix)}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return target.with_name(f"{prefix}{secrets.token_hex(4)}")


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
