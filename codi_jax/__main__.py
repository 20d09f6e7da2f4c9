"""``python3 -m codi_jax``: the same as ``codi-jax``."""

from codi_jax.cli.commands import main

main()
