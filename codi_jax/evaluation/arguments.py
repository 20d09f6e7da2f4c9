"""The flags of ``python3 -m codi_jax.evaluate``."""

from dataclasses import dataclass
from pathlib import Path

from codi_jax.cli.flags import LARGEST_SEED, Flags
from codi_jax.evaluation.features import Resizing
from codi_jax.models.kernels.attention import Implementation
from codi_jax.pipeline.loading import DType

SEED_STRIDE = 1_000_000
"""The distance between the noise seeds of two ``--seeds``, so that their images share no noise."""


@dataclass(frozen=True)
class Args(Flags):
    """Compares models on a folder of images with captions, edges or edits, such as the emoji benchmark.

    Writes metrics.json, report.html (self-contained), pictures.png and the plots, and prints the table.
    """

    models: tuple[str, ...]
    """NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER, several separated by spaces; hub ids may replace folders.
    NAME=FOLDER,FOLDER,... is one model trained several times, with one folder for each of --seeds.
    NAME@STEPS,...=FOLDER overrides --steps, and a name may be repeated with other steps: base@50=runs/base
    base@4,1=runs/base-lcm is one curve."""
    data: Path = Path("data/emoji/validation")
    """Folder with a metadata.jsonl or meta.jsonl, as written by dataset_tools/emoji.py and avatars.py. Editors need a
    folder of edits, such as the emoji's edits/validation."""
    training_steps: tuple[int, ...] = ()
    """Also evaluate the exports of these training steps, in the subfolders step-N that --export_steps of training
    writes, and plot the metrics against them."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Steps of the samplers. Numbers that a model's sampler does not support are skipped for that model."""
    samplers: tuple[str, ...] = ()
    """NAME:SAMPLER for models that use a different sampler than their folder's."""
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
    max_samples: int | None = None
    """Largest number of images to use, evenly spread over the folder. Default: all."""
    batch_size: int = 32
    """Images generated at a time."""
    inception_weights: Path | None = None
    """File of pytorch-fid's network, pt_inception-2015-12-05-6726825d.pth: also measures FID, KID, precision and recall
    on its features, which are comparable to published ones."""
    fid_resizing: Resizing = "clean-fid"
    """How images are resized for that network, as in the package of this name."""
    num_shown: int = 12
    """Number of samples whose images the report shows."""
    output_dir: Path = Path("outputs/evaluation")
    """Folder for metrics.json, report.html, pictures.png and the plots."""
    dtype: DType = "auto"
    """Precision of weights and computation. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    attention: Implementation = "auto"
    """Attention kernel. auto: the fastest one on the device."""
    ccache: Path = Path("~/.cache/codi_jax/xla")
    """Cache of compiled programs, which makes the next start faster."""

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
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        self.require_at_least(1, "training_steps")
