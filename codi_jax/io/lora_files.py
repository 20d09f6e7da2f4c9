"""LoRA files: reads the formats of kohya's trainer, diffusers and PEFT, and writes those of kohya and diffusers.

All of them name a layer after its module. The differences (dots or underscores, prefixes, diffusers' former names,
block numbers of SDXL's original code) are resolved against the model's layers: every name that a file can have for a
layer is listed, and keys are looked up in that list.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from codi_jax.cli.messages import listed
from codi_jax.io import lycoris
from codi_jax.io.atomic import write_bytes
from codi_jax.io.hub import ModelFolder, is_file, named_file
from codi_jax.io.json_files import JsonError, parse_object
from codi_jax.io.state_dict import to_flax_layout, to_state_dict
from codi_jax.io.weight_files import StoredTensor, WeightFile, open_weights
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.lora import (
    LoraLayer,
    ModulePath,
    are_plain,
    kernels_of,
    lora_layers,
    module_name,
    nested,
    require_fit,
)
from codi_jax.models.original_names import unet_originals

Naming = Literal["diffusers", "kohya"]
_FILE_NAME = "pytorch_lora_weights.safetensors"
_USUAL_NAMES = (_FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.safetensors")
_METADATA_KEY = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}

# `to_q.lora_A.weight`, `to_q.lora_A.default.weight`, `to_q.lora_down.weight`, `processor.to_q_lora.down.weight`,
# `conv1.lora.down.weight`, `q_proj.lora_linear_layer.down.weight`, `to_q.alpha`; of DoRA `to_q.dora_scale`,
# `to_q.lora_magnitude_vector`, `to_q.lora_magnitude_vector.default.weight`.
_KEY = re.compile(
    r"(?P<module>.+?)("
    r"(\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<factor>A|B|down|up)(\.\w+)?\.weight"
    rf"|\.(?P<other>alpha|dora_scale|lora_magnitude_vector|diff_b|{'|'.join(lycoris.TENSORS)})(\.\w+)?(\.weight)?)"
)
_FACTORS = {
    "A": "down", "B": "up", "down": "down", "up": "up",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "diff_b": "bias",
    **{name: name for name in lycoris.TENSORS},
}  # fmt: skip
# OneTrainer adds embeddings of new words to a LoRA, which prompts can use in its own programs.
_WORDS = "bundle_emb."
# The regular expressions that layer names need. A file could contain others, which take forever to match.
_NAME_PATTERN = re.compile(r"\^?(\.\*)?[\w.\\-]+(\.\*)?\$?")
_OTHER_ADAPTERS = {
    r"\.(oft|boft)_": "OFT", r"\.[wb]_norm$": "LyCORIS with norms", r"\.on_input$": "IA³",
    r"lora_B\.bias$": "LoRA with biases", r"\.a1\.weight$": "GLoRA",
}  # fmt: skip

_OLD_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def load_lora(
    source: str | Path,
    models: Mapping[str, Params | None],
    weight_name: str | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Params]:
    """Reads a LoRA and matches it to models.

    Examples:
      >>> loras = load_lora("latent-consistency/lcm-lora-sdv1-5", {"unet": params})

    Args:
      source: a file, a folder, or a repository on the Hugging Face Hub.
      models: ``unet``, ``text_encoder`` and ``text_encoder_2`` -> parameters, or ``module.abstract_params()``; ``None``
        ignores the part of the file for that model.
      weight_name: the file in the folder or repository; ``None`` takes the one that ``source`` names
        (``owner/name/file.safetensors``), the usual name, or the only safetensors file.
      dtype: precision of the factors.
      subfolder: a subfolder of the folder or repository.
      revision: branch, tag or commit on the hub.
      cache_dir: folder for the hub's files. Default: the hub's.
      local_files_only: never contact the hub.

    Returns:
      The LoRA of every part that the file has. α defaults to r, as in diffusers.

    Raises:
      WeightsError: if the file does not exist, is not a LoRA, or has a key that does not fit ``models``.
    """
    folder, path = _find_file(str(source), weight_name, subfolder, revision, cache_dir, local_files_only)
    file = open_weights(path)
    if kinds := sorted({kind for key in file for mark, kind in _OTHER_ADAPTERS.items() if re.search(mark, key)}):
        raise WeightsError(
            f"{path} is {' and '.join(kinds)}, which codi_jax cannot read: it supports LoRA, DoRA, LoHa, LoKr, LoCon "
            "and differences of whole weights."
        )
    config = _adapter_config(folder, file)
    file = _without_words(file)
    wanted = {part: model for part, model in models.items() if model is not None}
    kernels = {part: kernels_of(model) for part, model in wanted.items()}
    loras: dict[str, dict[ModulePath, LoraLayer]] = {}
    for (part, module), tensors in _match(file, models).items():
        shape = kernels[part][module].shape
        alpha = np.asarray(tensors["alpha"]).item() if "alpha" in tensors else None
        if tensors.keys() & {*lycoris.TENSORS, "bias"}:
            layer = _read_difference(tensors, shape, alpha, path, f"{part}.{module_name(module)}")
        else:
            layer = {key: _read_factor(tensors[key], len(shape), path) for key in ("down", "up")}
            rank = layer["down"].shape[-1]
            layer["alpha"] = np.asarray(_alpha(config, part, module, rank, alpha), np.float32)
        layer = {key: jnp.asarray(value, jnp.float32 if key == "alpha" else dtype) for key, value in layer.items()}
        if "magnitude" in tensors:
            is_peft = any("lora_magnitude_vector" in key for key in file)
            layer["magnitude"] = jnp.asarray(_magnitude(tensors["magnitude"], shape, is_peft, path), dtype)
        loras.setdefault(part, {})[module] = layer
    trees = {part: nested(layers) for part, layers in loras.items()}
    for part, tree in trees.items():
        require_fit(wanted[part], tree, where=f"{path} ({part})")
    return trees


def save_lora(
    path: str | Path, loras: Mapping[str, Params], *, naming: Naming = "diffusers", dtype: DTypeLike | None = None
) -> Path:
    """Writes a LoRA as safetensors, for ``pipe.load_lora_weights`` and `load_lora`.

    The file is written next to its target and then moved. In a run of several processes all must call it, and the first
    one writes.

    Examples:
      >>> save_lora("runs/mine", {"unet": lora})

    Args:
      path: a file ``*.safetensors``, or a folder, which gets ``pytorch_lora_weights.safetensors``.
      loras: ``unet``, ``text_encoder`` and ``text_encoder_2`` -> LoRA.
      naming: ``"diffusers"`` keeps α in the metadata, as diffusers does. ``"kohya"`` stores an α with each layer, which
        other programs need unless α is r; diffusers reads them correctly if they are all equal.
      dtype: precision in the file. Default: each factor's own.

    Returns:
      The file.

    Raises:
      WeightsError: if a part has no layers, a value is not finite in ``dtype``, or the file cannot be written.
    """
    path = Path(path).expanduser()
    path = path if path.suffix == ".safetensors" else path / _FILE_NAME
    prefixes = _kohya_prefixes(loras)
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for part, lora in loras.items():
        layers = lora_layers(lora)
        if not layers:
            raise WeightsError(f"The LoRA for {part} has no layers: {path} was not written.")
        if not are_plain(layers):
            raise WeightsError(
                f"The LoRA for {part} is DoRA or LyCORIS, which can be read but not written: merge it into the model."
            )
        alphas = {module: float(layer["alpha"]) for module, layer in layers.items()}
        for key, array in to_state_dict(_as_modules(layers)):
            array = np.ascontiguousarray(_cast(array, np.dtype(array.dtype if dtype is None else dtype), path, key))
            tensors[f"{part}.{key}" if naming == "diffusers" else _kohya_key(prefixes[part], key)] = array
        if naming == "diffusers":
            config |= {f"{part}.{key}": value for key, value in _peft_config(layers, alphas).items()}
        else:
            tensors |= {f"{prefixes[part]}_{'_'.join(m)}.alpha": np.array(a, np.float32) for m, a in alphas.items()}
    if jax.process_index() == 0:
        _write(path, tensors, {_METADATA_KEY: json.dumps(config)} if config else {})
    return path


def _find_file(source: str, weight_name: str | None, subfolder: str | None, *hub: Any) -> tuple[ModelFolder, Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return ModelFolder(str(path.parent)), path
    if is_file(source):
        source, weight_name = named_file(source)
        path = Path(source)
    folder = ModelFolder(str(path) if path.is_dir() else source, subfolder, *hub)
    if weight_name is not None:
        found = folder.require(weight_name)
        return folder.pinned(found), found
    for name in _USUAL_NAMES:
        if (found := folder.find(name)) is not None:
            return folder.pinned(found), found
    names = [name for name in folder.names() or () if name.endswith(".safetensors")]
    if len(names) != 1:
        example = f", such as {folder}/{names[0]}" if names else ""
        raise WeightsError(
            f"{folder} does not say which file is the LoRA ({folder.describe_contents()}): name the file{example}."
        )
    return folder, folder.require(names[0])


def _match(
    file: WeightFile, models: Mapping[str, Params | None]
) -> dict[tuple[str, ModulePath], dict[str, StoredTensor]]:
    """The tensors of a file by (part, layer) and then ``down``, ``up`` and ``alpha``.

    Raises:
      WeightsError: if keys belong to no layer, or a layer lacks one of its factors.
    """
    names = {part: _layer_names(model) for part, model in models.items() if model is not None}
    matches, unmatched = [], []
    for key in file:
        match = _KEY.fullmatch(key)
        part, module = _split_part(match["module"] if match else key, models)
        path = names.get(part, {}).get(module)
        if match and path:
            matches.append((module != "_".join(path), part, path, _FACTORS[match["factor"] or match["other"]], key))
        elif models.get(part, {}) is not None:
            unmatched.append(key)
    if unmatched or not file:
        raise WeightsError(
            f"{file.path}: {len(unmatched)} of {len(file)} keys belong to no layer of {listed(list(models))}: "
            f"{listed(unmatched)}. It is a LoRA for another model, or not a LoRA: use it with the model that it was "
            "trained on, and pass every part that it adapts."
        )
    found: dict[tuple[str, ModulePath], dict[str, StoredTensor]] = {}
    # Some files name each layer twice, as in diffusers and as in SDXL's original code: diffusers' names count.
    for _, part, path, factor, key in sorted(matches):
        found.setdefault((part, path), {}).setdefault(factor, file[key])
    whole = {*lycoris.TENSORS, "bias"}
    if halves := [
        f"{part}.{module_name(path)}"
        for (part, path), entry in found.items()
        if not {"down", "up"} <= {*entry} and not whole & {*entry}
    ]:
        raise WeightsError(f"{file.path} has only one of the two factors of {listed(halves)}: download it again.")
    return found


def _split_part(name: str, models: Mapping[str, Params | None]) -> tuple[str, str]:
    """The part of the pipeline and the module, with underscores, of a layer's name in a file."""
    name = name.removeprefix(_PEFT_PREFIX).replace(".processor", "")
    head, _, rest = name.partition(".")
    if rest and head in ("unet", "text_encoder", "text_encoder_2", *models):
        return head, rest.replace(".", "_")
    for prefix, part in {**_KOHYA_PREFIXES, **{f"lora_{part}": part for part in models}}.items():
        if name.startswith((f"{prefix}_", f"{prefix}.")):
            return part, name[len(prefix) + 1 :].replace(".", "_")
    # A file without parts is for the UNet, or for the one requested model.
    return "unet" if "unet" in models or len(models) != 1 else next(iter(models)), name.replace(".", "_")


def _layer_names(model: Params) -> dict[str, ModulePath]:
    """Every name, with underscores, that a file can have for a layer -> its path."""
    names = {}
    originals = {name.rpartition(".")[0]: each.name.rpartition(".")[0] for name, each in unet_originals(model).items()}
    for path in kernels_of(model):
        parent, last = path[:-1], path[-1]
        aliases = {path, (*parent, last.removesuffix("_0") if last == "to_out_0" else last)}
        if parent and parent[-1] == "self_attn":
            aliases.add((*parent, _OLD_TEXT_ATTENTION[last]))
        if path[0] == "text_model":  # a level that transformers 5 no longer has
            aliases |= {alias[1:] for alias in aliases}
        if (original := originals.get(module_name(path))) is not None:
            aliases |= {tuple(original.split("."))}
        names |= {"_".join(alias): path for alias in aliases}
    return names


def _read_factor(tensor: StoredTensor, ndim: int, path: Path) -> Float[np.ndarray, "..."]:
    """A factor in Flax's layout, as a matrix or with a 1 × 1 window, whichever the layer has."""
    array = np.asarray(tensor)
    if not np.isfinite(array).all():
        raise WeightsError(f"{path} holds NaN or infinity: the file is damaged, use another version of it.")
    if (array.ndim, ndim) == (2, 4):
        array = array[:, :, None, None]
    elif array.ndim == 4 and ndim == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    return to_flax_layout("kernel", array)


def _read_difference(
    tensors: Mapping[str, StoredTensor], kernel: tuple[int, ...], alpha: float | None, path: Path, layer: str
) -> dict[str, Float[np.ndarray, "..."]]:
    """What an adapter other than plain LoRA adds to a layer's kernel, and to its bias."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items() if name not in ("alpha", "magnitude")}
    if not all(np.isfinite(array.astype(np.float32)).all() for array in arrays.values()):
        raise WeightsError(f"{path} holds NaN or infinity: the file is damaged, use another version of it.")
    found, bias = {}, arrays.pop("bias", None)
    if bias is not None:
        found["bias"] = bias
    if arrays:
        shape = tuple(kernel[axis] for axis in ([3, 2, 0, 1] if len(kernel) == 4 else [1, 0]))
        try:
            difference = lycoris.weight_difference(arrays, shape, alpha)
        except (KeyError, ValueError) as error:
            raise WeightsError(f"{path} does not fit {layer} ({error}): it is for another model, or damaged.") from None
        found["difference"] = to_flax_layout("kernel", difference)
    return found


def _magnitude(tensor: StoredTensor, kernel: tuple[int, ...], is_peft: bool, path: Path) -> Float[np.ndarray, "..."]:
    """DoRA's m with the axes of a kernel: one number per output of the layer, or per input (OneTrainer, LyCORIS)."""
    array = np.asarray(tensor)
    if not np.isfinite(array).all():
        raise WeightsError(f"{path} holds NaN or infinity: the file is damaged, use another version of it.")
    *window, inputs, outputs = kernel
    is_per_input = not is_peft and array.ndim == len(kernel) and array.shape[:2] == (1, inputs)
    if array.size != (inputs if is_per_input else outputs):
        raise WeightsError(
            f"{path} has a DoRA magnitude {list(array.shape)} for a kernel {list(kernel)}: it is for another model."
        )
    return array.reshape(*(1 for _ in window), *((inputs, 1) if is_per_input else (1, outputs)))


def _without_words(file: WeightFile) -> WeightFile:
    """The file without the embeddings that OneTrainer bundles with a LoRA, with a warning that they are ignored."""
    words = sorted({key.split(".")[1] for key in file if key.startswith(_WORDS)})
    if words:
        warnings.warn(
            f"{file.path} also has embeddings of {listed(words)}, which are ignored: prompts cannot use these words.",
            stacklevel=3,
        )
    kept = {key: tensor for key, tensor in file.items() if not key.startswith(_WORDS)}
    return WeightFile(file.path, file.layout, kept)


def _adapter_config(folder: ModelFolder, file: WeightFile) -> dict[str, Any]:
    """PEFT's configuration: in the metadata of a diffusers file, or next to a PEFT file."""
    if any(key.startswith(_PEFT_PREFIX) for key in file):
        return folder.read_json("adapter_config.json")
    if file.path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file.path, framework="np") as opened:
        written = (opened.metadata() or {}).get(_METADATA_KEY, "{}")
    try:
        return parse_object(written, f"{_METADATA_KEY} of {file.path}", "the file is broken, download it again")
    except JsonError as error:
        raise WeightsError(str(error)) from None


def _alpha(config: Mapping[str, Any], part: str, module: ModulePath, rank: int, stored: float | None) -> float:
    """α of a layer: the file's own, else PEFT's, else r."""
    if stored is not None:
        return float(stored)
    prefix = f"{part}." if any(key.startswith(f"{part}.") for key in config) else ""
    alpha = config.get(f"{prefix}lora_alpha", rank)
    for pattern, value in dict(config.get(f"{prefix}alpha_pattern") or {}).items():
        if not _NAME_PATTERN.fullmatch(pattern):
            raise WeightsError(
                f"the alpha_pattern {pattern!r:.80} of the LoRA does not name layers: save it with plain names."
            )
        if re.match(rf"(.*\.)?({pattern})$", module_name(module)):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise WeightsError(f"the LoRA's α of {part}.{module_name(module)} is {alpha!r:.40}, not a number.")
    # Rank-stabilized LoRA (Kalajdzievski, 2023) divides by √r.
    return float(alpha) * (math.sqrt(rank) if config.get(f"{prefix}use_rslora") else 1.0)


def _peft_config(layers: Mapping[ModulePath, LoraLayer], alphas: Mapping[ModulePath, float]) -> dict[str, Any]:
    # Without the level that transformers 5 dropped: PEFT compares name suffixes.
    names = {module: module_name(module).removeprefix("text_model.") for module in layers}
    ranks = {module: layer["down"].shape[-1] for module, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {names[module]: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {names[module]: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(names.values()),
    }


def _kohya_prefixes(loras: Mapping[str, Params]) -> dict[str, str]:
    text = "lora_te1" if "text_encoder_2" in loras else "lora_te"
    known = {"unet": "lora_unet", "text_encoder": text, "text_encoder_2": "lora_te2"}
    return {part: known.get(part, f"lora_{part}") for part in loras}


def _kohya_key(prefix: str, key: str) -> str:
    module, _, factor = key.removesuffix(".weight").rpartition(".")
    return f"{prefix}_{module.replace('.', '_')}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"


def _as_modules(layers: Mapping[ModulePath, LoraLayer]) -> Params:
    """The factors as layers of a model, which `to_state_dict` then names as PEFT does."""
    return nested({
        (*module, name): {"kernel": layer[factor]}
        for module, layer in layers.items()
        for name, factor in (("lora_A", "down"), ("lora_B", "up"))
    })  # fmt: skip


def _cast(array: Shaped[np.ndarray, "..."], dtype: np.dtype, path: Path, key: str) -> Shaped[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise WeightsError(f"{key} is not finite in {dtype}: {path} was not written; use another dtype.")
    return array


def _write(path: Path, tensors: Mapping[str, Shaped[np.ndarray, "..."]], metadata: dict[str, str]) -> None:
    try:
        write_bytes(path, safetensors.numpy.save(dict(tensors), {"format": "pt", **metadata}))
    except OSError as error:
        raise WeightsError(f"Could not save {path}: {error.strerror or error}. Nothing was left behind.") from error
