"""Models as diffusers folders: a folder or hub id -> (module, parameters), and back.

`codi_jax.io.state_dict` translates between parameter trees and state dicts by two rules. `_modern_names` handles the
exceptions: names that older versions of diffusers and transformers wrote.
"""

import importlib.metadata
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.typing import DTypeLike
from jaxtyping import Shaped

from codi_jax.io.atomic import staged_folder, write_json
from codi_jax.io.hub import ModelFolder, find_file
from codi_jax.io.single_file import has_original_unet, recognize
from codi_jax.io.state_dict import PlaceFn, convert, from_state_dict, leaves_by_name, require_match, to_state_dict
from codi_jax.io.weight_files import StoredTensor, WeightFile, open_weights, shard_names, write_safetensors
from codi_jax.models.attribute_reader import AttributeReader, AttributeReaderConfig
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import ModelConfig, Params, WeightsError
from codi_jax.models.controlnet import ControlNet, ControlNetConfig
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.names import torch_name
from codi_jax.models.network import Network
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.models.vision_transformer import VisionTransformerConfig

_NETWORKS: tuple[tuple[type[ModelConfig], Callable[..., Network]], ...] = (
    (UNetConfig, UNet2DCondition),
    (ControlNetConfig, ControlNet),
    (VAEConfig, AutoencoderKL),
    (CLIPTextConfig, CLIPTextModel),
    (AttributeReaderConfig, AttributeReader),
)
# The VAE's attention in old PyTorch files of diffusers, and in all Flax ones.
_LEGACY_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_model(
    source: str | Path,
    subfolder: str | None = None,
    dtype: DTypeLike | None = jnp.float32,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
    weights: str | Path | None = None,
    compute_dtype: DTypeLike | None = None,
    attention: Implementation = "auto",
    remat: bool = False,
    place: PlaceFn | None = None,
) -> tuple[Network, Params]:
    """Loads one network of a diffusers folder, tensor by tensor.

    Examples:
      >>> unet, params = load_model("assets/avatars", "unet")

    Args:
      source: a local folder, a repository on the Hugging Face Hub (``HF_HUB_OFFLINE`` and the cache are respected), or
        a single file, see `codi_jax.io.single_file`.
      subfolder: ``unet``, ``controlnet``, ``vae``, ``text_encoder`` or ``text_encoder_2``; ``None`` if ``source``
        itself holds ``config.json``, as it does for a ControlNet or VAE published on its own.
      dtype: storage precision of the parameters. Default: the file's.
      revision: branch, tag or commit on the hub.
      variant: the variant of the weights, such as ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``; a part
        that lacks it is read from the plain file, with a warning.
      cache_dir: folder for the hub's files. Default: the hub's.
      local_files_only: never contact the hub.
      config: for a single file, where its configurations are.
      weights: another file to read the parameters from, such as a student's UNet, or ``owner/name/file.safetensors``.
      compute_dtype: precision of the module. Default: ``dtype``, or float32.
      attention: the module's attention kernel.
      remat: whether the module recomputes activations in the backward pass.
      place: puts each parameter on devices. Default: on the default device.

    Returns:
      The module, whose ``config`` is ``config.json``, and its parameters.

    Raises:
      WeightsError: if a file is missing, incomplete, not finite, from another model family, or does not fit
        ``config.json``.
      ConfigError: for a value in ``config.json`` that codi_jax cannot build.
    """
    computation_dtype = dtype if compute_dtype is None else compute_dtype
    module, file = _open_network(
        source, subfolder, revision, variant, cache_dir, local_files_only, config, weights,
        dtype=jnp.float32 if computation_dtype is None else computation_dtype, attention=attention, remat=remat,
    )  # fmt: skip
    params = from_state_dict(
        module.abstract_params(),
        _modern_names(file, module.config),
        dtype,
        place,
        layout=file.layout,
        where=str(file.path),
    )
    return module, params


def open_model(
    source: str | Path,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Network, dict[str, StoredTensor]]:
    """One network of a diffusers folder, whose tensors are read when NumPy asks for them.

    Args:
      source: a local folder, or a repository on the Hugging Face Hub.
      subfolder: the network's folder, see `load_model`.
      revision: branch, tag or commit on the hub.
      variant: the variant of the weights, see `load_model`.
      cache_dir: folder for the hub's files. Default: the hub's.

    Returns:
      The module, and its tensors by their name in the PyTorch state dict.

    Raises:
      WeightsError: as in `load_model`, and for Flax's msgpack.
      ConfigError: for a value in ``config.json`` that codi_jax cannot build.
    """
    module, weights = _open_network(source, subfolder, revision, variant, cache_dir)
    if weights.layout != "torch":
        raise WeightsError(f"{weights.path} is a Flax file: load the model and save it as safetensors first.")
    tensors = _modern_names(weights, module.config)
    expected = {name: shape for name, (_, _, shape) in leaves_by_name(module.abstract_params()).items()}
    require_match(expected, tensors, f"{weights.path} does not fit its config.json; check that they are from one model")
    return module, tensors


def _open_network(
    source: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> tuple[Network, WeightFile]:
    """A network without parameters, and the file that has them; options are those of `build_module`."""
    folder = ModelFolder(str(Path(source).expanduser()), subfolder, revision, cache_dir, local_files_only, config)
    folder = folder.pinned(folder.require("config.json"))
    module = build_module(folder, **options)
    return module, _open_weights(folder, module, variant, weights)


def _open_weights(folder: ModelFolder, module: Network, variant: str | None, other: str | Path | None) -> WeightFile:
    """A network's tensors, in the folder, in the single file, or in another file."""
    if other is not None:
        if (place := Path(other).expanduser()).is_dir():
            return open_weights(_file_of_part(place, folder.subfolder or "", module.config, variant))
        path = find_file(other, cache_dir=folder.cache_dir, local_files_only=folder.local_files_only)
        found = open_weights(path)
        return recognize(path).part(folder.subfolder, module.abstract_params()) if has_original_unet(found) else found
    if folder.is_single_file:
        return recognize(folder.source).part(folder.subfolder, module.abstract_params())
    return open_weights(choose_file(folder, module.config, variant))


def build_module(
    folder: ModelFolder, dtype: DTypeLike = jnp.float32, *, attention: Implementation = "auto", remat: bool = False
) -> Network:
    """The network that a folder's ``config.json`` describes, without its weights.

    Args:
      folder: the folder with ``config.json``.
      dtype: precision of the computation.
      attention: the attention kernel.
      remat: whether the network recomputes activations in the backward pass.

    Raises:
      WeightsError: if the file does not exist, or describes another model family.
      ConfigError: for a value in it that codi_jax cannot build.
    """
    where, mapping = f"{folder}/config.json", folder.read_json("config.json")
    config_class, module_class = _network_class(mapping, where)
    return module_class(config_class.from_dict(mapping, where=where), dtype=dtype, attention=attention, remat=remat)


def save_model(
    folder: str | Path,
    subfolder: str | None,
    module: Network,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes one network as diffusers and transformers do: safetensors and ``config.json``.

    The files are written next to the target and then moved, so an error or an interrupt leaves nothing behind. In an
    existing folder, files with the same names and older safetensors of the model are replaced, and all others are kept.
    In a run of several processes all must call it (tensors are gathered), and the first one writes.

    Examples:
      >>> save_model("runs/mine", "unet", unet, params, dtype="float16")

    Args:
      folder: the complete model's folder.
      subfolder: the network's folder; ``None`` writes into ``folder`` itself.
      module: the network, whose ``config`` is written.
      params: its parameters, possibly sharded; fetched one at a time.
      dtype: precision in the file. Default: each parameter's own.
      max_shard_size: the limit in bytes, or as ``"5GB"``; larger models are split.

    Raises:
      WeightsError: if ``params`` is not a tree of ``module``, overflows ``dtype``, or cannot be written.
    """
    header = {
        name: (np.dtype(leaf.dtype if dtype is None else dtype), shape)
        for name, (_, leaf, shape) in leaves_by_name(params).items()
    }
    arrays = (convert(array, header[name][0], name, "The parameters") for name, array in to_state_dict(params))
    write_model(folder, subfolder, module, header, arrays, max_shard_size=max_shard_size)


def copy_model(
    folder: str | Path,
    subfolder: str,
    source: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes one network of another model, a tensor at a time; in a run of several processes the first one does it.

    Args:
      folder: the complete model's folder.
      subfolder: the network's folder.
      source: where the network is, as arguments of `load_model`.
      dtype: precision in the file. Default: each tensor's own.
      max_shard_size: the limit in bytes, or as ``"5GB"``.

    Raises:
      WeightsError: as in `load_model` and `save_model`.
    """
    if jax.process_index() != 0:
        return
    module, weights = _open_network(**source)
    if weights.layout != "torch":
        network, params = load_model(**source, dtype=None, place=lambda _, array: array)
        save_model(folder, subfolder, network, params, dtype=dtype, max_shard_size=max_shard_size)
        return
    tensors = _modern_names(weights, module.config)
    header = {name: (np.dtype(dtype or tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    arrays = (convert(np.asarray(each), header[name][0], name, str(weights.path)) for name, each in tensors.items())
    write_model(folder, subfolder, module, header, arrays, max_shard_size=max_shard_size)


def write_model(
    folder: str | Path,
    subfolder: str | None,
    module: Network,
    header: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterator[Shaped[np.ndarray, "..."]],
    *,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes one network whose tensors are produced one after another; see `save_model`.

    Args:
      folder: the complete model's folder.
      subfolder: the network's folder; ``None`` writes into ``folder`` itself.
      module: the network, whose ``config`` is written.
      header: dtype and shape of the tensors, by their name in the PyTorch state dict.
      arrays: the tensors, in the order of ``header``.
      max_shard_size: the limit in bytes, or as ``"5GB"``.

    Raises:
      WeightsError: if the tensors are not ``module``'s, or cannot be written.
    """
    target = Path(folder, subfolder or "").expanduser().resolve()
    expected = {name: shape for name, (_, _, shape) in leaves_by_name(module.abstract_params()).items()}
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in header.items()}
    require_match(expected, found, f"The parameters for {target} do not fit the {type(module).__name__}")
    if jax.process_index() != 0:
        for _ in arrays:
            pass
        return
    try:
        with staged_folder(target, last="config.json") as stage:
            _write_files(stage, module.config, header, arrays, max_shard_size)
            written = {path.name for path in stage.iterdir()}
        _remove_stale_weights(target, written)
    except OSError as error:
        raise WeightsError(f"Could not save {target}: {error.strerror or error}. Nothing was left behind.") from error


def _network_class(mapping: Mapping[str, Any], where: str) -> tuple[type[ModelConfig], Callable[..., Network]]:
    name = mapping.get("_class_name") or next(iter(mapping.get("architectures") or ()), None)
    if name is None and mapping.get("model_type") == "clip_text_model":
        name = CLIPTextConfig.class_names[0]
    for config_class, module_class in _NETWORKS:
        if name in config_class.class_names:
            return config_class, module_class
    known = ", ".join(config_class.class_names[0] for config_class, _ in _NETWORKS)
    raise WeightsError(
        f"{where} describes {name or mapping.get('model_type') or 'no known model'}: a config from another model "
        f"family. codi_jax supports {known}."
    )


def _file_stems(config: ModelConfig) -> tuple[str, str, str]:
    """The names that safetensors, PyTorch and Flax files begin with, in transformers or diffusers."""
    if isinstance(config, CLIPTextConfig | VisionTransformerConfig):
        return "model", "pytorch_model", "flax_model"
    return "diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_flax_model"


def choose_file(folder: ModelFolder, config: ModelConfig, variant: str | None) -> Path:
    """The best weight file of a folder: safetensors, else PyTorch's, else Flax's. Downloads the shards of an index.

    For a part without the variant, the plain file is read: in published models only some parts may have variants.

    Raises:
      WeightsError: if there is none.
    """
    safe, torch, _ = _file_stems(config)
    for tried in dict.fromkeys((variant, None)):
        for name in _file_names(config, tried):
            if (path := folder.find(name)) is None:
                continue
            if tried != variant:
                warnings.warn(f"{folder} has no weights of variant {variant!r}: reading {name} instead.", stacklevel=3)
            if path.suffix == ".json":
                for shard in shard_names(path):
                    folder.require(shard)
            return path
    pattern = re.compile(rf"({safe}|{torch})(\.(safetensors|bin)\.index)?\.(?P<variant>\w+)\.(safetensors|bin|json)")
    matches = [match for name in folder.names() or () if (match := pattern.fullmatch(name))]
    variants = sorted({match["variant"] for match in matches} - {"safetensors", "bin", "index"})
    hint = f" It has the variant {' and '.join(variants)}: select it with --variant." if variants else ""
    names = [*(_file_names(config, variant) if variant else ()), *_file_names(config, None)]
    raise WeightsError(
        f"{folder} has no weights{f' of variant {variant!r}' if variant else ''}, none of {', '.join(names)}: "
        f"{folder.describe_contents()}.{hint}"
    )


def _file_of_part(place: Path, name: str, config: ModelConfig, variant: str | None) -> Path:
    """The weight file of a network in a folder without its configuration: a model's, its own or Accelerate's.

    Raises:
      WeightsError: if there is none.
    """
    for plain in ("model.safetensors", "pytorch_model.bin"):  # Accelerate names every network's file so
        if (place / plain).is_file():
            return place / plain
    return choose_file(ModelFolder(str(place), name if name and (place / name).is_dir() else None), config, variant)


def _file_names(config: ModelConfig, variant: str | None) -> list[str]:
    """The possible names of a model's weight file, the best first."""
    safe, torch, flax = _file_stems(config)
    dot = f".{variant}" if variant else ""
    return [
        f"{safe}{dot}.safetensors",
        f"{safe}.safetensors.index{dot}.json",
        f"{torch}{dot}.bin",
        f"{torch}.bin.index{dot}.json",
        *([] if variant else [f"{flax}.msgpack"]),
    ]


def _modern_names(weights: WeightFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of a file under diffusers' current names."""
    named = dict(weights)
    if weights.layout == "flax":
        named = {torch_name(tuple(name.split("/"))): tensor for name, tensor in named.items()}
    if isinstance(config, CLIPTextConfig):
        # transformers 5 saves a CLIPTextModel without the prefix; versions before 4.31 saved the positions 0, 1, 2, ….
        named = {
            name if name.startswith("text_") else f"text_model.{name}": tensor
            for name, tensor in named.items()
            if not name.endswith("embeddings.position_ids")
        }
    if isinstance(config, VAEConfig):
        named = dict(_modern_vae_attention(name, tensor) for name, tensor in named.items())
    return named


def _modern_vae_attention(name: str, tensor: StoredTensor) -> tuple[str, StoredTensor]:
    module, _, leaf = name.rpartition(".")
    module, _, projection = module.rpartition(".")
    if not re.search(r"\.attentions\.\d+(\.to_out)?$", module):
        return name, tensor
    projection = _LEGACY_VAE_ATTENTION.get(projection, projection)
    # Latent diffusion's original code has 1 × 1 convolutions where diffusers has linear layers.
    return f"{module}.{projection}.{leaf}", tensor.squeezed() if len(tensor.shape) == 4 else tensor


def _remove_stale_weights(target: Path, written: Collection[str]) -> None:
    """Removes safetensors of an earlier save, single or sharded, which would be loaded instead of the new ones."""
    stem = min({*written} - {"config.json"}).partition(".")[0].partition("-")[0]
    stale = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in target.iterdir():
        if path.name not in written and stale.fullmatch(path.name):
            path.unlink()


def _write_files(
    stage: Path,
    config: ModelConfig,
    header: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterator[np.ndarray],
    max_shard_size: int | str,
) -> None:
    stem = _file_stems(config)[0]
    split = split_state_dict_into_shards_factory(
        dict(header),
        get_storage_size=lambda entry: math.prod(entry[1]) * entry[0].itemsize,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(stage / file, {name: header[name] for name in names}, (next(arrays) for _ in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(stage / f"{stem}.safetensors.index.json", index, sort_keys=True)
    mapping = config.to_dict()
    if "_class_name" in mapping:
        mapping["_diffusers_version"] = importlib.metadata.version("diffusers")
    write_json(stage / "config.json", mapping, sort_keys=True)
