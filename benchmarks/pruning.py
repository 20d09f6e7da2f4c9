"""Times a UNet without some of its blocks against the complete one, in the same run.

    python3 benchmarks/pruning.py --model assets/avatars --table assets/recipes/small-levels.yaml --batch 64
    python3 benchmarks/pruning.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --levels bk_base bk_small bk_tiny

The UNets take turns, so that a machine whose speed drifts slows all; a ratio is the median over the turns. Weights are
zeros: they do not affect the time. Only the model's config.json is read.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from codi_jax.io.hub import ModelFolder
from codi_jax.io.pruning_levels import find_level
from codi_jax.io.weights import build_module
from codi_jax.models.pruning import prune, whole

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Args:
    """Times levels of BK-SDM."""

    model: str
    """Folder or hub id of the teacher."""
    levels: tuple[str, ...] = ("base", "small", "tiny")
    """Which blocks stay, see --distill_level of train_bk_sdm_flax.py."""
    table: Path | None = None
    """YAML file with levels."""
    batch: int = 1
    """Samples at a time."""
    repeats: int = 15
    """Turns, after an uncounted one."""


def make_run(unet: Any, params: Any, batch: int) -> Callable[[], float]:
    """A compiled forward pass that returns its seconds."""
    config = unet.config
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    inputs = (
        jnp.zeros((batch, config.sample_size, config.sample_size, config.in_channels)),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, TEXT_TOKENS, config.context_dims[0])),
    )
    added = {"added_cond": jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), config.example_added_cond())}
    forward = jax.jit(lambda params: unet.apply({"params": params}, *inputs, **added)[0]).lower(params).compile()

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(forward(params))
        return time.perf_counter() - began

    return run


def main(args: Args) -> None:
    teacher: Any = build_module(ModelFolder(args.model, "unet"))
    levels = {"whole": whole(teacher.config)} | {name: find_level(name, args.table) for name in args.levels}
    students = {name: prune(teacher, teacher.abstract_params(), kept_blocks) for name, kept_blocks in levels.items()}
    runs = {name: make_run(unet, params, args.batch) for name, (unet, params) in students.items()}
    turns = [{name: run() for name, run in runs.items()} for _ in range(args.repeats + 1)][1:]
    print("| UNet | parameters | ms / sample | ratio |\n|---|---:|---:|---:|")
    for name, (_, params) in students.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        milliseconds = 1000 * statistics.median(turn[name] for turn in turns) / args.batch
        ratio = statistics.median(turn[name] / turn["whole"] for turn in turns)
        print(f"| {name} | {count:,} | {milliseconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
