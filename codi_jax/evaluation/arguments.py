"""The flags of ``python3 -m codi_jax.evaluate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from codi_jax.cli.flags import LARGEST_SEED, Flags, Topic
from codi_jax.evaluation.features import Resizing
from codi_jax.pipeline.machine_flags import MachineFlags

MetricName = Literal[
    "attributes", "fid", "kid", "precision_recall", "fid_lite", "kid_lite", "clip_score", "clip_image",
    "clip_direction", "dino", "lpips", "edge_f1", "edit_success", "preservation", "psnr",
]  # fmt: skip

SEED_STRIDE = 1_000_000
"""The distance between the noise seeds of two ``--seeds``, so that their images share no noise."""


@dataclass(frozen=True, kw_only=True)
class ModelsFlags(Flags):
    """Which models are compared."""

    topic: ClassVar[Topic] = Topic.MODEL

    models: tuple[str, ...]
    """NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER, several separated by spaces; hub ids may replace folders.
    NAME=FOLDER,FOLDER,... is one model trained several times, with one folder for each of --seeds.
    NAME@STEPS,...=FOLDER overrides --steps, and a name may be repeated with other steps: base@50=runs/base
    base@4,1=runs/base-lcm is one curve."""
    training_steps: tuple[int, ...] = ()
    """Also evaluate the exports of these training steps, in the subfolders step-N that --export_steps of training
    writes, and plot the metrics against them."""


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """What they are compared on."""

    topic: ClassVar[Topic] = Topic.DATA

    data: str = "data/avatars/validation"
    """Folder with a metadata.jsonl or meta.jsonl, as the data tools write it; editors need a folder of edits. Or any
    images with captions that training accepts, as a folder or an id on the hub. Or captions alone: lines of text,
    parquet with a column text, or the JSON of COCO's captions."""
    resolution: int | None = None
    """Side of the images. Images of the data are resized to it and center-cropped. Default: as they are, or the model's
    own size for captions alone."""
    max_samples: int | None = None
    """Largest number of images to use, evenly spread over the folder. Default: all."""
    reference: Path | None = None
    """Real images for FID and KID in place of the data's own: a folder, or for FID an .npz file of pytorch-fid."""
    save_reference: Path | None = None
    """Writes mean and covariance of the real images' Inception features to this file, for --reference."""


@dataclass(frozen=True, kw_only=True)
class MetricFlags(Flags):
    """What is measured, and with which networks."""

    topic: ClassVar[Topic] = Topic.METRICS

    metrics: tuple[MetricName, ...] = ()
    """What to measure. Default: all metrics that the data and the other flags allow."""
    inception_weights: Path | None = None
    """File of pytorch-fid's network, pt_inception-2015-12-05-6726825d.pth, for fid, kid and precision_recall, which are
    comparable to published ones."""
    fid_resizing: Resizing = "clean-fid"
    """How images are resized for that network, as in the package of this name."""
    clip: str | None = None
    """Folder or id on the hub of a CLIP, such as openai/clip-vit-large-patch14, for clip_score, clip_image and
    clip_direction."""
    dino: str | None = None
    """Folder or id on the hub of DINO or DINOv2, such as facebook/dino-vits16, for dino."""
    lpips_weights: Path | None = None
    """File of torchvision's AlexNet (alexnet-owt-7be5be79.pth) or VGG-16 (vgg16-397923af.pth), for lpips."""
    lpips_heads: Path | None = None
    """File of the fitted weights of LPIPS. Default: the one in the package lpips."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """How the models are sampled."""

    topic: ClassVar[Topic] = Topic.SAMPLING

    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Steps of the samplers. Numbers that a model's sampler does not support are skipped for that model."""
    samplers: tuple[str, ...] = ()
    """NAME:SAMPLER for models that use a different sampler than their folder's."""
    gamma: float = 0.3
    """Randomness of the sampler tcd, from 0 (none) to 1 (as in lcm)."""
    gammas: tuple[str, ...] = ()
    """NAME:GAMMA for models with another --gamma."""
    guidance_scale: float = 7.5
    """Classifier-free guidance on the text; 1 disables it."""
    guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with another --guidance_scale, such as student:1, or base@4,1:1 for these steps."""
    image_guidance_scale: float = 1.5
    """Guidance on the input image, for InstructPix2Pix."""
    image_guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with another --image_guidance_scale."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every image is generated once per seed; the table shows mean and standard deviation."""
    batch_size: int = 32
    """Images generated at a time."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    """What is kept, and where."""

    topic: ClassVar[Topic] = Topic.OUTPUT

    output_dir: Path = Path("outputs/evaluation")
    """Folder for metrics.json, report.html, pictures.png and the plots."""
    num_shown: int = 12
    """Number of samples whose images the report shows."""
    save_images: bool = False
    """Keep all generated images, as shards of a WebDataset."""
    shard_size: int = 500
    """Images whose measurements are kept together. An interrupted evaluation goes on after the last whole shard."""


@dataclass(frozen=True, kw_only=True)
class Args(MachineFlags, OutputFlags, SamplingFlags, MetricFlags, DataFlags, ModelsFlags):
    """Compares models on images with captions, edges or edits, or on captions alone.

    Writes metrics.json, report.html (self-contained), pictures.png and the plots, and prints the table.
    """

    essential: ClassVar[tuple[str, ...]] = (
        "models", "data", "steps", "guidance_scale", "guidance_scales", "metrics", "seeds", "max_samples", "batch_size",
        "output_dir",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if not self.steps or min(self.steps) < 1:
            raise ValueError("--steps must be at least 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds must be different numbers of at least 0.")
        self.require("seeds", max(self.seeds) < LARGEST_SEED // SEED_STRIDE, f"below 2^63 / {SEED_STRIDE}")
        if self.batch_size < 1 or self.num_shown < 1:
            raise ValueError("--batch_size and --num_shown must be at least 1.")
        if self.max_samples is not None and self.max_samples < 2:
            raise ValueError("--max_samples must be at least 2.")
        if self.save_reference is not None and (self.inception_weights is None or self.save_reference.suffix != ".npz"):
            raise ValueError("--save_reference needs --inception_weights, and a file that ends in .npz.")
        if self.resolution is not None:
            self.require_at_least(8, "resolution")
        self.require_at_least(1, "shard_size")
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        self.require_in(0, 1, "gamma")
        self.require_at_least(1, "training_steps")
