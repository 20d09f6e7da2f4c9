"""The mathematics of noise: schedules, samplers, guidance and losses, as functions of arrays."""
