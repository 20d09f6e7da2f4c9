"""The batches of a run: its data, opened before the model, and encoded by the model's networks if cached."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from codi_jax.cli.progress import heartbeat
from codi_jax.data import Encoders, Loader, Source, load_data, open_data
from codi_jax.io import processes
from codi_jax.io.checksums import update_with_values
from codi_jax.models import sharding
from codi_jax.pipeline.conditions import encode_prompts, posterior
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.networks import Networks
from codi_jax.training.flags import RunFlags
from codi_jax.training.starting import global_batch_size


def open_training_data(flags: RunFlags, *, has_text: bool = True, batch_size: int | None = None) -> Source:
    """Opens the data, before the model is loaded.

    Args:
      flags: the run's flags.
      has_text: whether captions are read.
      batch_size: samples per step, over all devices. Default: what the flags say.

    Raises:
      ValueError: as in `codi_jax.data.open_data`, or if the processes of the run do not see the same data.
    """
    with heartbeat("opening the data"):
        source = open_data(
            flags,
            batch_size=batch_size or global_batch_size(flags),
            condition=flags.condition,
            has_text=has_text,
            has_images=flags.reads_images,
        )
        seen = {"number of samples": len(source), "content": source.content_digest()}
    processes.agree("data", seen, f"give all machines the same {source.name}")
    return source


def load_batches(
    flags: RunFlags,
    model: Model,
    source: Source,
    *,
    trains_edits: bool = False,
    batch_size: int | None = None,
    encoders: Encoders | None = None,
) -> Loader:
    """This process's share of the batches, with latents and text features cached if ``--cache_latents`` says so.

    Args:
      flags: the run's flags.
      model: the model, for its tokenizers, VAE and text encoders.
      source: from `open_training_data`.
      trains_edits: whether the step reads the images before an edit, which the model alone may not.
      batch_size: samples per step, over all devices. Default: what the flags say.
      encoders: what caches images and captions. Default: the model's networks.

    Raises:
      ValueError: as in `codi_jax.data.load_data`.
    """
    without_params = model.replace(params={})  # the loader lives as long as the run
    if flags.cache_latents and encoders is None:
        edits = trains_edits or model.networks.is_instruct_pix2pix
        encoders = encoders_of(model, flags.caches_text, conditions_too=edits)
    return load_data(
        flags,
        without_params.tokenize if model.tokenizers else None,
        batch_size=batch_size or global_batch_size(flags),
        seed=flags.seed,
        condition=flags.condition,
        source=source,
        time_ids=model.networks.is_sdxl,
        encoders=encoders if flags.cache_latents else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def encoders_of(model: Model, caches_text: bool = True, *, conditions_too: bool) -> Encoders:
    """The networks whose outputs are cached: the VAE and, unless they are trained, the text encoders.

    Args:
      model: the model.
      caches_text: whether captions are encoded.
      conditions_too: whether conditions are encoded like images, as those before an edit are.
    """
    names = ["vae", *(model.networks.text_encoders if caches_text else ())]
    # Each process encodes its own part of the data.
    needed = {name: jax.tree.map(_own_copy, model.params[name]) for name in names}

    def on_devices(program: Callable[..., Any]) -> Callable[[Any], Any]:
        program = jax.jit(functools.partial(program, model.networks))

        def run(inputs: Any) -> Any:
            with sharding.context_of(needed):
                return program(needed, inputs)

        return run

    of_text = on_devices(_encoded_text) if caches_text else None
    return Encoders(on_devices(_encoded_images), of_text, _digest(model, needed), conditions_too=conditions_too)


def unread_networks(flags: RunFlags, networks: Networks) -> tuple[str, ...]:
    """The networks whose outputs are cached and which no step reads, so that they need not be on the devices.

    The VAE is read if it encodes conditions that are drawn anew for every sample, as masks are.
    """
    if not flags.cache_latents:
        return ()
    encoders = tuple(networks.text_encoders) if flags.caches_text else ()
    is_drawn = flags.condition not in (None, "column")
    encodes = networks.task == "inpaint" or (networks.is_instruct_pix2pix and is_drawn)
    return encoders if encodes else ("vae", *encoders)


def blank_encoders_of(
    model: Model, params: Mapping[str, Any], caches_text: bool = True, *, conditions_too: bool
) -> Encoders:
    """Encoders that return zeros of the right shapes, for plans.

    Args:
      model: the model without its weights.
      params: the shapes of its parameters.
      caches_text: as in `encoders_of`.
      conditions_too: as in `encoders_of`.
    """

    def blank(program: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            shapes = jax.eval_shape(functools.partial(program, model.networks), params, inputs)
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

        return run

    of_text = blank(_encoded_text) if caches_text else None
    return Encoders(blank(_encoded_images), of_text, "blank", conditions_too=conditions_too)


def _encoded_images(networks: Networks, params: Any, pixels: Any) -> Any:
    q = posterior(networks.vae, params, {"pixels": pixels})
    return jnp.concatenate([q.mean, q.logvar], axis=-1)


def _encoded_text(networks: Networks, params: Any, ids: Any) -> Any:
    context, pooled = encode_prompts(networks, params, ids)
    return {"context": context, "pooled": pooled} if networks.is_sdxl else {"context": context}


def _digest(model: Model, params: dict[str, Any]) -> str:
    """What the cached values depend on: networks, their parameters and the tokenizers' files."""
    digest, networks = hashlib.sha256(), model.networks.by_name()
    for name, tree in params.items():
        digest.update(repr(networks[name]).encode())
        update_with_values(digest, tree)
    for file in (file for files in model.tokenizer_files.values() for file in files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _own_copy(leaf: Array) -> Array:
    """The array on this process's devices: the array itself, unless it is spread over several processes."""
    return leaf if leaf.is_fully_addressable else jnp.asarray(sharding.fetch(leaf))
