"""What a sampler is made of: the times that it visits, and the steps that it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from codi_jax.diffusion.schedule import Latents

Denoise = Callable[[Latents, Shaped[Array, ""]], Latents]
Times = Num[Array, " n"]
Count = int | Int[Array, ""]
Noise = Float[Array, "n b h w c"]
Levels = tuple[Float[Array, " n"], Float[Array, " n"]]
"""α and σ at several places."""


@dataclass(frozen=True)
class Visits:
    """The times that a sampler visits.

    Attributes:
      times: all times of the sampler, and padding.
      first: the index of the first one that is visited.
      count: how many times there are without the padding.
    """

    times: Times
    first: Count
    count: Count

    @property
    def number(self) -> Int[Array, " n"]:
        """For each time, how many are visited before it."""
        return jnp.arange(len(self.times)) - self.first

    @property
    def is_last(self) -> Bool[Array, " n"]:
        """For each time, whether it is the last one."""
        return jnp.arange(len(self.times)) == self.count - 1

    @property
    def following(self) -> Times:
        """The time that follows each one; the last one's is arbitrary."""
        return jnp.concatenate([self.times[1:], self.times[-1:]])


@dataclass(frozen=True)
class Course:
    """How a sampler goes from noise to z_0, in a variable of its own: z, or z/α.

    Attributes:
      step: ``(x, *kept) = step((x, *kept), *values)``, one step of the variable and of what the sampler remembers.
      values: the values of all steps, by their first axis.
      start: α and σ such that α z_0 + σ ε is the variable where sampling starts.
      ends: the same where each step ends.
      scale: the standard deviation of the variable where sampling starts from noise.
      memory: how many arrays of latents the sampler remembers; zeros at the start.
    """

    step: Callable[..., tuple[Latents, ...]]
    values: tuple[Any, ...]
    start: tuple[ArrayLike, ArrayLike]
    ends: Levels
    scale: ArrayLike = 1.0
    memory: int = 0
