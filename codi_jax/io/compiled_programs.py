"""Compiled programs on the disk, from one start to the next."""

import os
from pathlib import Path

import jax


def keep_compiled_programs(folder: Path) -> None:
    """Makes JAX keep compiled programs in ``folder``; an environment variable of JAX's own goes first."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
