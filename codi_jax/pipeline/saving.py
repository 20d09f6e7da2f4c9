"""Saves a model as a diffusers folder."""

import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import CONFIG_NAME
from codi_jax.io.atomic import write_json
from codi_jax.io.single_file import CONTROLNET, SD1, SD2, SDXL, Family, write_single_file
from codi_jax.io.state_dict import leaves_by_name, to_torch_layout
from codi_jax.io.weights import copy_model, save_model
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.controlnet import ControlNets
from codi_jax.models.network import Network
from codi_jax.pipeline.loading import MULTI_CONTROLNET, controlnet_part

if TYPE_CHECKING:
    from codi_jax.pipeline.model import Model

_ARCHITECTURES = {
    SD1.name: "stable-diffusion-v1",
    SD2.name: "stable-diffusion-v2",
    SDXL.name: "stable-diffusion-xl-v1-base",
}


def save(
    model: "Model",
    folder: Path,
    dtype: DTypeLike | Mapping[str, DTypeLike] | None,
    copied: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes the model, network after network.

    Args:
      model: the model.
      folder: as in `codi_jax.pipeline.model.Model.save_pretrained`.
      dtype: the same.
      copied: networks of another model that are written unchanged: where each is, as arguments of
        `codi_jax.io.weights.load_model`.

    Raises:
      WeightsError: as in `codi_jax.pipeline.model.Model.save_pretrained`.
    """
    networks = model.networks.by_name()
    for name, params in model.params.items():
        network = networks[name]
        of_file = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        if isinstance(network, ControlNets):
            for number, net in enumerate(network.nets):
                save_model(folder, controlnet_part(number), net, params[str(number)], dtype=of_file)
        else:
            save_model(folder, name, network, params, dtype=of_file)
    for name, source in (copied or {}).items():
        copy_model(folder, name, source)
    if jax.process_index() != 0:
        return
    try:
        if isinstance(networks.get("controlnet"), ControlNets):
            # How many there are is only to be seen by their folders: one left by an earlier model would be read.
            number = len(networks["controlnet"].nets)
            while (left := folder / controlnet_part(number)).is_dir():
                shutil.rmtree(left)
                number += 1
        for name in model.tokenizers.keys() - model.tokenizer_files.keys():  # with new words
            model.tokenizers[name].save_pretrained(folder / name)
        for name, files in model.tokenizer_files.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in files:
                if file.parent.resolve() != (folder / name).resolve():
                    shutil.copyfile(file, folder / name / file.name)
        save_schedule(model.schedule, folder)
        write_json(folder / "model_index.json", _index(model))
    except OSError as error:
        raise WeightsError(f"Could not save {folder}: {error.strerror or error}.") from error


def save_single_file(
    model: "Model", path: Path, part: str | None, dtype: DTypeLike | None, metadata: Mapping[str, str]
) -> None:
    """Writes a model as one file; arguments and errors as in `codi_jax.pipeline.model.Model.save_single_file`."""
    existing = model.networks.by_name()
    if part is not None and not isinstance(existing.get(part), Network):
        raise WeightsError(f"the model has no {part}, or several: there is nothing to write.")
    networks = {
        name: each for name, each in existing.items() if (name != "controlnet" if part is None else name == part)
    }
    if part != "controlnet" and model.networks.unet.config.time_cond_proj_dim is not None:
        raise WeightsError(
            "this model takes its guidance as an input, which no program reads from a single file: export it with "
            "--bake_guidance_scale first."
        )
    family = _family_of(model)
    architecture = _ARCHITECTURES[family.name] + (f"/{part}" if part else "")
    if part == "controlnet":
        family = CONTROLNET
    contents = {}
    for name, network in networks.items():
        if name not in model.params:
            raise WeightsError(f"the model has no parameters for its {name}: load it completely first.")
        contents[name] = network.abstract_params(), dict(_lazily(model.params[name]))
    size = model.networks.unet.config.sample_size
    side = (size if isinstance(size, int) else size[0]) * model.networks.vae.config.downscale
    known = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(model.schedule.prediction_type, "epsilon"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.title": path.stem,
    }
    if jax.process_index() != 0:
        return
    try:
        write_single_file(path, family, contents, dtype=dtype, metadata={**known, **metadata})
    except OSError as error:
        raise WeightsError(f"Could not save {path}: {error.strerror or error}. Nothing was left behind.") from error


def _family_of(model: "Model") -> Family:
    if model.networks.is_sdxl:
        return SDXL
    # What tells the two apart is the text encoder: OpenAI's, which has an activation of its own, or OpenCLIP's.
    return SD1 if model.networks.text_encoder.config.hidden_act == "quick_gelu" else SD2


def _lazily(params: Params) -> Iterator[tuple[str, Any]]:
    """The tensors by name, brought to the host when they are written."""
    for name, (path, leaf, shape) in leaves_by_name(params).items():
        yield name, _OnDevice(path[-1], leaf, shape, np.dtype(leaf.dtype))


@dataclass(frozen=True)
class _OnDevice:
    """A tensor that is fetched and laid out for PyTorch when NumPy asks for it."""

    kind: str
    leaf: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        del copy
        array = np.ascontiguousarray(to_torch_layout(self.kind, np.asarray(self.leaf)))
        return array if dtype is None else array.astype(dtype, copy=False)


def save_schedule(schedule: NoiseSchedule, folder: str | Path) -> Path:
    """Writes ``scheduler/scheduler_config.json`` into a model's folder, for diffusers too; returns its path."""
    path = Path(folder, "scheduler", CONFIG_NAME)
    write_json(path, schedule.to_config(), sort_keys=True)
    return path


def _index(model: "Model") -> dict[str, Any]:
    networks = model.networks
    encoders = {
        name: ["transformers", "CLIPTextModelWithProjection" if encoder.config.with_projection else "CLIPTextModel"]
        for name, encoder in networks.text_encoders.items()
    }
    index: dict[str, Any] = {
        "_class_name": _diffusers_class(model),
        "_diffusers_version": importlib.metadata.version("diffusers"),  # without it inpainting models fail to load
        "scheduler": ["diffusers", model.sampling.scheduler],
        **{name: ["transformers", "CLIPTokenizer"] for name in model.tokenizers},
        **encoders,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if networks.controlnet is not None:
        several = isinstance(networks.controlnet, ControlNets)
        index["controlnet"] = ["diffusers", MULTI_CONTROLNET if several else "ControlNetModel"]
    if networks.is_sdxl:
        return {**index, "force_zeros_for_empty_prompt": model.zeros_for_empty_prompt}
    absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    return {**index, **absent, "requires_safety_checker": False}


def _diffusers_class(model: "Model") -> str:
    is_sdxl = model.networks.is_sdxl
    family = "StableDiffusionXL" if is_sdxl else "StableDiffusion"
    task = {"text-to-image": "", "edit": "InstructPix2Pix", "inpaint": "Inpaint"}[model.task or ""]
    # diffusers has no InstructPix2Pix pipeline with a ControlNet: it loads the model without it.
    control = "ControlNet" if model.networks.controlnet is not None and model.task != "edit" else ""
    embeds_guidance = model.networks.unet.config.time_cond_proj_dim is not None
    if embeds_guidance and not (is_sdxl or control or task):
        return "LatentConsistencyModelPipeline"
    return f"{family}{control}{task}Pipeline"
