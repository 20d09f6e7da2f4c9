"""What a run that trains an autoencoder does differently from most: the model has a VAE and nothing else."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from codi_jax.cli.flags import Adjustable
from codi_jax.io.hub import ModelFolder
from codi_jax.io.images import labeled_rows
from codi_jax.io.weights import build_module, load_model, save_model
from codi_jax.methods import autoencoder
from codi_jax.models import sharding
from codi_jax.models.vae import AutoencoderKL
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.networks import Networks
from codi_jax.training import loop, optim
from codi_jax.training.flags import RunFlags
from codi_jax.training.run import Hooks, Run
from codi_jax.training.validation import Samples, held_out

_HELD_OUT = 128  # images whose latents give the scaling factor


@dataclass(frozen=True, kw_only=True)
class VaeFlags(RunFlags):
    """The flags of a run that trains an autoencoder."""

    pretrained_model_name_or_path: str | None = None
    """Model, or folder of an autoencoder, to start from."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    variant: str | None = None
    """Variant of its weight files, such as fp16."""
    model_config_name_or_path: Adjustable[str | None] = None
    """The config.json of a new autoencoder, to start from random parameters."""

    def check(self) -> None:
        for flag in ("validation_prompt", "validation_image"):
            if getattr(self, flag):
                raise ValueError(f"--{flag} has no place here: give --validation_data_dir, a folder of images to show.")
        super().check()


def source_of(flags: VaeFlags) -> tuple[ModelFolder, bool]:
    """The folder with the autoencoder's config.json, and whether to start from its weights too.

    Raises:
      ValueError: if the flags name no such folder, or two.
    """
    source, config = flags.pretrained_model_name_or_path, flags.model_config_name_or_path
    if source is not None and config is None:
        folder = ModelFolder(str(Path(source).expanduser()), None, flags.revision, flags.cache_dir)
        return folder if folder.find("config.json") else folder.part("vae"), True
    if config is not None and source is None:
        path = Path(config).expanduser()
        if not path.exists():
            raise ValueError(f"there is no file {config}: check --model_config_name_or_path.")
        if path.is_file() and path.name != "config.json":
            raise ValueError(f"--model_config_name_or_path {config}: give a folder with a config.json, or that file.")
        return ModelFolder(str(path if path.is_dir() else path.parent)), False
    raise ValueError("give either --pretrained_model_name_or_path or --model_config_name_or_path.")


def open_vae(flags: VaeFlags) -> Model:
    """The VAE without its weights.

    Raises:
      ValueError: if it cannot be opened, or cannot take the resolution.
    """
    folder, _ = source_of(flags)
    vae = build_module(folder, optim.compute_dtype(flags.mixed_precision))
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"{folder} is a {type(vae).__name__}, not an autoencoder.")
    flags.check_resolution(vae.config.downscale, f"the autoencoder {folder}")
    return Model(networks=Networks(None, vae), params={}, schedule=None, tokenizers={})


def load_vae(opened: Model, flags: VaeFlags, mesh: Mesh) -> Model:
    """The VAE with float32 weights on the mesh, from its folder or random."""
    folder, has_weights = source_of(flags)
    if not has_weights:
        key = jax.random.fold_in(jax.random.key(flags.seed), 1)
        return opened.with_params({"vae": sharding.put(mesh, opened.networks.vae.random_params(key))})
    _, params = load_model(
        folder.source,
        folder.subfolder,
        revision=flags.revision,
        variant=flags.variant,
        cache_dir=flags.cache_dir,
        place=sharding.place(mesh),
    )
    return opened.with_params({"vae": params})


def _samples(flags: VaeFlags) -> Samples:
    return held_out(flags, _HELD_OUT, has_text=False)


@functools.partial(jax.jit, static_argnames=("vae", "batch_size"))
def _reconstruct_all(vae: AutoencoderKL, params: Any, pixels: Any, batch_size: int) -> Any:
    """The reconstructed images and their latents, computed a few at a time."""

    def reconstruct_one(image: Any) -> Any:
        return jax.tree.map(lambda x: x[0], autoencoder.reconstruct(vae, params, image[None]))

    return jax.lax.map(reconstruct_one, pixels, batch_size=batch_size)


def _reconstruct(run: Run, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """The reconstructed samples, and their latents."""
    vae, pixels = run.setup.networks.vae, run.samples.pictures
    return sharding.fetch(_reconstruct_all(vae, state.result, pixels, batch_size=run.args.train_batch_size))


def _show(run: Run, state: Any) -> loop.Pictures:
    count = run.args.num_validation_images
    rows = {"data": run.samples.pictures, "reconstruction": _reconstruct(run, state)[0]}
    return {"reconstruction": labeled_rows({name: row[:count] for name, row in rows.items()})}


def _write(run: Run, state: Any, folder: Path) -> None:
    latents = jnp.asarray(_reconstruct(run, state)[1])
    vae = autoencoder.with_scaling_factor(run.setup.networks.vae, latents)
    save_model(folder, "vae", vae, state.result, dtype=run.args.save_dtype)


HOOKS = Hooks(open_model=open_vae, load_model=load_vae, samples=_samples, has_text=False, show=_show, write=_write)
"""For `codi_jax.training.run.run`, with the flags `VaeFlags`."""
