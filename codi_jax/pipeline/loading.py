"""Loads the parts of a model that ``model_index.json`` names, from a diffusers folder or the Hugging Face Hub."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import CLIPTokenizer

from codi_jax.cli.progress import heartbeat
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import CONFIG_NAME
from codi_jax.io.hub import ModelFolder, find_file, is_file
from codi_jax.io.state_dict import PlaceFn
from codi_jax.io.weights import build_module, load_model
from codi_jax.models.config import ConfigError, ModelConfig, Params, WeightsError
from codi_jax.models.controlnet import ControlNet, ControlNetConfig, ControlNets
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.network import Network
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.text import find_tokenizer

_OF_CONDITIONS = ("cross_attention_dim", "addition_embed_type")
DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and computation, as given by a flag."""

# Required parts and their allowed classes: other classes' configurations would be misread as one of these.
_REQUIRED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_READ = (*_REQUIRED, "text_encoder_2", "tokenizer_2", "controlnet", "scheduler")
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
_SUPPORTED = "text-to-image, InstructPix2Pix, inpainting and ControlNet pipelines of Stable Diffusion 1.x, 2.x and XL"
MULTI_CONTROLNET = "MultiControlNetModel"
"""How ``model_index.json`` names several ControlNets."""
ALL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet")
"""The names of the networks that a model may have."""


def load_parts(
    source: str | Path,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation = "auto",
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    controlnet_revision: str | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    unet: str | Path | None = None,
    without_params: Collection[str] = (),
    place: PlaceFn | None = None,
) -> dict[str, Any]:
    """The attributes of `codi_jax.pipeline.model.Model`; see its ``from_pretrained`` for arguments and errors."""
    hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "config": config}
    folder = ModelFolder(str(Path(source).expanduser()), **hub)
    index = read_index(folder)
    tokenizers, files = _load_tokenizers(folder, index, tokenizer, cache_dir)
    names = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if _is_present(index, name)]
    sources = {name: {"source": folder.source, "subfolder": name, "variant": variant, **hub} for name in names}
    if unet is not None:
        sources["unet"] = _unet_source(unet, sources["unet"])
    of_part = dict.fromkeys(names, dtype) | {"vae": _vae_dtype(folder, dtype)}
    loaded: dict[str, tuple[Network | ControlNets, Params | None]] = {}
    for name in names:
        if name in without_params:
            loaded[name] = build_module(_folder_of(sources[name]), of_part[name], attention=attention), None
        else:
            with heartbeat(f"loading the {name} of {source}"):
                loaded[name] = load_model(**sources[name], dtype=of_part[name], attention=attention, place=place)
    if controlnet is None:
        found = _own_controlnets(folder, index, {"variant": variant, **hub})
    else:
        where = {**hub, "revision": controlnet_revision, "config": None}
        given = [controlnet] if isinstance(controlnet, str | Path) else list(controlnet)
        found = [_controlnet_source(each, where, variant) for each in given]
    nets = []
    for each in found:
        if "controlnet" in without_params:
            network, params = build_module(_folder_of(each), dtype, attention=attention), None
        else:
            with heartbeat(f"loading the ControlNet of {each['source']}"):
                network, params = load_model(**each, dtype=dtype, attention=attention, place=place)
        nets.append((_require_controlnet(network, each["source"]), params))
    if nets:
        loaded["controlnet"] = nets[0] if len(nets) == 1 else _together(nets)
        sources |= {controlnet_part(number): each for number, each in enumerate(found)}
    networks: dict[str, Any] = {name: network for name, (network, _) in loaded.items()}
    return {
        "networks": Networks(**networks),
        "params": {name: params for name, (_, params) in loaded.items() if params is not None},
        "tokenizers": tokenizers,
        "schedule": load_schedule(folder),
        "tokenizer_files": files,
        "sources": sources,
        "zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in loaded)),
    }


def _vae_dtype(folder: ModelFolder, dtype: DTypeLike) -> DTypeLike:
    """With float16, a VAE that asks for float32 stays in float32."""
    if jnp.dtype(dtype) != jnp.float16:
        return dtype
    return jnp.float32 if folder.part("vae").read_json("config.json").get("force_upcast", True) else dtype


def check_controlnet(networks: Networks) -> None:
    """Refuses a ControlNet of a different family than the UNet's.

    Raises:
      ConfigError: naming the difference.
    """
    nets = networks.controlnet.nets if isinstance(networks.controlnet, ControlNets) else (networks.controlnet,)
    for net in nets:
        _check_controlnet(networks, net.config)


def _check_controlnet(networks: Networks, controlnet: ControlNetConfig) -> None:
    unet = networks.unet.config
    if controlnet.in_channels != networks.vae.config.latent_channels:
        raise ConfigError(
            f"the ControlNet has in_channels = {controlnet.in_channels}, but it only gets the noisy latents, "
            f"{networks.vae.config.latent_channels} channels."
        )
    _check_family(controlnet, unet, "ControlNet", ("block_out_channels", "layers_per_block", *_OF_CONDITIONS))


def _check_family(given: ModelConfig, unet: UNetConfig, what: str, keys: Sequence[str]) -> None:
    for key in keys:
        values = [getattr(config, key) for config in (given, unet)]
        if len({value if isinstance(value, tuple) else (value,) * unet.num_blocks for value in values}) > 1:
            raise ConfigError(
                f"the {what} has {key} = {values[0]} and the model's UNet {values[1]}: take a {what} that was made for "
                "this model's family."
            )


def resolve_dtype(name: DType, platform: str | None = None) -> DTypeLike:
    """The dtype with this name; ``auto`` is bfloat16 on GPU and TPU, float32 on a CPU. Default: the devices here."""
    if name == "auto":
        return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def read_index(folder: ModelFolder) -> dict[str, Any]:
    """The ``model_index.json`` of a model, which lists its parts.

    Raises:
      WeightsError: if there is none, or it describes an unsupported pipeline.
    """
    index = folder.read_json("model_index.json")
    what, absent = index.get("_class_name"), [name for name in _REQUIRED if not _is_present(index, name)]
    if absent:
        raise WeightsError(
            f"{folder}/model_index.json describes a {what} without {' and '.join(absent)}: it is not a Stable "
            f"Diffusion 1.x, 2.x or XL model; supported are {_SUPPORTED}."
        )
    for name, classes in _REQUIRED.items():
        found = str(index[name][-1])
        if found.removeprefix("Flax") not in classes:
            raise WeightsError(
                f"{folder}/model_index.json describes a {what} whose {name} is {found}, not {' or '.join(classes)}; "
                f"supported are {_SUPPORTED}."
            )
    parts = {name: value for name, value in index.items() if isinstance(value, list) and _is_present(index, name)}
    if unread := [f"{name} ({value[-1]})" for name, value in parts.items() if name not in (*_READ, *_NOT_NEEDED)]:
        raise WeightsError(
            f"{folder}/model_index.json describes a {what} with {' and '.join(unread)}, which codi_jax does not read; "
            f"supported are {_SUPPORTED}."
        )
    return index


def load_schedule(folder: ModelFolder) -> NoiseSchedule:
    """The noise schedule of a model, without the rest of the model.

    Raises:
      WeightsError: if the folder has none.
      ConfigError: if the schedule cannot be computed.
    """
    scheduler = folder.part("scheduler")
    return NoiseSchedule.from_config(scheduler.read_json(CONFIG_NAME), f"{scheduler}/{CONFIG_NAME}")


def _load_tokenizers(
    folder: ModelFolder, index: Mapping[str, Any], other: str | Path | None, cache_dir: str | Path | None
) -> tuple[dict[str, CLIPTokenizer], dict[str, tuple[Path, ...]]]:
    """The tokenizers (the first may come from another source) and their files."""
    tokenizers, files = {}, {}
    for name in ("tokenizer", "tokenizer_2"):
        if _is_present(index, name):
            own = other is None or name != "tokenizer"
            files[name] = find_tokenizer(folder.part(name) if own else ModelFolder(str(other), cache_dir=cache_dir))
            tokenizers[name] = CLIPTokenizer.from_pretrained(files[name][0].parent)
    return tokenizers, files


def _is_present(index: Mapping[str, Any], name: str) -> bool:
    return bool(index.get(name)) and index[name][0] is not None


def controlnet_part(number: int) -> str:
    """The folder of a model's ControlNet with this number, from 0, as diffusers names it."""
    return f"controlnet_{number}" if number else "controlnet"


def _own_controlnets(folder: ModelFolder, index: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where `load_model` finds the ControlNets that are part of a model."""
    if not _is_present(index, "controlnet"):
        return []
    names = [controlnet_part(0)]
    if index["controlnet"][-1] == MULTI_CONTROLNET:
        while folder.part(following := controlnet_part(len(names))).find("config.json"):
            names.append(following)
    return [{"source": folder.source, "subfolder": name, **options} for name in names]


def _controlnet_source(source: str | Path, hub: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """Where `load_model` finds it: published ControlNets stand alone; a training run's output has other parts too."""
    folder = _alone_or_in_a_model(source, controlnet_part(0), hub)
    return {"source": folder.source, "subfolder": folder.subfolder, "variant": variant, **hub}


def _alone_or_in_a_model(source: str | Path, name: str, hub: Mapping[str, Any]) -> ModelFolder:
    """The folder of a network that has one of its own, or that is part of a model."""
    folder = ModelFolder(str(Path(source).expanduser()), **hub)
    return folder.part(name) if folder.find("config.json") is None else folder


def _folder_of(source: Mapping[str, Any]) -> ModelFolder:
    """The folder of a network whose `load_model` arguments are given."""
    return ModelFolder(**{name: value for name, value in source.items() if name not in ("variant", "weights")})


def _unet_source(given: str | Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Where `load_model` finds another UNet: a folder or repository with a configuration of its own, or weights alone.

    Raises:
      WeightsError: if there is no UNet.
      ConfigError: if it is of another family than the model's own.
    """
    places = {name: own[name] for name in ("cache_dir", "local_files_only")}
    if is_file(given):
        return {**own, "weights": find_file(given, **places)}
    folder = _alone_or_in_a_model(given, "unet", places)
    if Path(folder.source).is_dir() and folder.find("config.json") is None:  # such as a checkpoint of Accelerate
        return {**own, "weights": given}
    module = build_module(folder)
    if not isinstance(module, UNet2DCondition):
        raise WeightsError(f"{given} is a {type(module).__name__}, not a UNet.")
    _check_family(module.config, build_module(_folder_of(own)).config, "UNet", _OF_CONDITIONS)
    return {"source": folder.source, "subfolder": folder.subfolder, "variant": own["variant"], **places}


def _together(nets: Sequence[tuple[ControlNet, Params | None]]) -> tuple[ControlNets, Params | None]:
    """Several ControlNets as one network."""
    params = {str(number): each for number, (_, each) in enumerate(nets) if each is not None}
    return ControlNets(tuple(net for net, _ in nets)), params or None


def _require_controlnet(network: Network, source: str) -> ControlNet:
    if not isinstance(network, ControlNet):
        raise WeightsError(f"{source} is a {type(network).__name__}, not a ControlNet.")
    return network
