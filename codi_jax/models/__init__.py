"""The networks of Stable Diffusion as Flax Linen modules, built from the ``config.json`` files of their folders."""
