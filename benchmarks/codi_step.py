"""Times CoDi's training step, and the same math on diffusers' former Flax models.

    python3 benchmarks/codi_step.py --reference_python flax-env/bin/python
    python3 benchmarks/codi_step.py --config sd-1.5 --dtype bfloat16 --batch 8
    python3 benchmarks/codi_step.py --config sd-1.5 --batch 1 --repeats 3 --one_after_the_other --reference_python …

`benchmarks/codi_step_flax.py` says how to make the reference's environment. Both get the same weights, batch and key,
and the table is printed only if their losses agree. Ours takes latents and text features from the cache, as training
with --cache_latents does; with --reference_encodes the reference computes them in the step, as its scripts did. Ours is
compiled as in `codi_jax.training.loop`, and the reference with JAX's defaults, or like ours with --reference_options.
"""

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import codi
from codi_jax.models.clip_text import CLIPTextConfig
from codi_jax.models.published import TEXT_ENCODERS, UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training import loop, optim

ROOT = Path(__file__).resolve().parent.parent
AVATARS = ROOT / "assets" / "avatars"
SEED = 0


@dataclass(frozen=True)
class Args:
    """Times the training step of CoDi."""

    config: Literal["avatars", "sd-1.5"] = "avatars"
    """The embedded model (64 px), or SD 1.5 (512 px)."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's native size."""
    batch: int = 32
    """Samples per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation and of the frozen networks, in both."""
    repeats: int = 10
    """Timed steps of each, after an uncounted one."""
    reference_python: str | None = None
    """Python of an environment with diffusers 0.38. Default: only ours is timed."""
    reference_encodes: bool = False
    """Let the reference compute latents and text features in the step; the losses are then not compared."""
    reference_options: bool = False
    """Compile the reference with the same CPU options as ours."""
    one_after_the_other: bool = False
    """Run all our steps before the reference's, so that memory holds only one of them. Alternating gives comparable
    times."""


def configs(args: Args) -> dict[str, Any]:
    """The configurations of the networks, by their folders."""
    if args.config == "avatars":
        return {
            name: json.loads((AVATARS / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")
        }
    return {"unet": UNETS["sd-1.5"], "vae": VAE, "text_encoder": TEXT_ENCODERS["clip-vit-l (sd-1.x, sdxl)"]}


def problem(args: Args) -> tuple[codi.CodiSetup, dict[str, Any], dict[str, Any]]:
    """Configuration, random parameters by name, and a batch with everything that either side reads."""
    config, dtype, rng = configs(args), jnp.dtype(args.dtype), np.random.default_rng(0)
    unet = UNet2DCondition(UNetConfig.from_dict(config["unet"]), dtype)
    vae = AutoencoderKL(VAEConfig.from_dict(config["vae"]), dtype)
    text = CLIPTextConfig.from_dict(config["text_encoder"])
    setup = codi.configure(Networks(unet, vae), codi.CodiFlags())
    assert isinstance(unet.config.sample_size, int)
    side = args.resolution // vae.config.downscale if args.resolution else unet.config.sample_size
    pixels, length, channels = side * vae.config.downscale, text.max_position_embeddings, vae.config.latent_channels

    def random_weights(module: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.03), module.abstract_params()
        )

    params = {"unet": random_weights(unet), "controlnet": random_weights(setup.networks.controlnet)}
    batch = {
        "moments": rng.standard_normal((args.batch, side, side, 2 * channels)).astype("f2"),
        "context": rng.standard_normal((args.batch, length, text.hidden_size)).astype("f2"),
        "conditioning": rng.integers(0, 256, (args.batch, pixels, pixels, 3), np.uint8),
        "pixels": rng.integers(0, 256, (args.batch, pixels, pixels, 3), np.uint8),
        "input_ids": rng.integers(0, text.vocab_size, (args.batch, length), np.int32),
    }
    return setup, params, batch


def teacher_schedule(args: Args) -> NoiseSchedule:
    if args.config == "avatars":
        return NoiseSchedule.from_pretrained(AVATARS)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **betas})


def ours(args: Args) -> Iterator[dict[str, float]]:
    """Compiles, then does one step per requested item; the first item is the compile time."""
    setup, params, batch = problem(args)
    flags = optim.OptimizerFlags(learning_rate=1e-4, lr_scheduler="constant")
    optimizer = optim.make_optimizer(flags, 1000)
    given = dataclasses.replace(setup, starts_from_controlnet=True)
    state = codi.init(given, params.__getitem__, optimizer, jax.random.key(SEED))
    state = dataclasses.replace(state, key=jax.random.key(SEED))
    unet = jax.tree.map(lambda x: x.astype(args.dtype), params["unet"])
    frozen = Frozen({"unet": unet}, codi.sampling(teacher_schedule(args), setup.flags))
    del params
    cached = {name: jnp.asarray(batch[name]) for name in ("moments", "context", "conditioning")}
    step = codi.METHOD.step(setup, optimizer)
    began = time.perf_counter()
    program = loop.compile_for(jax.default_backend(), jax.jit(step, donate_argnums=0).lower(state, frozen, cached))
    yield {"compile": time.perf_counter() - began}
    while True:
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, frozen, cached))
        yield {"seconds": time.perf_counter() - began, "loss": float(metrics["loss"])}


def write_problem(args: Args, file: IO[bytes]) -> dict[str, Any]:
    """Writes the arrays that the reference computes with, and returns its settings."""
    setup, params, batch = problem(args)
    assert setup.networks.controlnet is not None
    schedule = teacher_schedule(args)
    # The key of the first step and microbatch.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), 0)
    tree = {**params, "batch": batch, "alphas_cumprod": schedule.alphas_cumprod, "key": jax.random.key_data(key)}
    flat = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(file, allow_pickle=False, **flat)
    file.flush()
    return {
        **configs(args),
        "controlnet": setup.networks.controlnet.config.to_dict(),
        "compiler_options": loop.CPU_OPTIONS if args.reference_options else None,
        "dtype": args.dtype,
        "encode": args.reference_encodes,
        "prediction_type": schedule.prediction_type,
        "scaling_factor": setup.networks.vae.config.scaling_factor,
    }


def theirs(args: Args) -> Iterator[dict[str, float]]:
    """The same, by the reference in its own process."""
    assert args.reference_python is not None
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        settings = write_problem(args, file)
        command = [args.reference_python, str(ROOT / "benchmarks" / "codi_step_flax.py"), file.name]
        process = subprocess.Popen(
            [*command, json.dumps(settings)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                while line := process.stdout.readline():
                    yield json.loads(line)
                    process.stdin.write("step\n")
                    process.stdin.flush()
                sys.exit("error: the reference ended early.")
            finally:
                process.kill()


def measure(args: Args) -> list[list[dict[str, float]]]:
    """For each side: the compilation, an uncounted step, and the timed ones."""
    sides = [ours] if args.reference_python is None else [ours, theirs]
    count = args.repeats + 2
    if args.one_after_the_other:
        return [list(itertools.islice(side(args), count)) for side in sides]
    rows = itertools.islice(zip(*(side(args) for side in sides), strict=True), count)
    return [list(column) for column in zip(*rows, strict=True)]


def compare_losses(args: Args, ours: float, theirs: float) -> None:
    """Ends the benchmark if the losses of the first step differ."""
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    if abs(ours - theirs) > tolerance * theirs:
        sys.exit(f"error: the losses differ, {ours} and {theirs}: this is not the same math.")
    print(f"loss of the first step: {ours:.6f} and {theirs:.6f}")


def main() -> None:
    """Runs the benchmark and prints the table."""
    args = tyro.cli(Args, use_underscores=True)
    sides = measure(args)
    if len(sides) == 2 and not args.reference_encodes:
        compare_losses(args, *(side[1]["loss"] for side in sides))
    seconds = [[step["seconds"] for step in side[2:]] for side in sides]
    device = jax.devices()[0].device_kind
    size = f", {args.resolution} px" if args.resolution else ""
    print(f"{args.config}{size}, batch {args.batch}, {args.dtype}, {device}, JAX {jax.__version__}\n")
    print("| step | seconds | samples/s | compilation, s |")
    print("|---|---:|---:|---:|")
    for name, column, side in zip(("codi_jax", "diffusers 0.38 Flax"), seconds, sides):
        median = statistics.median(column)
        print(f"| {name} | {median:.3f} | {args.batch / median:.2f} | {side[0]['compile']:.1f} |")
    if len(sides) == 2:
        ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"\nratio (median over neighboring steps): {statistics.median(ratios):.2f} ({spread})")
    if memory := jax.devices()[0].memory_stats():
        print(f"peak device memory of codi_jax: {memory['peak_bytes_in_use'] / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
