"""Distillation of Stable Diffusion models into few-step students, in JAX and Flax."""

__version__ = "0.1.0"
