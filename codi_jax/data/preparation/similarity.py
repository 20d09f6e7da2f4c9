"""How similar two pictures are, and whether they differ like their captions: the filter for generated edits.

Brooks et al., 2023, section 3.1.2: the directional similarity is from Gal et al., 2021, in CLIP's space, cos(E_I(b) −
E_I(a), E_T(caption of b) − E_T(caption of a)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from codi_jax.cli.messages import first_line
from codi_jax.evaluation.encoders import Clip
from codi_jax.evaluation.features import load_features
from codi_jax.evaluation.metrics import directional_similarity, unit

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Encoder:
    """A space in which pictures, and perhaps texts, are compared.

    Attributes:
      images: maps pictures to features [n, d].
      texts: maps captions to features of the same space; ``None`` if the space has no texts.
    """

    images: Callable[[Pictures], Float[np.ndarray, "n d"]]
    texts: Callable[[Sequence[str]], Float[np.ndarray, "n d"]] | None = None


@dataclass(frozen=True)
class Scores:
    """Cosine similarities of n pairs; ``None`` if the space has no texts.

    Attributes:
      image: between the two pictures.
      direction: between the pictures' difference and the captions' difference.
      caption: between each picture and its caption, the lower of the two.
    """

    image: Float[np.ndarray, "n"]
    direction: Float[np.ndarray, "n"] | None = None
    caption: Float[np.ndarray, "n"] | None = None


def compare(encoder: Encoder, before: Pictures, after: Pictures, captions: tuple[str, str]) -> Scores:
    """The scores of pairs of pictures that have the same two captions."""
    a, b = unit(encoder.images(before)), unit(encoder.images(after))
    image = (a * b).sum(axis=1)
    if encoder.texts is None:
        return Scores(image)
    texts = unit(encoder.texts(captions))
    direction = directional_similarity((a, b), (texts[:1], texts[1:]))
    return Scores(image, direction, np.minimum(a @ texts[0], b @ texts[1]))


def clip_encoder(source: str) -> Encoder:
    """A CLIP model.

    Args:
      source: folder or id on the hub, such as openai/clip-vit-large-patch14.

    Raises:
      ValueError: if it cannot be loaded.
    """
    try:
        clip = Clip(source)
    except ValueError as error:
        raise ValueError(f"--clip_model {source} could not be loaded: {first_line(error)}") from error
    return Encoder(clip.images, clip.texts)


def lite_encoder() -> Encoder:
    """The features of FID-lite, which have no texts; raises like `codi_jax.evaluation.features.load_features`."""
    return Encoder(load_features(batch_size=8))
