"""The model that a run starts from: opened without its weights, checked, and then loaded onto the mesh."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from codi_jax.diffusion.timesteps import default_sampler, timesteps_for
from codi_jax.io.hub import ModelFolder
from codi_jax.io.weights import build_module, load_model
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.models.controlnet import ControlNets
from codi_jax.pipeline.loading import controlnet_part
from codi_jax.pipeline.model import Model
from codi_jax.training import optim
from codi_jax.training.flags import Replacement, TrainingFlags

STEPS = 50
"""The number of steps with which a teacher is shown, unless it was distilled for fewer."""


def open_teacher(flags: TrainingFlags) -> Model:
    """The model without its weights, for computing: in half precision if training is.

    Checks everything in the configurations, before weights are downloaded and read.

    Args:
      flags: the run's flags.

    Raises:
      ValueError: if the model cannot be opened, its networks cannot take the resolution, or it cannot be sampled as
        validation images require.
    """
    model = Model.open(flags.pretrained_model_name_or_path, flags.controlnet, **_options(flags))
    for name, replacement in flags.replacements.items():
        model = _with_replacement(model, name, replacement)
    networks = model.networks
    if isinstance(networks.controlnet, ControlNets):
        name = flags.pretrained_model_name_or_path
        raise ValueError(
            f"the model {name} has {len(networks.controlnet.nets)} ControlNets, and training takes one: name it with "
            f"--controlnet_model_name_or_path {name}/{controlnet_part(0)}."
        )
    multiple = networks.vae.config.downscale * 2 ** (networks.unet.config.num_blocks - 1)
    flags.check_resolution(multiple, f"the model {flags.pretrained_model_name_or_path}")
    _check_validation(flags, model)
    return model


def load_teacher(opened: Model, flags: TrainingFlags, mesh: Mesh) -> Model:
    """The model with its weights on the mesh.

    Args:
      opened: from `open_teacher`.
      flags: the run's flags.
      mesh: from `codi_jax.models.sharding.make_mesh`.

    Raises:
      ValueError: if weights cannot be loaded.
    """
    key, networks = jax.random.key(flags.seed), opened.networks.by_name()
    random = {name: jax.random.fold_in(key, i) for i, name in enumerate(flags.starts_random)}
    params = {
        name: sharding.put(mesh, network.random_params(random[name]))
        if name in random
        else _load(opened, name, network.dtype, mesh)
        for name, network in networks.items()
    }
    return opened.replace(params=params)


def loader_of(
    model: Model, mesh: Mesh, others: Mapping[str, Callable[[], Params]] | None = None
) -> Callable[[str], Params]:
    """Makes a function that reads a network's float32 parameters by name: a `codi_jax.training.method.Load`.

    Args:
      model: from `load_teacher`; its own arrays are returned if they are float32.
      mesh: the mesh to put them on.
      others: functions that read additional trees, by other names.
    """

    def load(name: str) -> Params:
        if others is not None and name in others:
            return sharding.put(mesh, others[name]())
        params = model.params.get(name)
        if params is not None and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
            return params
        return _load(model, name, jnp.float32, mesh)

    return load


def load_missing(model: Model, mesh: Mesh) -> Model:
    """The model with its missing parameters read again, in the precision of its computation."""
    networks = model.networks.by_name()
    missing = {name: _load(model, name, networks[name].dtype, mesh) for name in networks if name not in model.params}
    return model.with_params(missing)


def load_on_host(model: Model, name: str, dtype: DTypeLike | None = np.float32) -> Params:
    """The parameters of one network in host memory, in this precision. Default: their file's."""
    return load_model(**model.sources[name], dtype=dtype, place=lambda _, array: array)[1]


def _load(model: Model, name: str, dtype: DTypeLike, mesh: Mesh) -> Params:
    return load_model(**model.sources[name], dtype=dtype, place=sharding.place(mesh))[1]


def _options(flags: TrainingFlags) -> dict[str, Any]:
    return {
        "controlnet_revision": flags.controlnet_revision_on_hub,
        "dtype": optim.compute_dtype(flags.mixed_precision),
        "attention": flags.attention,
        "tokenizer": flags.tokenizer_name,
        "revision": flags.revision,
        "variant": flags.variant,
        "cache_dir": flags.cache_dir,
        "config": flags.single_file_config,
    }


def _with_replacement(model: Model, name: str, replacement: Replacement) -> Model:
    """The model with one of its networks replaced, without parameters yet."""
    former, source = model.networks.by_name()[name], dict(model.sources[name])
    if replacement.source is not None:
        source = {"source": replacement.source, "subfolder": None, "cache_dir": source.get("cache_dir")}
    if replacement.revision is not None:
        source["revision"] = replacement.revision
    place = {key: value for key, value in source.items() if key != "variant"}
    folder = ModelFolder(**{**place, "source": str(Path(place["source"]).expanduser())})
    folder.require("config.json")
    network: Any = build_module(folder, replacement.dtype or former.dtype, attention=model.networks.unet.attention)
    _check_replacement(name, former.config, network.config, replacement.flag)
    return model.with_network(name, network, source=source)


def _check_replacement(name: str, former: Any, config: Any, flag: str) -> None:
    if name != "vae":
        return
    if config.latent_channels != former.latent_channels or config.downscale != former.downscale:
        raise ValueError(
            f"{flag}: its latents have {config.latent_channels} channels and are {config.downscale} times smaller than "
            f"images, the teacher's {former.latent_channels} and {former.downscale}: take one of the teacher's "
            "family."
        )


def _check_validation(flags: TrainingFlags, model: Model) -> None:
    """Checks, before weights are read, that the model can be sampled as validation images require."""
    shown = flags.shown
    if shown.teacher_scales is None:
        steps, flag = shown.steps[0] or STEPS, f"--validation_sampling_steps {shown.steps[0]}"
    else:
        steps, flag = model.sampling.most_steps(STEPS), "validation pictures of the teacher"
    try:
        timesteps_for(default_sampler(model.schedule), model.schedule, steps)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
