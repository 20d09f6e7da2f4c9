"""Batches for training: which data, and how it becomes arrays.

`datasets` opens the data (`codi_jax.data.sources`), `codi_jax.data.samples` turns it into arrays,
`codi_jax.data.loader` assembles batches and reads ahead. Every random choice is a function of (seed, sample, epoch).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import grain
import tyro

from codi_jax.cli.choices import choices_with_aliases
from codi_jax.cli.flags import LARGEST_SIDE, Adjustable, Flags, Local, Topic
from codi_jax.data.images import (
    FORMER_CONDITION_NAMES,
    Condition,
    ConditionName,
    Interpolation,
    condition_for,
    current_condition_name,
)
from codi_jax.data.latent_cache import CachedReader, cache_part, open_cache, prefetch
from codi_jax.data.latent_encoding import Encoders, Part
from codi_jax.data.loader import Batches, Loader, Order, ProcessShard, Tokenize, read_ahead, tokenized
from codi_jax.data.samples import Reader, Transform
from codi_jax.data.sources import Source, open_source, require_folder
from codi_jax.data.streams import StreamBatches
from codi_jax.io import processes
from codi_jax.io.decoding import LARGEST_MEGAPIXELS, MAX_MEGAPIXELS

_MOST_WORKERS = 1024  # each is a process, and all start before the first batch

ConditionOf = Literal["column"] | ConditionName | Condition | None
"""Where conditions come from: a column, a named condition of the image (canny: a column if there is one, else edges), a
function of the image, or nowhere."""

_Task = Literal["column", "edit", "canny", "super_resolution", "inpainting"]
ConditionTask = Annotated[_Task, choices_with_aliases(_Task, FORMER_CONDITION_NAMES)]
"""The values of ``--task``."""


def condition_of_task(task: str) -> ConditionOf:
    """Where the conditions of a ``--task`` come from, as `load_data` takes it; "none" is nowhere."""
    name: Any = current_condition_name(task)
    return {"none": None, "edit": "column"}.get(name, name)


@dataclass(frozen=True)
class DataFlags(Flags):
    """Which data, and how it becomes batches."""

    topic: ClassVar[Topic] = Topic.DATA

    dataset_name: Adjustable[str | None] = None
    """Data set to train on: its id on the Hugging Face Hub (private ones require `hf auth login`), a folder, or
    avatars:text or avatars:edit, which are drawn while training."""

    dataset_config_name: str | None = None
    """Configuration of a data set that has several."""

    train_data_dir: Adjustable[str | None] = None
    """Folder with images and a meta.jsonl (or metadata.jsonl) that has one object per image, with image, text and, if
    the task has conditions, conditioning_image; paths are absolute or relative to the folder. Or images with captions
    in .txt files of the same names, or parquet files, or anything else that `datasets` loads; for training without
    text, also a folder of only images."""

    train_shards_path_or_url: Adjustable[str | None] = None
    """Shards of a WebDataset to stream: paths or URLs of tar files, such as data/{00000..00099}.tar. The columns are
    the extensions of the files in them: jpg, txt, edited_image.jpg."""

    load_from_disk: bool = False
    """The folder was written by save_to_disk of `datasets`. Such folders are also recognized without this flag."""

    streaming: bool = False
    """Read the data as a stream instead of downloading it first; shuffled within 1000 samples."""

    image_column: str = "image"
    """Column of the images to generate. If there is no "image", "file_name" is tried."""

    caption_column: str = "text"
    """Column of the captions: a text, or a list to choose from. If there is no "text", "caption" is tried."""

    conditioning_image_column: Annotated[str, tyro.conf.arg(aliases=["--conditioning_image"])] = "conditioning_image"
    """Column of the images that the generated ones are conditioned on."""

    max_train_samples: int | None = None
    """Train on this many samples only, the first ones."""

    allow_outside_paths: bool = False
    """Also read images that a table names outside of its folder, on this machine or on other storage. By default a
    table from elsewhere cannot reach your files."""

    allow_private_addresses: bool = False
    """Also download images that a table names on this machine and its local network."""

    max_megapixels: float | int = MAX_MEGAPIXELS
    """Size limit of images: a small file can hold an image that fills the memory."""

    proportion_empty_prompts: float | int = 0.0
    """Probability of replacing a caption by an empty one."""

    resolution: int = 512
    """Side of the square training images: the shorter side is resized to it, and the longer one cropped."""

    interpolation_type: Interpolation = "lanczos"
    """How images are resized."""

    use_fix_crop_and_size: bool = False
    """Condition SDXL as if every image were uncropped and had --resolution, whatever its size and crop."""

    center_crop: bool = False
    """Crop the center instead of a random place."""

    random_flip: bool = False
    """Mirror half of the samples, each image together with its condition."""

    dataloader_num_workers: Local[int] = 0
    """Number of processes that read images; 0 reads in threads of this process."""

    cache_dir: Local[str | None] = None
    """Folder for downloaded data sets and cached latents."""

    cache_latents: bool = False
    """Encode all images and captions once, before training, and keep the results on disk."""

    cache_latents_dir: Local[str | None] = None
    """Folder for cached latents. Default: latents in --cache_dir."""

    max_unreadable_share: Adjustable[float | int] = 0.01
    """Abort when more than this fraction of the images, and more than 10, are missing or damaged; until then other
    images replace them. 0 aborts at the first."""

    def check(self) -> None:
        """Also rejects a folder that does not exist."""
        super().check()
        given = [f"--{name}" for name in self.sources if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them.")
        if not given:
            raise ValueError(f"there is no data to train on: give --{' or --'.join(self.sources[:2])}.")
        if self.train_data_dir:
            require_folder(self.train_data_dir)
        self.require_at_least(1, "max_train_samples", "resolution")
        self.require_at_least(0, "dataloader_num_workers")
        self.require("resolution", self.resolution <= LARGEST_SIDE, f"at most {LARGEST_SIDE}")
        self.require("dataloader_num_workers", self.dataloader_num_workers <= _MOST_WORKERS, f"at most {_MOST_WORKERS}")
        self.require_in(0, 1, "proportion_empty_prompts", "max_unreadable_share")
        possible = 0 < self.max_megapixels <= LARGEST_MEGAPIXELS
        self.require("max_megapixels", possible, f"above 0 and at most {LARGEST_MEGAPIXELS}")
        streams = "--streaming" if self.streaming else "--train_shards_path_or_url"
        if self.cache_latents and (self.streaming or self.train_shards_path_or_url):
            raise ValueError(
                f"--cache_latents needs the complete data set, which {streams} does not read: remove one of them."
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The flags that name the data, one of which must be given."""
        return ("dataset_name", "train_data_dir", "train_shards_path_or_url")

    def check_resolution(self, multiple: int, model: str) -> None:
        """Rejects a resolution that is not a multiple of the factor by which ``model``, a noun, scales images down."""
        if self.resolution % multiple:
            raise ValueError(f"--resolution {self.resolution} is not possible: {model} takes multiples of {multiple}.")


@dataclass(frozen=True)
class PromptFlags(DataFlags):
    """Which data, for training that may not need images."""

    topic: ClassVar[Topic] = Topic.DATA

    train_prompt_path: Adjustable[str | None] = None
    """File of prompts to train on: one per line, parquet with --caption_column, or a pickled list. Any of the data sets
    above may be given instead; only their captions are read, unless images are needed."""

    @property
    def sources(self) -> tuple[str, ...]:
        return ("train_prompt_path", "train_data_dir", "dataset_name", "train_shards_path_or_url")


def open_data(
    flags: DataFlags,
    *,
    batch_size: int,
    condition: ConditionOf = None,
    has_text: bool = True,
    has_images: bool = True,
) -> Source:
    """Opens the data and checks it, before anything else is loaded.

    Args:
      flags: the user's flags.
      batch_size: samples per optimizer step, over all processes.
      condition: the origin of "conditioning".
      has_text: whether captions are read.
      has_images: whether images, and with them conditions, are read.

    Raises:
      ValueError: for flags that make no sense, and data that does not exist or is too small.
    """
    flags.check()
    if flags.cache_latents and not has_images:
        raise ValueError("--cache_latents is for images, and this training reads none: remove the flag.")
    source = _open(flags, condition, has_text, has_images)
    if not source.is_streaming and len(source) < batch_size:
        raise ValueError(
            f"{source.name} has {len(source)} samples, fewer than one batch of {batch_size} takes: "
            "lower --train_batch_size or --gradient_accumulation_steps."
        )
    return source


def load_data(
    flags: DataFlags,
    tokenize: Tokenize | None,
    *,
    batch_size: int,
    seed: int,
    condition: ConditionOf = None,
    source: Source | None = None,
    time_ids: bool = False,
    encoders: Encoders | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Makes a loader of the batches of the data.

    Args:
      flags: the user's flags.
      tokenize: tokenizes captions; called in this process, with as many texts as a batch has samples. ``None`` reads no
        captions, and the data need not have any.
      batch_size: samples per optimizer step, over all processes.
      seed: the seed of order, crops, flips, captions and conditions.
      condition: the origin of "conditioning".
      source: the result of `open_data`. Default: the data is opened here.
      time_ids: whether to add SDXL's sizes, "time_ids".
      encoders: for --cache_latents, whose cache is built in this call.
      process_index: index of this process, which reads the part of each batch for its devices, or a separate part of a
        stream.
      process_count: number of processes.

    Returns:
      Batches with "pixels" if the source has images, "conditioning" if there is a condition, "input_ids" if there is a
      tokenizer, and "time_ids" if requested. Cached latents give "moments" instead of "pixels", and "context" (and
      "pooled") instead of "input_ids".

    Raises:
      ValueError: under the conditions of `open_data`, and for images that cannot be read.
    """
    source = source or open_data(flags, batch_size=batch_size, condition=condition, has_text=tokenize is not None)
    shard = ProcessShard(batch_size, process_index, process_count)
    reader = _reader(flags, source, condition, seed, time_ids)
    if source.is_streaming:
        return _stream(reader, shard, tokenize, flags)
    order = Order(len(source), reader.seed)
    cached = (
        _open_cache(flags, reader, tokenize, encoders, Part(process_index, process_count))
        if flags.cache_latents
        else None
    )

    def open_at(cursor: dict[str, Any] | None) -> grain.DatasetIterator:
        start = cursor["samples"] if cursor else 0
        if cached is not None:
            return iter(prefetch(Batches(order, cached.batch, shard, start)))
        batches = Batches(order, reader.batch, shard, start)
        return iter(tokenized(read_ahead(batches, flags.dataloader_num_workers), tokenize))

    identity = {"seed": reader.seed, "number_of_samples": len(source), "content": source.content_digest()}
    return Loader(open_at, identity, len(source), flags.max_unreadable_share)


def cache_data(
    flags: DataFlags,
    tokenize: Tokenize,
    *,
    source: Source,
    encoders: Encoders,
    condition: ConditionOf = None,
    time_ids: bool = False,
    part: Part,
) -> Path | None:
    """Computes a part of the cache that a training run with these flags and --cache_latents reads.

    Args:
      flags: the user's flags.
      tokenize: tokenizes captions.
      source: the result of `open_data`.
      encoders: the networks whose outputs are cached.
      condition: the origin of "conditioning".
      time_ids: whether the model takes SDXL's sizes.
      part: the part to compute.

    Returns:
      The folder of the cache; ``None`` as long as other parts are missing.

    Raises:
      ValueError: under the conditions of `load_data`.
    """
    reader = _reader(flags, source, condition, 0, time_ids)  # nothing that depends on the seed is cached
    workers, share = flags.dataloader_num_workers, flags.max_unreadable_share
    root = _cache_root(flags)
    return cache_part(root, reader, tokenize, encoders, part, workers=workers, max_unreadable_share=share)


def _reader(flags: DataFlags, source: Source, condition: ConditionOf, seed: int, time_ids: bool) -> Reader:
    transform = Transform(
        flags.resolution,
        flags.center_crop,
        flags.random_flip,
        flags.proportion_empty_prompts,
        flags.interpolation_type,
        flags.use_fix_crop_and_size,
        flags.max_megapixels,
    )
    # Generators take no negative seeds.
    return Reader(source, transform, _condition(condition, source), seed % 2**64, time_ids)


def _cache_root(flags: DataFlags) -> Path:
    return Path(flags.cache_latents_dir or Path(flags.cache_dir or "~/.cache/codi_jax") / "latents").expanduser()


def _open_cache(
    flags: DataFlags, reader: Reader, tokenize: Tokenize | None, encoders: Encoders | None, part: Part
) -> CachedReader:
    if encoders is None or tokenize is None:
        raise ValueError("--cache_latents has no use here, since this training works on pixels: remove the flag.")
    limits = {"workers": flags.dataloader_num_workers, "max_unreadable_share": flags.max_unreadable_share}
    if part.count > 1:
        # Each process computes a part. Those that do not share the folder compute the rest below, on their own.
        cache_part(_cache_root(flags), reader, tokenize, encoders, part, **limits)
        processes.wait_for_all("the parts of the latents")
    return open_cache(_cache_root(flags), reader, tokenize, encoders, **limits)


def _stream(reader: Reader, shard: ProcessShard, tokenize: Tokenize | None, flags: DataFlags) -> Loader:
    batches = StreamBatches(reader, shard, flags.dataloader_num_workers)

    def open_at(cursor: dict[str, Any] | None) -> grain.DatasetIterator:
        iterator = iter(tokenized(batches, tokenize))
        if cursor is not None:
            iterator.set_state(cursor)
        return iterator

    identity = {"seed": reader.seed, "process_index": shard.index, "number_of_processes": shard.count}
    return Loader(open_at, identity, None, flags.max_unreadable_share)


def _open(flags: DataFlags, condition: ConditionOf, has_text: bool, has_images: bool) -> Source:
    prompts = flags.train_prompt_path if isinstance(flags, PromptFlags) else None
    if prompts is not None and has_images:
        raise ValueError(
            "--train_prompt_path has no images, which training with these flags needs: give --train_data_dir or "
            "--dataset_name instead."
        )
    return open_source(
        dataset_name=flags.dataset_name,
        dataset_config_name=flags.dataset_config_name,
        train_data_dir=flags.train_data_dir,
        train_shards=flags.train_shards_path_or_url,
        train_prompts=prompts,
        load_from_disk=flags.load_from_disk,
        streaming=flags.streaming,
        cache_dir=flags.cache_dir,
        image_column=flags.image_column if has_images else None,
        caption_column=flags.caption_column if has_text else None,
        condition_column=flags.conditioning_image_column if condition in ("column", "canny") else None,
        condition_is_optional=condition == "canny",
        max_train_samples=flags.max_train_samples,
        allow_outside_paths=flags.allow_outside_paths,
        allow_private_addresses=flags.allow_private_addresses,
    )


def _condition(condition: ConditionOf, source: Source) -> Condition | None:
    if condition is None or condition == "column" or source.columns.condition is not None:
        return None
    return condition if callable(condition) else condition_for(condition)
