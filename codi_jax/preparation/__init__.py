"""Data sets made from what is found: URLs and captions, folders, pairs. Start reading at `codi_jax.preparation.job`."""
