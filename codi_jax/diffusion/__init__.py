"""The math of diffusion noise: schedules, samplers, guidance and losses, as functions of arrays."""
