"""Arguments of a call: bad ones get a sentence before anything is compiled."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE
from pairs import Pairs, latents, run_ours

from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.pipeline import call_inputs


def test_steps_beyond_the_room_are_compiled_by_themselves() -> None:
    for steps, room in ((1, 8), (8, 8), (9, 64), (64, 64), (65, 65)):
        noise = np.ones((steps - 1, 1, 2, 2, 4), np.float32)
        times = np.arange(steps)[::-1].astype(np.int32)
        padded = call_inputs._padded({"timesteps": times, "noise": jnp.asarray(noise)})
        assert padded["timesteps"].shape == (room,)
        assert padded["noise"].shape[0] == room - 1
        assert padded["num_steps"] == steps


TINY = np.zeros((SIZE, SIZE, 3), np.uint8)
BAD_CALLS = {
    "no-prompt": ("text-to-image", {"prompt": []}, "there is no prompt"),
    "height": ("text-to-image", {"height": 30}, "height = 30, width = 32: .* multiples of 4 pixels"),
    "width-0": ("text-to-image", {"width": 0}, "height = 32, width = 0: .* multiples of 4"),
    "steps-0": ("text-to-image", {"steps": 0}, "steps = 0: choose 1 to 1000"),
    "steps-1001": ("text-to-image", {"steps": 1001}, "steps = 1001: choose 1 to 1000"),
    "steps-lcm": ("lcm", {"steps": 51}, r"steps = 51: choose 1 to 50 \(original_inference_steps"),
    "codi": ("text-to-image", {"sampler": "codi"}, "The codi sampler needs the grid that the student was distilled on"),
    "ascending": ("lcm", {"timesteps": [1, 399], "steps": None}, r"timesteps = \[1, 399\]: they must descend"),
    "beyond-T": ("lcm", {"timesteps": [1000], "steps": None}, "be in 0 to 999"),
    "no-times": ("lcm", {"timesteps": [], "steps": None}, "they must descend"),
    "uneven": ("text-to-image", {"timesteps": [999, 9]}, "the sampler ddim takes even steps only"),
    "two-counts": ("lcm", {"timesteps": [399], "steps": 2}, "steps = 2, but timesteps has 1 times: give only one"),
    "strength-alone": ("text-to-image", {"strength": 0.5}, "strength says how much of an image to change: give that"),
    "strength": ("text-to-image", {"image": TINY, "strength": 1.5}, "strength = 1.5: choose a number from 0 to 1"),
    "no-step": ("text-to-image", {"image": TINY, "strength": 0.4}, "strength = 0.4 of 2 steps leaves none: .* 0.5,"),
    "strength-edit": ("instruct-pix2pix", {"image": TINY, "strength": 1}, "told by the prompt .* takes no strength"),
    "image-missing": ("instruct-pix2pix", {}, "this model is for the task 'edit': give it an image"),
    "image-count": ("instruct-pix2pix", {"image": [TINY] * 3}, "image has 3 images for 2 prompts"),
    "image-shape": ("instruct-pix2pix", {"image": TINY[..., :1]}, r"must be \[height, width, 3\]"),
    "mask-missing": ("inpainting", {"image": TINY}, "an inpainting model needs mask_image"),
    "mask": ("instruct-pix2pix", {"image": TINY, "mask_image": TINY}, "told by the prompt .* no mask_image"),
    "mask-alone": ("text-to-image", {"mask_image": TINY}, "mask_image is where to paint in an image: give that"),
    "control": ("text-to-image", {"control_image": TINY}, "control_image needs a ControlNet: load one"),
    "control-missing": ("controlnet", {}, "the pipeline has a ControlNet: give it a control_image"),
    "control-count": ("controlnet", {"control_image": [TINY] * 3}, "control_image has 3 images for 2 prompts"),
    "latents": ("text-to-image", {"latents": latents()[:1]}, r"latents have shape \[1, 8, 8, 4\], but \[2, 8, 8, 4\]"),
    "latents-nchw": ("lcm", {"latents": latents().transpose(0, 3, 1, 2)}, r"latents have shape \[2, 4, 8, 8\]"),
    "noise": ("lcm", {"noise": latents()[None].repeat(3, 0)}, r"noise has shape \[3, 2, 8, .*, but \[1, 2, 8, 8, 4\]"),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("family", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(pairs: Pairs, family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run_ours(pairs(family).ours, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "steps", "strength", "visited"),
    [
        ("ddim", 10, 0.8, 8),
        ("ddim", 10, 0.79, 7),
        ("ddim", 4, 1, 4),
        ("heun", 10, 0.5, 9),
        ("pndm", 10, 1, 11),
        ("pndm", 10, 0.5, 6),
        ("pndm", 10, 0.1, 1),
        ("pndm", 1, 1, 1),
    ],
)
def test_a_part_of_the_steps_is_taken(
    pairs: Pairs, sampler: SamplerName, steps: int, strength: float, visited: int
) -> None:
    model = pairs("text-to-image").ours
    times = model.check(TINY, steps=steps, sampler=sampler, strength=strength)
    assert len(times) == visited
    last = model.times(steps, sampler)[-visited:]
    if sampler == "pndm" and 1 < visited <= steps:  # the second time is visited twice, of the rest as of all
        last = np.concatenate([last[1:3], last[2:]])
    np.testing.assert_array_equal(times, last)
