"""Turns the arguments of a call into the arrays of its program: sizes, images, noise, checked against the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from codi_jax.diffusion.samplers import SAMPLERS
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.diffusion.timesteps import visited_times
from codi_jax.io.images import as_list, stack_pictures, to_mask, to_pixels
from codi_jax.models.controlnet import ControlNets
from codi_jax.pipeline.networks import Networks

_ROOMS = (8, 64)  # step counts that programs are compiled for, if a sampler can stop earlier


def make_inputs(
    networks: Networks,
    sampler: SamplerName,
    times: np.ndarray,
    *,
    texts: Mapping[str, Any],
    size: tuple[int, int],
    image: Any = None,
    mask_image: Any = None,
    control_image: Any = None,
    strength: float | int | None = None,
    control_scale: float | int | Sequence[float | int] = 1.0,
    control_start: float | int | Sequence[float | int] = 0.0,
    control_end: float | int | Sequence[float | int] = 1.0,
    gamma: float | int = 0.3,
    eta: float | int = 0.0,
    seed: int = 0,
    latents: Any = None,
    noise: Any = None,
    shared_attention: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The arrays of `codi_jax.pipeline.generation.generate`.

    Args:
      networks: the model's networks.
      sampler: the sampler's name.
      times: the times at which it evaluates the network.
      texts: from `codi_jax.pipeline.text.prompt_inputs`.
      size: the image size in pixels, see `image_size`.
      image: this and the following arguments are as in `codi_jax.pipeline.model.Model.__call__`.
      mask_image: where to paint.
      control_image: the ControlNet's condition.
      strength: how much of the image to change.
      control_scale: a factor on the ControlNet's outputs.
      control_start: the part of the steps after which the ControlNet takes part.
      control_end: the part of the steps after which it no longer does.
      gamma: γ of the sampler tcd.
      eta: η of the sampler ddim.
      seed: the first image's seed.
      latents: noise to start from.
      noise: what a stochastic sampler adds.
      shared_attention: for prompt-to-prompt.

    Raises:
      ValueError: if arguments do not fit the model or each other.
    """
    batch = len(next(iter(texts["ids"].values())))
    check_images(networks, image, mask_image, control_image, strength)
    skipped = skipped_times(networks, sampler, times, image, mask_image, strength)
    has_noise = SAMPLERS[sampler].is_stochastic or (sampler == "ddim" and eta > 0)
    inputs = {
        **texts,
        **_image_inputs(networks, batch, size, image, mask_image, control_image),
        **_original_inputs(networks, batch, size, image, mask_image, skipped),
        **_noise_inputs(networks, batch, size, has_noise, len(times), seed, latents, noise),
        **_sharing_inputs(batch, times, shared_attention),
        "timesteps": times,
        "num_steps": None,
    }
    if control_image is not None:
        inputs |= _control_inputs(
            networks, visited_times(sampler, times, skipped), control_scale, control_start, control_end
        )
    if sampler == "tcd":
        inputs["gamma"] = np.float32(gamma)
    if sampler == "ddim" and eta > 0:
        inputs["eta"] = np.float32(eta)
    if shared_attention is not None and latents is None:
        inputs["z"] = _of_sources(inputs["z"], axis=0)
        inputs["noise"] = None if inputs["noise"] is None else _of_sources(inputs["noise"], axis=1)
    return _padded(inputs) if SAMPLERS[sampler].is_counted else inputs


def image_size(
    networks: Networks, height: int | None, width: int | None, image: Any = None, control_image: Any = None
) -> tuple[int, int]:
    """The image size in pixels, checked against what the VAE can downsample.

    Args:
      networks: the model's networks.
      height: in pixels. Default: the image's height, or else the model's.
      width: in pixels. Default: the image's width, or else the model's.
      image: the image to start from, to edit or to paint into.
      control_image: the ControlNet's condition.

    Raises:
      ValueError: if the model cannot make images of this size.
    """
    downscale = networks.vae.config.downscale
    picture = next(iter(_conditions_of(networks, control_image)), None) if image is None else image
    if picture is not None and (height is None or width is None):
        picture = as_list(picture)[0]
        own = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        default = tuple(side - side % downscale for side in own)
    else:
        sample_size = networks.unet.config.sample_size or 64
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        default = tuple(side * downscale for side in sides)
    size = (default[0] if height is None else height, default[1] if width is None else width)
    if size[0] % downscale or size[1] % downscale or min(size) <= 0:
        raise ValueError(
            f"height = {size[0]}, width = {size[1]}: this model makes images whose sides are multiples of "
            f"{downscale} pixels."
        )
    return size


def check_images(
    networks: Networks, image: Any, mask_image: Any, control_image: Any, strength: float | int | None = None
) -> None:
    """Refuses images that the model does not take, and missing images that it needs.

    Args:
      networks: the model's networks.
      image: to start from, to edit or to paint into.
      mask_image: where to paint.
      control_image: the ControlNet's condition.
      strength: how much of the image to change.

    Raises:
      ValueError: naming the missing or superfluous argument.
    """
    task, takes_control = networks.task, networks.controlnet is not None
    if image is None and task != "text-to-image":
        raise ValueError(f"this model is for the task {task!r}: give it an image.")
    if mask_image is None and task == "inpaint":
        raise ValueError("an inpainting model needs mask_image, white where it should paint.")
    if mask_image is not None and image is None:
        raise ValueError("mask_image is where to paint in an image: give that image, too.")
    for name, value in {"mask_image": mask_image, "strength": strength}.items():
        if value is not None and task == "edit":
            raise ValueError(f"an InstructPix2Pix model is told by the prompt what to change: it takes no {name}.")
    if strength is not None and image is None:
        raise ValueError("strength says how much of an image to change: give that image, too.")
    if (control_image is not None) != takes_control:
        raise ValueError(
            "the pipeline has a ControlNet: give it a control_image."
            if takes_control
            else "control_image needs a ControlNet: load one with controlnet=."
        )
    _conditions_of(networks, control_image)


def _conditions_of(networks: Networks, control_image: Any) -> list[Any]:
    """The condition images of each ControlNet."""
    if control_image is None or not isinstance(networks.controlnet, ControlNets):
        return [] if control_image is None else [control_image]
    count = len(networks.controlnet.nets)
    if not isinstance(control_image, list | tuple) or len(control_image) != count:
        raise ValueError(f"the model has {count} ControlNets: give control_image as a list with one entry for each.")
    return list(control_image)


def _control_inputs(networks: Networks, times: np.ndarray, scale: Any, start: Any, end: Any) -> dict[str, Any]:
    """The factors on the ControlNets' outputs, and between which times each takes part, as in diffusers."""
    count = len(networks.controlnet.nets) if isinstance(networks.controlnet, ControlNets) else 1
    values = {"controlnet_conditioning_scale": scale, "control_guidance_start": start, "control_guidance_end": end}
    for name, value in values.items():
        given = np.atleast_1d(np.asarray(value, np.float64))
        if given.ndim > 1 or len(given) not in (1, count):
            raise ValueError(f"{name} = {value}: give one number, or one for each of the {count} ControlNets.")
        if name != "controlnet_conditioning_scale" and not np.all((given >= 0) & (given <= 1)):
            raise ValueError(f"{name} = {value}: it must be between 0 and 1, a part of the steps.")
        values[name] = np.broadcast_to(given, count)
    scales, *ends = values.values()
    steps = np.arange(len(times)) / len(times)
    windows = []
    for first, last in zip(*ends, strict=True):
        taking = times[(steps >= first) & (steps + 1 / len(times) <= last + 1e-9)]
        windows.append((taking[0], taking[-1]) if len(taking) else (-1, 0))  # none: no time is below the first
    shape = () if count == 1 and not isinstance(networks.controlnet, ControlNets) else (count,)
    return {
        "control_scale": scales.astype(np.float32).reshape(shape),
        "control_window": np.asarray(windows, np.float32).reshape(*shape, 2),
    }


def skipped_times(
    networks: Networks,
    sampler: SamplerName,
    times: np.ndarray,
    image: Any,
    mask_image: Any,
    strength: float | int | None,
) -> int:
    """How many of the sampler's times are left out at the start, so that ⌊strength · steps⌋ steps remain.

    Args:
      networks: the model's networks.
      sampler: the sampler's name.
      times: all of its times.
      image: to start from, to edit or to paint into.
      mask_image: where to paint.
      strength: how much of the image to change, from 0 to 1. Default: 0.8 of one to start from, as in diffusers, and
        else all.

    Raises:
      ValueError: if no step remains.
    """
    if strength is None:
        is_start = networks.task == "text-to-image" and image is not None and mask_image is None
        strength = 0.8 if is_start else 1.0
    if not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength}: choose a number from 0 to 1.")
    evaluations = len(times)
    steps = {"pndm": max(evaluations - 1, 1), "heun": evaluations // 2 + 1}.get(sampler, evaluations)
    kept = int(steps * strength)
    if not kept:
        raise ValueError(
            f"strength = {strength} of {steps} steps leaves none: choose at least {1 / steps:.3g}, or more steps."
        )
    if sampler == "pndm":  # a single step is not repeated
        return 0 if kept == steps else evaluations - (kept + 1 if kept > 1 else 1)
    return (steps - kept) * (2 if sampler == "heun" else 1)


def _image_inputs(
    networks: Networks, batch: int, size: tuple[int, int], image: Any, mask_image: Any, control_image: Any
) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if image is not None and networks.task != "text-to-image":
        inputs["image"] = 2 * stack_pictures(image, batch, lambda each: to_pixels(each, size), "image") - 1
    if networks.task == "inpaint":
        inputs["mask"] = stack_pictures(mask_image, batch, lambda each: to_mask(each, size), "mask_image")
    if control_image is not None:
        inputs["control"] = np.concatenate(
            [
                stack_pictures(condition, batch, lambda each: to_pixels(each, size), "control_image")
                for condition in _conditions_of(networks, control_image)
            ],
            axis=-1,
        )
    if networks.is_sdxl:
        # Original size, crop corner, target size: SDXL's inputs about its training images.
        inputs["time_ids"] = np.asarray([[*size, 0, 0, *size]] * batch, np.float32)
    return inputs


def _original_inputs(
    networks: Networks, batch: int, size: tuple[int, int], image: Any, mask_image: Any, skipped: int
) -> dict[str, Any]:
    """The image to start from, or to keep a part of. With a mask, all of the times start from noise."""
    if image is None or networks.task == "edit":
        return {}
    inputs: dict[str, Any] = {}
    if skipped or mask_image is None:
        inputs["skipped"] = np.int32(skipped)
    if mask_image is not None and networks.task == "text-to-image":
        inputs["changes"] = stack_pictures(mask_image, batch, lambda each: to_mask(each, size), "mask_image")
    if inputs:
        inputs["original"] = 2 * stack_pictures(image, batch, lambda each: to_pixels(each, size), "image") - 1
    return inputs


def _noise_inputs(
    networks: Networks,
    batch: int,
    size: tuple[int, int],
    has_noise: bool,
    steps: int,
    seed: int,
    latents: Any,
    noise: Any,
) -> dict[str, Any]:
    vae = networks.vae.config
    shape = (size[0] // vae.downscale, size[1] // vae.downscale, vae.latent_channels)
    keys = [jax.random.key(seed + i) for i in range(batch)]
    if latents is None:
        latents = jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys])
    if latents.shape != (batch, *shape):
        raise ValueError(f"latents have shape {list(latents.shape)}, but {[batch, *shape]} is needed.")
    if not has_noise:
        noise = None
    elif noise is None:
        more = (steps - 1, *shape)
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, 1), more) for key in keys], axis=1)
    elif noise.shape != (steps - 1, batch, *shape):
        raise ValueError(f"noise has shape {list(noise.shape)}, but {[steps - 1, batch, *shape]} is needed.")
    return {"z": latents, "noise": noise}


def _sharing_inputs(batch: int, times: np.ndarray, shared_attention: Sequence[float] | None) -> dict[str, Any]:
    """For each pair, the time down to which (exclusive) attention is shared."""
    if shared_attention is None:
        return {}
    if 2 * len(shared_attention) != batch or not all(0 <= share <= 1 for share in shared_attention):
        raise ValueError(
            f"shared_attention = {list(shared_attention)} with {batch} prompts: give a number from 0 to 1 for each "
            "pair of them."
        )
    ends = np.append(times, -1)[np.rint(np.asarray(shared_attention) * len(times)).astype(int)]
    return {"shared_until": ends.astype(np.float32)}


def _of_sources(noise: Any, axis: int) -> Array:
    """The first half's noise, for both halves of a batch."""
    first, _ = jnp.split(noise, 2, axis=axis)
    return jnp.concatenate([first, first], axis=axis)


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs padded to more steps, so that one program serves several step counts."""
    steps = len(inputs["timesteps"])
    room = next((room for room in _ROOMS if steps <= room), steps)
    noise = inputs["noise"]
    if noise is not None:
        noise = jnp.pad(noise, [(0, room - steps), *[(0, 0)] * (noise.ndim - 1)])
    times = np.pad(inputs["timesteps"], (0, room - steps), mode="edge")
    return {**inputs, "timesteps": times, "num_steps": np.int32(steps), "noise": noise}
