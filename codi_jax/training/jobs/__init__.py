"""Jobs that need more than `codi_jax.training.run.run`: flags that scripts share, and what they do differently."""
