"""Networks that judge images against texts or other images: CLIP, DINO and LPIPS, from the user's own files."""

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from codi_jax.evaluation.features import Features, in_batches
from codi_jax.evaluation.metrics import unit
from codi_jax.io.hub import ModelFolder
from codi_jax.io.state_dict import from_state_dict
from codi_jax.io.weight_files import open_weights
from codi_jax.io.weights import choose_file
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.lpips import SMALLEST, Backbone, lpips, read_lpips
from codi_jax.models.network import Network
from codi_jax.models.vision_transformer import VisionTransformer, VisionTransformerConfig, published_tensors
from codi_jax.pipeline.conditions import to_signed
from codi_jax.pipeline.text import find_tokenizer, tokenize

Pictures = UInt8[np.ndarray, "n h w 3"]
Distances = Callable[[Pictures, Pictures], Float[np.ndarray, "n"]]
"""Maps images, and images to compare each with, to distances."""
_HEADS = "lpips"
_HEADS_FILE = "lpips/weights/v0.1/{}.pth"


class Clip:
    """CLIP: images and texts as unit vectors of one space (Radford et al., 2021).

    Args:
      source: folder or id on the hub, such as ``openai/clip-vit-large-patch14``.
      batch_size: images or texts at a time.

    Raises:
      WeightsError: if it cannot be loaded, or is another model.
      ConfigError: for a value in its ``config.json`` that cannot be built.
    """

    def __init__(self, source: str, batch_size: int = 32) -> None:
        folder = ModelFolder(str(Path(source).expanduser()))
        where, mapping = f"{folder}/config.json", folder.read_json("config.json")
        if mapping.get("model_type") != "clip":
            raise WeightsError(
                f"{where} describes {mapping.get('model_type')!r:.80}, not a whole CLIP with both towers."
            )
        vision = VisionTransformer(VisionTransformerConfig.from_published(mapping, where))
        text = CLIPTextModel(_text_config(mapping, where))
        tensors = dict(open_weights(choose_file(folder, vision.config, None)))
        encode = _applied(text, _loaded(text, _text_tensors(tensors), where))
        self._text_features = in_batches(lambda ids: encode(ids).pooled, batch_size)
        self.images = _image_features(folder, vision, published_tensors(vision.config, tensors), batch_size)
        """Maps images of any size to unit vectors [n, d]."""
        self._token_ids = functools.partial(tokenize, _tokenizer(folder), text_encoder=text)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors; texts are cut off where the model's tokens end."""
        return unit(self._text_features(self._token_ids(list(texts))))


def dino(source: str, batch_size: int = 32) -> Features:
    """Returns a function from images to unit vectors of DINO or DINOv2: the state of the token for the whole image.

    Args:
      source: folder or id on the hub, such as ``facebook/dino-vits16`` or ``facebook/dinov2-base``.
      batch_size: images at a time.

    Raises:
      WeightsError: if it cannot be loaded.
      ConfigError: for a value in its ``config.json`` that cannot be built.
    """
    folder = ModelFolder(str(Path(source).expanduser()))
    network = VisionTransformer(
        VisionTransformerConfig.from_published(folder.read_json("config.json"), f"{folder}/config.json")
    )
    tensors = dict(open_weights(choose_file(folder, network.config, None)))
    return _image_features(folder, network, published_tensors(network.config, tensors), batch_size)


def lpips_distances(weights: Path, heads: Path | None = None, batch_size: int = 32) -> Distances:
    """Returns the distance LPIPS (Zhang et al., 2018) of pairs of images, of the images' own size.

    Args:
      weights: torchvision's weights of AlexNet (``alexnet-owt-7be5be79.pth``) or VGG-16 (``vgg16-397923af.pth``).
      heads: the fitted weights of the layers. Default: those that the package ``lpips`` holds.
      batch_size: pairs at a time.

    Raises:
      WeightsError: if a file does not exist, or is another one.
    """
    path = weights.expanduser()
    if not path.is_file():
        raise WeightsError(
            f"there is no file {path}: give torchvision's alexnet-owt-7be5be79.pth or vgg16-397923af.pth."
        )
    tensors = open_weights(path)
    backbone: Backbone = "vgg" if "features.28.weight" in tensors else "alex"
    try:
        layers = read_lpips(backbone, tensors, open_weights(heads.expanduser() if heads else _packaged_heads(backbone)))
    except KeyError as error:
        raise WeightsError(f"{path} is neither AlexNet nor VGG-16 of torchvision: it has no {error.args[0]}.") from None
    except ValueError as error:
        raise WeightsError(f"{path} is neither AlexNet nor VGG-16 of torchvision: {error}.") from None
    compiled: Any = jax.jit(lambda layers, x, y: lpips(layers, backbone, to_signed(x), to_signed(y)))
    of_all = in_batches(lambda x, y: compiled(layers, x, y), batch_size)

    def distances(pictures: Pictures, others: Pictures) -> Float[np.ndarray, "n"]:
        if min(pictures.shape[1:3]) < SMALLEST[backbone]:
            raise ValueError(f"LPIPS of {backbone} needs images of at least {SMALLEST[backbone]} pixels.")
        return of_all(pictures, others)

    return distances


def _image_features(
    folder: ModelFolder, network: VisionTransformer, tensors: dict[str, Any], batch_size: int
) -> Features:
    prepare, size = _processor(folder), network.config.image_size
    apply = _applied(network, _loaded(network, tensors, f"{folder}/config.json"))

    def features(pictures: Pictures) -> Any:
        pixels = np.moveaxis(np.asarray(prepare(list(pictures), return_tensors="np")["pixel_values"]), 1, -1)
        if pixels.shape[1:3] != (size, size):
            raise WeightsError(
                f"the image processor of {folder} gives images of {pixels.shape[1:3]}, but its network takes "
                f"{size} × {size}."
            )
        return apply(pixels)

    in_full_batches = in_batches(features, batch_size)
    return lambda pictures: unit(in_full_batches(pictures))


def _processor(folder: ModelFolder) -> Any:
    """How the model's images are resized, cropped and normalized."""
    from transformers import AutoImageProcessor  # slow to import, and not needed by most metrics

    path = folder.find("processor_config.json") or folder.require("preprocessor_config.json")
    folder.require("config.json")
    # Pillow's resizing, as the models were trained and published with, whether torchvision is installed or not.
    return AutoImageProcessor.from_pretrained(path.parent, backend="pil")


def _tokenizer(folder: ModelFolder) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(find_tokenizer(folder)[0].parent)


def _text_config(mapping: dict[str, Any], where: str) -> CLIPTextConfig:
    """The text tower's configuration: of its keys those that a forward pass depends on."""
    values = mapping.get("text_config") or {}
    known = {name: values[name] for name in CLIPTextConfig.__dataclass_fields__ if name in values}
    known |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": mapping.get("projection_dim", 512)}
    return CLIPTextConfig.from_dict(known, where)


def _text_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each for name, each in tensors.items() if name.startswith("text_") and not name.endswith("position_ids")
    }


def _loaded(network: Network, tensors: dict[str, Any], where: str) -> Params:
    return from_state_dict(network.abstract_params(), tensors, jnp.float32, where=where)


def _applied(network: Network, params: Params) -> Callable[[Any], Any]:
    return functools.partial(jax.jit(lambda params, inputs: network.apply({"params": params}, inputs)), params)


def _packaged_heads(backbone: Backbone) -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(_HEADS).locate_file(_HEADS_FILE.format(backbone))))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise WeightsError(
            "LPIPS needs the fitted weights of the package lpips: pip install --no-deps lpips, or name the file with "
            "--lpips_heads."
        )
    return path
