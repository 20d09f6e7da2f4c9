"""Per-sample losses, and their weights.

Everything here has one number per sample, [b]: weights and losses of a batch have the same shape, so a weight cannot
broadcast over an axis of the latents by accident. The method takes the mean over the batch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from codi_jax.diffusion.schedule import PredictionType


def mse(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """The mean squared difference of each sample, float32.

    Args:
      prediction: with a leading batch axis.
      target: of the same shape.
    """
    return _mean_of_sample(_difference(prediction, target) ** 2)


def huber(
    prediction: Float[Array, "b ..."], target: Float[Array, "b ..."], c: float | Float[Array, ""] = 1e-3
) -> Float[Array, " b"]:
    """The pseudo-Huber loss of each sample, mean(√(d² + c²) − c), float32 (Song and Dhariwal, 2024, section 3.3).

    Applied to each element of a sample, as in LCM's code, not to its norm.

    Args:
      prediction: with a leading batch axis.
      target: of the same shape.
      c: where it turns from quadratic to linear.
    """
    difference = _difference(prediction, target)
    return _mean_of_sample(jnp.sqrt(difference**2 + c**2) - c)


def min_snr_weights(
    snr: Float[Array, " b"], gamma: float | int | Float[Array, ""] | None, space: PredictionType
) -> Float[Array, " b"]:
    """The min-SNR-γ weights of a loss (Hang et al., 2023, section 3.4).

    min(SNR, γ) for a loss on x̂, hence min(SNR, γ)/SNR for one on ε̂ and min(SNR, γ)/(SNR + 1) for one on v. The first
    and the last go to 0 with the signal: such a loss teaches little at the noisiest times, and nothing at a time
    without signal.

    Args:
      snr: the signal-to-noise ratio of each sample, 0 where there is no signal.
      gamma: γ; 5 in the paper. ``None`` weighs all samples equally.
      space: what the loss compares; for a loss on the network's output, what the network predicts.
    """
    if gamma is None:
        return jnp.ones_like(snr)
    match space:
        case "epsilon":
            return jnp.minimum(gamma / snr, 1.0)  # at SNR = 0 too
        case "v_prediction":
            return jnp.minimum(snr, gamma) / (snr + 1)
        case "sample":
            return jnp.minimum(snr, gamma)


def _difference(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    if prediction.shape != target.shape:
        raise ValueError(f"a prediction of shape {prediction.shape} cannot be compared with {target.shape}.")
    return prediction.astype(jnp.float32) - target.astype(jnp.float32)


def _mean_of_sample(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return x.mean(axis=tuple(range(1, x.ndim)))
