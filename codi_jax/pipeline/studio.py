"""Models to try, one picture at a time, with the steps counted: what a page needs of them."""

import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codi_jax.cli.messages import counted
from codi_jax.io.images import canny
from codi_jax.pipeline.call_inputs import image_size
from codi_jax.pipeline.model import Model

_LONGEST_PROMPT = 1000
_LINE = 40  # darkness, of 255, from which a place of a drawing belongs to a line

Progress = Callable[[int, int], Any]
"""Called with the number of steps that are done, and of all."""


class Made(NamedTuple):
    """A picture that a model made.

    Attributes:
      pixels: the picture.
      name: the model's name.
      steps: the number of steps.
      seconds: how long it took, without compilation.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    name: str
    steps: int
    seconds: float

    @property
    def caption(self) -> str:
        """What it is, for people."""
        return f"{self.name}, {counted(self.steps, 'step')}, {self.seconds:.2f} s"


class Studio:
    """Models by name, of which one at a time is used.

    Attributes:
      models: the models.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self._busy = threading.Lock()

    def make(self, name: str, prompt: str, steps: int, progress: Progress, **options: Any) -> Made:
        """One picture.

        Args:
          name: the model's.
          prompt: the text.
          steps: the number of steps.
          progress: called now and then, in this thread.
          **options: arguments of `codi_jax.Model.__call__`.

        Raises:
          ValueError: if the model does not take this.
          FloatingPointError: if the model is broken.
        """
        if len(prompt) > _LONGEST_PROMPT:
            raise ValueError(f"The text is longer than {_LONGEST_PROMPT} characters.")
        model = self.models[name]
        pictures = {key: value for key, value in options.items() if key in ("image", "control_image")}
        visited, done = len(model.check(steps=steps, **pictures)), 0

        def count(_: int) -> None:
            nonlocal done
            done += 1

        # The runtime reports steps in a thread of its own, from which a page could not be told.
        with self._busy, futures.ThreadPoolExecutor(1) as pool:
            made = pool.submit(model, prompt, steps=steps, on_step=count, **options)
            while not futures.wait([made], timeout=0.1).done:
                progress(done, visited)
            return Made(made.result()[0], name, steps, model.seconds)

    def size(self, name: str) -> tuple[int, int]:
        """Height and width of the model's pictures."""
        return image_size(self.models[name].networks, None, None)

    def resized(self, name: str, picture: Image.Image) -> Image.Image:
        """A picture in the size of the model's."""
        height, width = self.size(name)
        return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)

    def edges(self, name: str, picture: Image.Image, *, is_drawn: bool) -> UInt8[np.ndarray, "height width 3"]:
        """The condition for a ControlNet of edges: the dark lines of a drawing, or the edges of a picture."""
        if is_drawn:
            height, width = self.size(name)
            darkness = 255 - np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BOX))
            edges = np.where(darkness > _LINE, 255, 0).astype(np.uint8)
        else:
            edges = canny(np.asarray(self.resized(name, picture)))
        return np.repeat(edges[..., None], 3, axis=-1)
