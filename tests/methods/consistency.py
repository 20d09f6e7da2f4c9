"""Problems of LCM and of what is like it, and the step of their teacher in NumPy, in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import standins
from numerics import COLUMN, Problem, alpha_sigma, draw_latents, x_and_eps
from standins import (
    CONTROLNET,
    EDITING,
    SCHEDULER,
    SMALL_SD,
    SMALL_XL,
    TEXT_TO_IMAGE,
    float64,
    make_batch,
    null_text,
    numpy_predict,
    small_unet,
)

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import lcm
from codi_jax.pipeline.conditions import Condition, Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim

B, N, DIM = standins.CHANNELS, 8, 12


def guided_params(seed: int, width: int, *, edits: bool) -> dict[str, Any]:
    kernel = 0.3 * np.random.default_rng(100 + seed).standard_normal((width, 1))
    return {
        **standins.unet_params(seed, edits=edits),
        "time_embedding": {"cond_proj": {"kernel": jnp.asarray(kernel, jnp.float32)}},
    }


def make_problem(task: str, prediction_type: str, loss_type: str, dropout: float = 0.0, method: Any = None) -> Problem:
    """Of LCM for this task, or of another method that has its flags."""
    edits, weighs_image = task.startswith("edit"), task.endswith("two guidances")
    # A timestep scaling so small that c_skip and c_out are far from 0 and 1, and a huber_c amid the differences.
    more = {"w_image_min": 0.2, "w_image_max": 2.0} if weighs_image else {}
    more |= {"conditioning_dropout_prob": dropout} if edits else {}
    method = method or (lcm.EDIT if edits else lcm.TEXT)
    flags = method.flags(
        loss_type=loss_type, huber_c=0.5, num_ddim_timesteps=N, timestep_scaling_factor=0.01, w_min=1.0, w_max=4.0,
        unet_time_cond_proj_dim=DIM, **more,
    )  # fmt: skip
    networks = EDITING if edits else CONTROLNET if task == "controlnet" else TEXT_TO_IMAGE
    setup = method.configure(networks, flags)
    teacher = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type})
    frozen = {"unet": standins.unet_params(1, edits=edits)}
    if task == "controlnet":
        frozen["controlnet"] = standins.controlnet_params(6)
    assert {*setup.frozen} == {*frozen, "vae"}
    width = setup.student.unet.config.time_cond_proj_dim
    params, ema = ({"unet": guided_params(seed, width, edits=edits)} for seed in (2, 4))
    state = optim.init_state(params, optax.identity(), jax.random.key(0), ema=True)
    state = dataclasses.replace(state, ema=ema)
    frozen = Frozen(frozen, method.sampling(teacher, flags), null_text=null_text())
    return Problem(method.loss, setup, state, frozen, make_batch(B), jax.random.key(8))


def numpy_embedding(w: np.ndarray, dim: int) -> np.ndarray:
    frequencies = np.exp(-np.log(10_000) * np.arange(dim // 2) / (dim // 2 - 1))
    # In float32 as in diffusers' get_guidance_scale_embedding: an angle of thousands has no more digits.
    angles = ((1000 * w.astype("f4"))[:, None] * frequencies.astype("f4")).astype("f8")
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


class Step(NamedTuple):
    """The teacher's step, and ``student``: x̂ and ε̂ of the student θ at z and t, as ``student(theta, z, t)``."""

    z_t: np.ndarray
    t: np.ndarray
    z_s: np.ndarray
    s: np.ndarray
    n: np.ndarray
    student: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def numpy_step(problem: Problem) -> Step:
    """What is drawn, and where the guided teacher leads from there."""
    networks, flags, schedule = problem.setup.networks, problem.setup.flags, problem.frozen.schedule
    batch, frozen = problem.float64()
    alpha, sigma = alpha_sigma(schedule)
    edits = networks.unet.config.in_channels == 2 * B
    control = batch["conditioning"] / 255 if networks.controlnet is not None else None

    # What is drawn.
    keys = jax.random.split(problem.key, 6)
    z0 = draw_latents(batch, keys[0])
    n = np.asarray(jax.random.randint(keys[2], (B,), 0, N))
    noise = float64(jax.random.normal(keys[3], z0.shape))
    w = float64(jax.random.uniform(keys[4], (B,), minval=1.0, maxval=4.0))
    w_image = float64(jax.random.uniform(keys[5], (B,), minval=0.2, maxval=2.0))
    k = 1000 // N
    t = (n + 1) * k - 1
    s = np.maximum(t - k, 0)
    z_t = alpha[t][COLUMN] * z0 + sigma[t][COLUMN] * noise

    # What there is to condition on: c_T, text with its pooled output; c_I, image latents (the mode, not scaled). And
    # what stands in their place.
    c_I = np.split(batch["conditioning_moments"], 2, axis=-1)[0] if edits else None
    no_I = np.zeros_like(c_I) if edits else None
    c_T = batch["context"], batch["pooled"]
    no_T = problem.null_text()
    if flags.dropout:
        # From here on a sample's c_T and c_I are what is left to it: teacher, student and target see nothing else.
        r = float64(jax.random.uniform(keys[1], (B,)))
        c_T = tuple(np.where((r < 0.6).reshape(-1, *(1,) * (c.ndim - 1)), no, c) for c, no in zip(c_T, no_T))
        c_I = np.where(((r >= 0.3) & (r < 0.9))[COLUMN], no_I, c_I)

    def e(networks, z, t, c_I, c_T, guidance=None):
        out = numpy_predict(networks, z, t, *c_T, batch["time_ids"], control, c_I, guidance)
        return x_and_eps(schedule.prediction_type, out, z, alpha[t][COLUMN], sigma[t][COLUMN])

    # The teacher's guided step, on x̂ and ε̂ apart.
    of_both, of_none = e(frozen, z_t, t, c_I, c_T), e(frozen, z_t, t, no_I, no_T)
    if flags.weighs_image:  # Brooks et al., 2023, equation 3
        s_I, s_T = (w_image + 1)[COLUMN], (w + 1)[COLUMN]
        of_image = e(frozen, z_t, t, c_I, no_T)
        guided = of_none + s_I * (of_image - of_none) + s_T * (of_both - of_image)
        embedding = np.concatenate([numpy_embedding(w, DIM), numpy_embedding(w_image, DIM)], 1)
    else:
        guided = of_both + w[COLUMN] * (of_both - of_none)
        embedding = numpy_embedding(w, DIM)
    z_s = alpha[s][COLUMN] * guided[0] + sigma[s][COLUMN] * guided[1]

    def student(theta, z, t):
        return e({**frozen, **theta}, z, t, c_I, c_T, embedding)

    return Step(z_t, t, z_s, s, n, student)


def numpy_distance(problem: Problem, f: np.ndarray, target: np.ndarray) -> np.ndarray:
    """d, as a mean over all."""
    difference = f - target
    if problem.setup.flags.loss_type == "huber":
        return np.mean(np.sqrt(difference**2 + 0.5**2) - 0.5)
    return np.mean(difference**2)


def real_networks(*, is_sdxl: bool = False, edits: bool = True) -> tuple[Networks, dict[str, Any]]:
    config = {**(SMALL_XL if is_sdxl else SMALL_SD), "in_channels": 8 if edits else 4}
    unet, params = small_unet(config)
    vae = standins.StandInVAE(standins.StandInVAE.Config(0.18, 4))
    return Networks(unet, vae), params


def condition_of(is_sdxl: bool, size: int = 2) -> Condition:
    rng = np.random.default_rng(5)
    width = 44 if is_sdxl else 24
    added = {"text_embeds": rng.standard_normal((size, 20)), "time_ids": rng.uniform(0, 64, (size, 6))}
    tree = (rng.standard_normal((size, 5, width)), added if is_sdxl else None, rng.standard_normal((size, 8, 8, 4)))
    context, added, image = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return Condition(context, added, image=image)
