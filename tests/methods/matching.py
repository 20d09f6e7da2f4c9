"""Problems of distribution matching, and what its losses are made of in NumPy, in float64."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import standins
from numerics import COLUMN, Problem, alpha_sigma, x_and_eps
from standins import CONTROLNET, EDITING, SCHEDULER, TEXT_TO_IMAGE, float64, make_batch, null_text, numpy_predict

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import disback, dmd
from codi_jax.pipeline.conditions import Frozen

B = standins.CHANNELS
SHAPE = (B, B, standins.CHANNELS)
SIDE = B  # the stand-in for the VAE does not make images smaller
NETWORKS = {"text": TEXT_TO_IMAGE, "edit": EDITING, "controlnet": CONTROLNET}

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def generator_loss(params: Any, state: Any, frozen: Frozen, batch: Any, key: jax.Array, setup: dmd.DmdSetup) -> Any:
    return dmd.generator_loss(params, state.other, frozen, batch, key, setup)


def fake_loss(params: Any, state: Any, frozen: Frozen, batch: Any, key: jax.Array, setup: dmd.DmdSetup) -> Any:
    return dmd.fake_loss(params, state.other, frozen, batch, key, setup)


def schedule_of(prediction_type: str, **changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type, **changes})


def make_problem(loss: Loss, task: str, prediction_type: str, *, unet: Any = None, **flags: Any) -> Problem:
    edits = task == "edit"
    networks = NETWORKS[task] if unet is None else dataclasses.replace(NETWORKS[task], unet=unet)
    of_method = disback.DisbackFlags(**{"real_guidance_scale": 3.0, "fake_guidance_scale": 1.0, **flags})
    of_method.check()
    setup = disback.configure(networks, of_method, side=SIDE)
    generator, fake, target = ({"unet": standins.unet_params(seed, edits=edits)} for seed in (2, 4, 1))
    params = {"controlnet": standins.controlnet_params(6)} if task == "controlnet" else {}
    assert {*setup.frozen} == {*params, "vae"}
    frozen = Frozen(params, schedule_of(prediction_type), null_text=null_text(), target=target["unet"])
    of_generator = loss is generator_loss
    state = SimpleNamespace(params=generator if of_generator else fake, other=fake if of_generator else generator)
    return Problem(loss, setup, state, frozen, make_batch(B), jax.random.key(8))


@dataclasses.dataclass
class Equations:
    """What both losses are made of, in float64."""

    problem: Problem

    def __post_init__(self) -> None:
        self.schedule, self.flags = self.problem.frozen.schedule, self.problem.setup.flags
        self.batch, self.frozen = self.problem.float64()
        self.target = float64(self.problem.frozen.target)
        self.alpha, self.sigma = alpha_sigma(self.schedule)
        batch, networks = self.batch, self.problem.setup.networks
        self.control = batch["conditioning"] / 255 if networks.controlnet is not None else None
        edits = networks.unet.config.in_channels == 2 * B
        image = np.split(batch["conditioning_moments"], 2, axis=-1)[0] if edits else None
        null_context, null_pooled = self.problem.null_text()
        self.full = batch["context"], batch["pooled"], image
        self.image_only = null_context, null_pooled, image
        self.null = null_context, null_pooled, None if image is None else np.zeros_like(image)

    def output(self, unet: Any, z: Any, t: Any, given: Any) -> np.ndarray:
        context, pooled, image = given
        networks = {**self.frozen, "unet": unet}
        return numpy_predict(networks, z, t, context, pooled, self.batch["time_ids"], self.control, image)

    def guided(self, unet: Any, z: Any, t: Any, text: float, image: float) -> np.ndarray:
        full, null = (self.output(unet, z, t, given) for given in (self.full, self.null))
        if text <= 1 or (self.full[2] is not None and image < 1):  # as in DMD2's code, and in all pipelines
            return full
        if self.full[2] is None:
            return null + text * (full - null)
        of_image = self.output(unet, z, t, self.image_only)
        return null + image * (of_image - null) + text * (full - of_image)

    def x0(self, out: np.ndarray, z: np.ndarray, t: np.ndarray) -> np.ndarray:
        return x_and_eps(self.schedule.prediction_type, out, z, self.alpha[t][COLUMN], self.sigma[t][COLUMN])[0]

    def add_noise(self, x: np.ndarray, noise: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.alpha[t][COLUMN] * x + self.sigma[t][COLUMN] * noise

    def generate(self, unet: Any, key: jax.Array) -> np.ndarray:
        """In one step of noise."""
        z = float64(jax.random.normal(jax.random.split(key, 3)[0], (B, *SHAPE)))
        t = np.full(B, self.flags.conditioning_timestep)
        return self.x0(self.output(unet, z, t, self.full), z, t)

    def gradient(self, x: np.ndarray, fake: Any, target: Any, key: jax.Array) -> np.ndarray:
        """g of equation 7, as it stands there."""
        t_key, noise_key = jax.random.split(key)
        t = np.asarray(jax.random.randint(t_key, (B,), 20, 981))
        x_t = self.add_noise(x, float64(jax.random.normal(noise_key, x.shape)), t)
        flags = self.flags
        of_fake = self.x0(self.guided(fake, x_t, t, flags.fake_guidance_scale, 1.0), x_t, t)
        scales = flags.real_guidance_scale, flags.real_image_guidance_scale
        of_target = self.x0(self.guided(target, x_t, t, *scales), x_t, t)
        return (of_fake - of_target) / np.abs(x - of_target).mean((1, 2, 3), keepdims=True)
