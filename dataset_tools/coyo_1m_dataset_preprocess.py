"""Makes a data set of images, condition images and captions, for ControlNets and CoDi.

    python3 dataset_tools/coyo_1m_dataset_preprocess.py --train_data_dir data/coyo --cache_dir data \
        --max_train_samples 1000000 --num_proc 32

downloads images of COYO-700M and finds their edges; --input names another table of URLs and captions, a data set with
images in it, or a folder of images. After an interruption at any moment, the same command resumes the work.
"""

import functools
from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.data.preparation.conditions import Pair, PairFlags
from codi_jax.data.preparation.job import JobFlags, describe, make_data_set
from codi_jax.data.preparation.tables import ScoreFlags, TableFlags, image_columns, open_table
from codi_jax.io.download import DownloadFlags

COYO = "kakaobrain/coyo-700m"


@dataclass(frozen=True, kw_only=True)
class Args(JobFlags, DownloadFlags, PairFlags, ScoreFlags, TableFlags):
    """Makes a data set of images, condition images and captions."""

    input: str | None = None
    """Parquet, CSV, TSV or JSON lines of URLs and captions (files, patterns such as part-*.parquet, or URLs), a data
    set on the hub, what save_to_disk wrote, or a folder of images, whose captions are in .txt files of the same names
    or in a metadata.jsonl. Default: COYO-700M from the hub."""
    conditioning_image_column: str | None = None
    """Column of the condition images, for --condition depth_from_file."""
    min_clip_similarity: float | None = 0.3
    """Least similarity of image and caption (CLIP ViT-B/32), if the input has a column of it."""
    max_watermark_score: float | None = 0.4
    """Largest probability of a watermark, if the input has a column of it."""
    min_aesthetic_score: float | None = 6.0
    """Least aesthetic score (LAION's second predictor), if the input has a column of it."""

    def check(self) -> None:
        super().check()
        if (self.condition == "depth_from_file") != (self.conditioning_image_column is not None):
            raise ValueError("--condition depth_from_file and --conditioning_image_column need each other.")


def main(args: Args) -> None:
    args.check()
    columns = functools.partial(image_columns, args, args.conditioning_image_column)
    items, line = open_table(args, columns, default=COYO, filters=args.filters)
    print(f"reading {line}")
    made_with = {name: getattr(args, name) for name in _MADE_WITH}
    pair = Pair(PairFlags.of(args), args.seed)
    print(describe(make_data_set(args, items, pair, made_with, DownloadFlags.of(args)), args))


# The flags that a resumed run must share with the stopped one.
_MADE_WITH = (
    *PairFlags.names(), *ScoreFlags.names(),
    *sorted({*TableFlags.names()} - {"cache_dir", "allow_outside_paths"}), "conditioning_image_column",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
