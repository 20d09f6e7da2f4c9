"""One training run: the loop, the optimizer, checkpoints, logging and validation, independent of the method."""
