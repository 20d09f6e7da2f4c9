"""Data sets made of URLs and captions, of folders, or of pairs. Start reading at `codi_jax.data.preparation.job`."""
