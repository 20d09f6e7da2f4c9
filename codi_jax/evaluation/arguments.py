"""The flags of ``python3 -m codi_jax.evaluate``."""

from dataclasses import dataclass
from pathlib import Path

from codi_jax.cli.flags import LARGEST_SEED, Flags
from codi_jax.models.kernels.attention import Implementation
from codi_jax.pipeline.model import DType

SEED_STRIDE = 1_000_000
"""The distance between the noise seeds of two ``--seeds``, so that their pictures share no noise."""


@dataclass(frozen=True)
class Args(Flags):
    """Compares models on a folder of pictures with captions, edges or edits, such as the emoji benchmark.

    Writes metrics.json, report.html (one file that needs nothing else), pictures.png and the plots, and prints the
    table.
    """

    models: tuple[str, ...]
    """NAME=FOLDER, or NAME=FOLDER+CONTROLNET_FOLDER; several separated by spaces. Hub ids work as folders do.
    NAME=FOLDER,FOLDER,... is one model trained several times: one folder for each of --seeds. NAME@STEPS,...=FOLDER has
    steps of its own, and may be there again with other steps: base@50=runs/base base@4,1=runs/base-lcm is one curve."""
    data: Path = Path("data/emoji/validation")
    """Folder with metadata.jsonl; made by dataset_tools/emoji.py. Its subfolder edits/validation compares editors."""
    training_steps: tuple[int, ...] = ()
    """Evaluate models whose folders hold what they were after so many training steps, in step-N (--export_steps of
    training writes it), at those, too, and plot the metrics against them."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Steps of the samplers. Those that a model's sampler cannot take are left out for that model."""
    samplers: tuple[str, ...] = ()
    """NAME:SAMPLER for models that shall not use the sampler of their folder."""
    guidance_scale: float = 7.5
    """How strongly to follow the text; 1 is no guidance."""
    guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with a guidance scale of their own, such as student:1, or base@4,1:1 for those steps."""
    image_guidance_scale: float = 1.5
    """How strongly to keep to the image, for InstructPix2Pix."""
    image_guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with an image guidance scale of their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """All pictures are made once with each; the table has the mean and the standard deviation."""
    max_samples: int | None = None
    """Use at most so many pictures, evenly spread over the folder. If left out: all."""
    batch_size: int = 32
    """Pictures at a time."""
    num_shown: int = 12
    """Rows of pictures in the report."""
    output_dir: Path = Path("outputs/evaluation")
    """Folder for metrics.json, report.html, pictures.png and the plots."""
    dtype: DType = "auto"
    """Precision of weights and computation. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    attention: Implementation = "auto"
    """Attention kernel. auto: the fastest that the device has."""
    ccache: Path = Path("~/.cache/codi_jax/xla")
    """Folder that keeps compiled programs, so that the next start is faster."""

    def check(self) -> None:
        super().check()
        if not self.steps or min(self.steps) < 1:
            raise ValueError("--steps must be numbers of at least 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds must be different numbers of at least 0.")
        self.require("seeds", max(self.seeds) < LARGEST_SEED // SEED_STRIDE, f"below 2^63 / {SEED_STRIDE}")
        if self.batch_size < 1 or self.num_shown < 1:
            raise ValueError("--batch_size and --num_shown must be at least 1.")
        if self.max_samples is not None and self.max_samples < 2:
            raise ValueError("--max_samples must be at least 2.")
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        self.require_at_least(1, "training_steps")
