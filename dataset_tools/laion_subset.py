"""Downloads a random subset of a table of URLs and captions: the data that BK-SDM and similar methods distill on.

    python3 dataset_tools/laion_subset.py --train_data_dir data/laion --max_train_samples 212776 --num_proc 16

takes images of LAION-art with improved captions, in an order that depends only on the seed; --input names another
table. After an interruption at any moment, the same command resumes the work.
"""

import functools
from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.data.preparation.conditions import Pair, PairFlags
from codi_jax.data.preparation.job import JobFlags, describe, make_data_set
from codi_jax.data.preparation.pictures import PictureFlags
from codi_jax.data.preparation.tables import ScoreFlags, TableFlags, image_columns, open_table
from codi_jax.io.download import DownloadFlags

LAION_ART = "recastai/LAION-art-EN-improved-captions"


@dataclass(frozen=True, kw_only=True)
class Args(JobFlags, DownloadFlags, PictureFlags, ScoreFlags, TableFlags):
    """Downloads a random subset of a table of URLs and captions."""

    input: str | None = None
    """Parquet, CSV, TSV or JSON lines of URLs and captions (files, patterns such as part-*.parquet, or URLs), or a data
    set on the hub. Default: LAION-art with improved captions from the hub."""
    shuffle: bool = True
    """Take the rows in random order, for which the table is cached first. --no_shuffle keeps their order."""


def main(args: Args) -> None:
    args.check()
    columns = functools.partial(image_columns, args, None)
    items, line = open_table(args, columns, default=LAION_ART, filters=args.filters, shuffle=args.shuffle)
    print(f"reading {line}")
    pair = Pair(PairFlags(**vars(PictureFlags.of(args)), condition="none"), args.seed)
    made_with = {name: getattr(args, name) for name in _MADE_WITH}
    print(describe(make_data_set(args, items, pair, made_with, DownloadFlags.of(args)), args))


# The flags that a resumed run must share with the stopped one.
_MADE_WITH = (
    *PictureFlags.names(), *ScoreFlags.names(),
    *sorted({*TableFlags.names()} - {"cache_dir", "allow_outside_paths"}), "shuffle",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
