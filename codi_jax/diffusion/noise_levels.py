"""Where the noise levels of a sampler lie between the first and the last: on the host and in compiled programs."""

from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float

from codi_jax.diffusion.scheduler_config import NoiseLevels

_RHO = 7  # of Karras et al., 2022
_ALPHA = _BETA = 0.6  # of Lee et al., 2024


def respaced_levels(first: Any, last: Any, count: int, levels: NoiseLevels) -> Any:
    """Noise levels σ/α, descending from the first to the last.

    Args:
      first: the highest level, a number of NumPy or JAX.
      last: the lowest.
      count: how many.
      levels: ``karras``: σ^(1/ρ) is evenly spread, ρ = 7 (Karras et al., 2022, equation 5); ``exponential``: log σ is;
        ``beta``: quantiles of the distribution Beta(0.6, 0.6) (Lee et al., 2024).

    Raises:
      ValueError: for levels that are where a schedule's times put them.
    """
    ramp = np.linspace(0, 1, count)
    match levels:
        case "karras":
            return (first ** (1 / _RHO) + ramp * (last ** (1 / _RHO) - first ** (1 / _RHO))) ** _RHO
        case "exponential":
            return first * (last / first) ** ramp
        case "beta":
            return last + _quantiles(count) * (first - last)
        case _:
            raise ValueError(f"{levels} levels depend on the times.")


def _quantiles(count: int) -> Float[np.ndarray, " n"]:
    return scipy.special.betaincinv(_ALPHA, _BETA, 1 - np.linspace(0, 1, count))
