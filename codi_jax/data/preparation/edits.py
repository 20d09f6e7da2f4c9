"""InstructPix2Pix triples of a picture, an instruction and the edited picture, from existing or generated pairs.

Pairs are generated as by Brooks et al. (2023, section 3.1.2): a text-to-image model draws the captions before and after
the edit with shared attention (`codi_jax.models.prompt_to_prompt`), many times with different noise, fractions of the
steps in which attention is shared, and guidance scales; a filter keeps the best few.
"""

import functools
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from codi_jax.cli.flags import Flags
from codi_jax.data.files import Folder
from codi_jax.data.picture_folders import images_in
from codi_jax.data.preparation.pictures import Picture, PictureFlags, encode, read_beside, read_picture
from codi_jax.data.preparation.rows import File, InputRow
from codi_jax.data.preparation.samples import Sample
from codi_jax.data.preparation.similarity import Encoder, Scores, clip_encoder, compare, lite_encoder
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.io.decoding import RejectedError
from codi_jax.pipeline.model import Model

BEFORE, AFTER, INSTRUCTION = "input_image", "edited_image", "edit_prompt"


@dataclass(frozen=True)
class Edit:
    """Makes the triple of a row with two pictures.

    Attributes:
      flags: the flags of the pictures.
      template: the template of the instruction, with the row's texts in braces.
    """

    flags: PictureFlags
    template: str

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Makes the triple from the files of both pictures.

        Raises:
          RejectedError: if they cannot be used, or do not fit each other.
        """
        prompt = self.template.format(**row.texts).strip()
        if not prompt:
            raise RejectedError("no instruction")
        before, placement = read_picture(files[BEFORE], self.flags)
        after = read_beside(files[AFTER], placement, self.flags)
        return [_triple(row, row.key, before, after, prompt, self.flags)]


def fields_of(template: str) -> list[str]:
    """The names in braces of a template.

    Raises:
      ValueError: if it cannot be read.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be read: {error}.") from None
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"the template {template!r} cannot be read: only names of columns may be in braces.")
    return names


def pairs_of_folders(before: Folder, after: Folder, instructions: Mapping[str, str]) -> Iterator[InputRow]:
    """Rows of all pictures that two folders have under the same name, whatever their extensions.

    Args:
      before: folder of the pictures before the edit.
      after: folder of the pictures after the edit.
      instructions: by name, with its extension or without; missing ones are empty.

    Raises:
      ValueError: if two pictures of a folder have the same name.
    """
    others = _by_name(after)
    for position, (name, path) in enumerate(sorted(_by_name(before).items())):
        if name in others:
            texts = {
                "name": PurePosixPath(name).name,
                "folder": str(PurePosixPath(name).parent),
                "instruction": instructions.get(path, instructions.get(name, "")),
            }
            pictures = {BEFORE: File(before.url(path)), AFTER: File(after.url(others[name]))}
            yield InputRow(position, name, pictures, texts)


def _by_name(folder: Folder) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in images_in(folder):
        name = str(PurePosixPath(path).with_suffix(""))
        if name in found:
            raise ValueError(f"{folder} has both {found[name]} and {path}: remove one of them.")
        found[name] = path
    return found


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(Flags):
    """How pairs are generated and filtered, by default as for InstructPix2Pix."""

    teacher: str | None = None
    """Text-to-image model: a folder in diffusers' layout, or an id on the hub."""
    variant: str | None = None
    """Variant of the teacher's weight files, such as fp16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the teacher's computation."""
    sampler: SamplerName = "euler-ancestral"
    """Sampler of the teacher."""
    steps: int = 100
    """Steps of the sampler."""
    samples_per_prompt: int = 100
    """Pairs generated per pair of captions."""
    pairs_at_a_time: int = 4
    """Pairs generated in one batch."""
    max_pairs_per_prompt: int = 4
    """Pairs kept per pair of captions: those that differ most in the direction of the captions."""
    min_shared: float = 0.1
    """Smallest fraction of the steps in which attention is shared; drawn for each pair."""
    max_shared: float = 0.9
    """Largest fraction of the steps in which attention is shared."""
    min_guidance_scale: float = 7.5
    """Smallest guidance scale; drawn for each batch."""
    max_guidance_scale: float = 15.0
    """Largest guidance scale."""
    clip_model: str | None = None
    """CLIP model for the filter, such as openai/clip-vit-large-patch14. Default: the features of FID-lite, which have
    no texts, so that only the similarity of the pictures counts."""
    min_image_similarity: float = 0.7
    """Smallest similarity of the two pictures."""
    min_direction_similarity: float = 0.2
    """Smallest similarity of the change between the pictures and the change between the captions."""
    min_caption_similarity: float = 0.2
    """Smallest similarity of each picture and its caption."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "steps", "samples_per_prompt", "pairs_at_a_time", "max_pairs_per_prompt")
        self.require_at_least(0, "min_guidance_scale")
        self.require_in(-1, 1, "min_image_similarity", "min_direction_similarity", "min_caption_similarity")
        self.require_in(0, 1, "min_shared", "max_shared")
        self.require("max_shared", self.max_shared >= self.min_shared, "at least --min_shared")
        largest = self.max_guidance_scale >= self.min_guidance_scale
        self.require("max_guidance_scale", largest, "at least --min_guidance_scale")


@dataclass(frozen=True)
class Generate:
    """Generates the triples of a row with the texts "input", "edit" and "output": two captions and the instruction.

    The model is loaded on first use, once per process.

    Attributes:
      flags: the user's flags.
      pictures: the flags of the pictures.
      seed: the seed of all random choices, together with the row's id.
    """

    flags: GenerateFlags
    pictures: PictureFlags
    seed: int

    def __call__(self, row: InputRow, files: Mapping[str, bytes]) -> list[Sample]:
        """Generates them.

        Raises:
          RejectedError: if no pair passes the filter.
        """
        captions = row.texts["input"], row.texts["output"]
        if not all((*captions, row.texts["edit"])):
            raise RejectedError("a caption or the instruction is missing")
        best: list[tuple[float, Picture, Picture]] = []
        rng = row.rng(self.seed)
        for start in range(0, self.flags.samples_per_prompt, self.flags.pairs_at_a_time):
            drawn = min(self.flags.pairs_at_a_time, self.flags.samples_per_prompt - start)
            before, after = self._draw(captions, rng, drawn)
            scores = compare(_load_encoder(self.flags.clip_model), before, after, captions)
            order = scores.image if scores.direction is None else scores.direction
            best += [(float(order[i]), before[i], after[i]) for i in np.flatnonzero(passes(scores, self.flags))]
            best = sorted(best, key=lambda pair: -pair[0])[: self.flags.max_pairs_per_prompt]
        if not best:
            raise RejectedError("no pair passes the filter")
        prompt = row.texts["edit"]
        return [_triple(row, f"{row.key}_{i}", a, b, prompt, self.pictures) for i, (_, a, b) in enumerate(best)]

    def _draw(self, captions: tuple[str, str], rng: np.random.Generator, drawn: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures before and after the edit; batches have one size, so that one program serves all."""
        flags, size = self.flags, self.flags.pairs_at_a_time
        pipeline = _load_teacher(flags.teacher or "", flags.variant, flags.dtype)
        images = pipeline(
            [captions[0]] * size + [captions[1]] * size,
            steps=flags.steps,
            sampler=flags.sampler,
            guidance_scale=float(rng.uniform(flags.min_guidance_scale, flags.max_guidance_scale)),
            shared_attention=rng.uniform(flags.min_shared, flags.max_shared, size).tolist(),
            seed=int(rng.integers(2**31 - 2 * size)),
        )
        return images[:drawn], images[size : size + drawn]


def passes(scores: Scores, flags: GenerateFlags) -> Bool[np.ndarray, "n"]:
    """Whether each pair passes the filter."""
    kept = scores.image >= flags.min_image_similarity
    if scores.direction is not None and scores.caption is not None:
        kept &= scores.direction >= flags.min_direction_similarity
        kept &= scores.caption >= flags.min_caption_similarity
    return kept


@functools.lru_cache(maxsize=1)
def _load_teacher(source: str, variant: str | None, dtype: str) -> Model:
    return Model.from_pretrained(source, dtype=jnp.dtype(dtype), variant=variant)


@functools.lru_cache(maxsize=1)
def _load_encoder(clip_model: str | None) -> Encoder:
    return lite_encoder() if clip_model is None else clip_encoder(clip_model)


def _triple(row: InputRow, key: str, before: Picture, after: Picture, prompt: str, flags: PictureFlags) -> Sample:
    pictures = {BEFORE: encode(before, flags), AFTER: encode(after, flags)}
    return Sample(row.position, key, pictures, {INSTRUCTION: prompt, "id": row.id})
