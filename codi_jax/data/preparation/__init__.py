"""Data sets made from what is found: URLs and captions, folders, pairs. Start at `codi_jax.data.preparation.job`."""
