"""Data sets made from URLs and captions, folders, or pairs. Start reading at `codi_jax.data.preparation.job`."""
