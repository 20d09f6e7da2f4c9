"""One training run: the loop, the optimizer, checkpoints, logging and validation. It knows no method."""
