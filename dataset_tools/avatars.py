"""Draws a data set of avatars: pictures with exact captions, or edits with their exact results, as many as you want.

    pip install -e ".[avatars]"
    python3 dataset_tools/avatars.py --train_data_dir data/avatars/train --max_train_samples 50000
    python3 dataset_tools/avatars.py --train_data_dir data/avatars/validation --max_train_samples 1000 \
        --split validation
    python3 dataset_tools/avatars.py --train_data_dir data/avatar-edits/train --max_train_samples 50000 --task edit

The validation split shows combinations of attributes that the training split never shows
(`codi_jax.data.avatars.looks` has the rule). The same seed, number and packages give the same bytes; after an
interruption at any moment, the same command resumes the work.
"""

from dataclasses import dataclass
from typing import Literal

from codi_jax.cli import command_line
from codi_jax.data.avatars.looks import Split, require_packages
from codi_jax.data.avatars.samples import SIZE, Task
from codi_jax.data.avatars.vocabulary import KINDS
from codi_jax.data.preparation.avatars import DrawAvatar, numbered_rows
from codi_jax.data.preparation.conditions import PairFlags
from codi_jax.data.preparation.job import JobFlags, describe, make_data_set

KindName = Literal["monster", "plant", "planet", "person"]


@dataclass(frozen=True, kw_only=True)
class Args(JobFlags):
    """Draws a data set of avatars."""

    task: Task = "text"
    """text: pictures with captions and, unless --condition none, condition images. edit: triples of a picture, an
    instruction and the edited picture."""
    split: Split = "train"
    """validation: only combinations of attributes that train never has."""
    kinds: tuple[KindName, ...] = tuple(KINDS)  # type: ignore[assignment]
    """Kinds of avatars."""
    max_train_samples: int = 10_000
    """Number of samples."""
    resolution: int = SIZE
    """Side of the pictures."""
    condition: str = "canny"
    """canny, soft_edges, grayscale, super_resolution, inpainting or none; or your own function,
    package.module:function, as for coyo_1m_dataset_preprocess.py."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """Format of the pictures. Conditions are always png."""
    seed: int = 0
    """Seed of all random choices."""
    shard_size: int = 500
    """Samples per task, which is also the largest number of samples in a parquet or tar file."""

    def check(self) -> None:
        super().check()
        self.require("condition", self.condition != "depth_from_file", "one that is made from the picture")
        self.pictures.check()

    @property
    def pictures(self) -> PairFlags:
        """How pictures and conditions are made."""
        return PairFlags(
            resolution=self.resolution,
            condition=self.condition,
            canny_low=(30, 30),  # contrasts of drawings, below those of photographs
            canny_high=(90, 90),
            image_format=self.image_format,
        )


def main(args: Args) -> None:
    args.check()
    require_packages()
    prepare = DrawAvatar(args.task, args.pictures, args.split, args.kinds, args.seed)
    made_with = {name: getattr(args, name) for name in _MADE_WITH}
    print(describe(make_data_set(args, numbered_rows, prepare, made_with), args))


# The flags that a resumed run must share with the stopped one.
_MADE_WITH = ("task", "split", "kinds", "resolution", "condition", "image_format", "seed")

if __name__ == "__main__":
    command_line.run(Args, main)
