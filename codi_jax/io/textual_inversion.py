"""Files of textual inversion (Gal et al., 2023): vectors that take the place of a word's embedding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from codi_jax.io.hub import ModelFolder, find_file, is_file
from codi_jax.io.weight_files import WeightFile, open_weights
from codi_jax.models.config import WeightsError

_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
_NAMELESS = ("emb_params", "*")  # in files of A1111's web UI, whose word is the file's name
_OF_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # in files for SDXL
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}

Vectors = dict[str, Float[np.ndarray, "n d"]]
"""The n vectors of a word for each text encoder, by the encoder's name."""


def load_words(
    source: str | Path, widths: Mapping[str, int], word: str | None = None, **hub: Any
) -> dict[str, Vectors]:
    """Reads the words of a file of diffusers, its trainers or A1111's web UI.

    Args:
      source: the file, or the folder or repository with ``learned_embeds.safetensors`` or ``.bin``.
      widths: the width of the model's text encoders, by name.
      word: what to call the word, if there is only one. Default: the file's own words, or the file's name where it has
        none.
      **hub: other attributes of `codi_jax.io.hub.ModelFolder`.

    Returns:
      The vectors of every word.

    Raises:
      WeightsError: if there is no such file, or it is not one for these encoders.
    """
    path = _find(source, hub)
    file = open_weights(path)
    if file.keys() & _OF_ENCODERS.keys():
        found = {path.stem: {_OF_ENCODERS.get(key, key): tensor for key, tensor in file.items()}}
    else:
        found = {path.stem if key in _NAMELESS else key: {"text_encoder": file[key]} for key in file}
    if word is not None and len(found) != 1:
        raise WeightsError(f"{path} has {len(found)} words ({', '.join(found)}): give no name of your own.")
    return {word or name: _checked(path, file, tensors, widths) for name, tensors in found.items()}


def _find(source: str | Path, hub: Mapping[str, Any]) -> Path:
    if is_file(source):
        return find_file(source, **hub)
    folder = ModelFolder(str(Path(source).expanduser()), **hub)
    path = next((path for path in map(folder.find, _NAMES) if path is not None), None)
    if path is None:
        raise WeightsError(f"There is no {' or '.join(_NAMES)} in {folder}: {folder.describe_contents()}.")
    return path


def _checked(path: Path, file: WeightFile, tensors: Mapping[str, Any], widths: Mapping[str, int]) -> Vectors:
    given = {name: tensor.shape[-1] if tensor.shape else 0 for name, tensor in tensors.items()}
    if len(file) > 100 or any(len(tensor.shape) not in (1, 2) or not tensor.size for tensor in tensors.values()):
        raise WeightsError(f"{path} holds no textual inversion: its tensors are {', '.join(list(file)[:3])}, …")
    if given != dict(widths):
        family = "Stable Diffusion XL" if "text_encoder_2" in given else _FAMILIES.get(given.get("text_encoder", 0))
        theirs, ours = (" and ".join(map(str, each.values())) for each in (given, widths))
        raise WeightsError(
            f"{path} is a textual inversion for {family or 'another model'}: its vectors have {theirs} entries, and "
            f"those of this model {ours}."
        )
    vectors = {name: np.asarray(tensor, np.float32).reshape(-1, widths[name]) for name, tensor in tensors.items()}
    if len({len(each) for each in vectors.values()}) > 1:
        raise WeightsError(f"{path} has different numbers of vectors for the two text encoders.")
    return vectors
