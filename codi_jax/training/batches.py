"""The batches of a run: its data, opened before the model, and encoded by the model's networks if cached."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from codi_jax.data import Encoders, Loader, Source, load_data, open_data
from codi_jax.io import processes
from codi_jax.io.checksums import update_with_values
from codi_jax.models import sharding
from codi_jax.pipeline.conditions import encode_prompts, posterior
from codi_jax.pipeline.model import Model
from codi_jax.training.flags import RunFlags
from codi_jax.training.loop import global_batch_size


def open_training_data(flags: RunFlags, *, has_text: bool = True) -> Source:
    """Opens the data, before the model is loaded.

    Args:
      flags: the run's flags.
      has_text: whether captions are read.

    Raises:
      ValueError: as in `codi_jax.data.open_data`, or if the processes of the run do not see the same data.
    """
    source = open_data(
        flags,
        batch_size=global_batch_size(flags),
        condition=flags.condition,
        has_text=has_text,
        has_images=flags.reads_images,
    )
    seen = {"number of samples": len(source), "content": source.content_digest()}
    processes.agree("data", seen, f"give all machines the same {source.name}")
    return source


def load_batches(flags: RunFlags, model: Model, source: Source) -> Loader:
    """This process's share of the batches, with latents and text features cached if ``--cache_latents`` says so.

    Args:
      flags: the run's flags.
      model: the model, for its tokenizers, VAE and text encoders.
      source: from `open_training_data`.

    Raises:
      ValueError: as in `codi_jax.data.load_data`.
    """
    without_params = model.replace(params={})  # the loader lives as long as the run
    return load_data(
        flags,
        without_params.tokenize if model.tokenizers else None,
        batch_size=global_batch_size(flags),
        seed=flags.seed,
        condition=flags.condition,
        source=source,
        time_ids=model.networks.is_sdxl,
        encoders=encoders_of(model, flags.caches_text) if flags.cache_latents else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def encoders_of(model: Model, caches_text: bool = True) -> Encoders:
    """The networks whose outputs are cached: the VAE and, unless they are trained, the text encoders."""
    networks, params = model.networks, model.params

    @jax.jit
    def images(params: Any, pixels: Any) -> Any:
        q = posterior(networks.vae, params, {"pixels": pixels})
        return jnp.concatenate([q.mean, q.logvar], axis=-1)

    @jax.jit
    def text(params: Any, ids: Any) -> Any:
        context, pooled = encode_prompts(networks, params, ids)
        return {"context": context, "pooled": pooled} if networks.is_sdxl else {"context": context}

    names = ["vae", *(networks.text_encoders if caches_text else ())]
    # Processes take turns to build a cache, so each computes on its own.
    needed = {name: jax.tree.map(_own_copy, params[name]) for name in names}

    def on_devices(program: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            with sharding.context_of(needed):
                return program(needed, inputs)

        return run

    of_text = on_devices(text) if caches_text else None
    digest = _digest(model, needed)
    return Encoders(on_devices(images), of_text, digest, conditions_too=networks.is_instruct_pix2pix)


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
