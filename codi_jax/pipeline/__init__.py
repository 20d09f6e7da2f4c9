"""A whole model: its networks together, what they are conditioned on, and the program that makes images."""
