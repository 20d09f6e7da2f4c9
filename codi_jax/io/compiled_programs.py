"""The cache of compiled programs on disk, which makes the next start faster."""

import os
from pathlib import Path

import jax


def keep_compiled_programs(folder: Path) -> None:
    """Makes JAX keep compiled programs in ``folder``, unless ``JAX_COMPILATION_CACHE_DIR`` names another one."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
