"""What the tests of a method share: its inputs as a whole, and its equations' common parts in NumPy, in float64."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from standins import float64

from codi_jax.pipeline.conditions import Frozen

COLUMN = (slice(None), None, None, None)
"""Makes a number for each sample one for each of its pixels."""


@dataclass
class Problem:
    """All that a loss depends on.

    Attributes:
      loss_function: ``loss(params, state, frozen, batch, key, setup)`` of the method.
    """

    loss_function: Any
    setup: Any
    state: Any
    frozen: Frozen
    batch: dict[str, jax.Array]
    key: jax.Array

    def loss(self, params: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = self.state.params if params is None else params
        return self.loss_function(params, self.state, self.frozen, self.batch, self.key, self.setup)

    def float64(self) -> tuple[Any, Any]:
        """The batch, and the frozen parameters."""
        return float64(self.batch), float64(self.frozen.params)

    def null_text(self) -> tuple[np.ndarray, np.ndarray]:
        """Its features and its pooled output, for each sample of the batch."""
        null, count = self.frozen.null_text, len(self.batch["context"])
        assert null is not None
        context, pooled = (np.repeat(float64(features), count, 0) for features in (null.context, null.pooled))
        return context, pooled


def assert_equals(problem: Problem, wanted: Any) -> None:
    """That loss and gradient are those of a function of parameters in float64."""
    (value, _), gradient = jax.value_and_grad(problem.loss, has_aux=True)(problem.state.params)
    np.testing.assert_allclose(value, wanted(float64(problem.state.params)), rtol=1e-5)
    theirs = numpy_gradient(wanted, problem.state.params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(theirs), strict=True):
        assert np.abs(b).max() > 0, "a parameter without gradient proves nothing"
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)


def numpy_gradient(loss: Any, theta: Any) -> Any:
    """Central differences."""
    leaves, tree = jax.tree.flatten(float64(theta))
    gradient = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, out in zip(leaves, gradient, strict=True):
        for i in np.ndindex(leaf.shape):
            here, h = leaf[i], 1e-5
            leaf[i] = here + h
            above = loss(jax.tree.unflatten(tree, leaves))
            leaf[i] = here - h
            out[i] = (above - loss(jax.tree.unflatten(tree, leaves))) / (2 * h)
            leaf[i] = here
    return jax.tree.unflatten(tree, gradient)


def alpha_sigma(schedule: Any) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of all times."""
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


def draw_latents(batch: Any, key: jax.Array) -> np.ndarray:
    """z_0: a sample of the cached posterior, times the scaling factor."""
    mean, logvar = np.split(batch["moments"], 2, axis=-1)
    return (mean + np.exp(logvar / 2) * float64(jax.random.normal(key, mean.shape))) * 0.3


def x_and_eps(prediction_type: str, out: np.ndarray, z: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x̂ and ε̂ from a network's output, at α = a and σ = b."""
    match prediction_type:
        case "epsilon":
            return np.stack([(z - b * out) / a, out])
        case "v_prediction":
            return np.stack([a * z - b * out, a * out + b * z])
        case "sample":
            return np.stack([out, (z - a * out) / b])
    raise ValueError(prediction_type)


def boundary_scalings(t: np.ndarray, timestep_scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """c_skip and c_out of the consistency function, with σ_data = 0.5."""
    tau = (timestep_scaling * t)[COLUMN]
    return 0.5**2 / (tau**2 + 0.5**2), tau / np.sqrt(tau**2 + 0.5**2)


def all_combinations(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every value of every flag with every one of the others."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def covering_combinations(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """So few of all combinations that still every two values of two flags meet in one of them."""
    rest = all_combinations(choices)
    np.random.default_rng(0).shuffle(rest)
    pairs = {pair for c in rest for pair in itertools.combinations(c.items(), 2)}
    chosen = []
    while pairs:
        best = max(rest, key=lambda c: len(pairs & set(itertools.combinations(c.items(), 2))))
        pairs -= set(itertools.combinations(best.items(), 2))
        chosen.append(best)
    return chosen
