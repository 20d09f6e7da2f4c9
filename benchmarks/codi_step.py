"""Times the training step of CoDi, and the same maths on diffusers' former Flax models, in turns.

    python3 benchmarks/codi_step.py --reference_python flax-env/bin/python
    python3 benchmarks/codi_step.py --config sd-1.5 --dtype bfloat16 --batch 8

`benchmarks/codi_step_flax.py` says how to make the reference's environment. Both get the same weights, batch and key,
and the table is printed only if their losses agree. Ours takes latents and text features from the cache, as training
with --cache_latents does; with --reference_encodes the reference computes them in the step, as its scripts did.
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codi_jax import optim
from codi_jax.methods import codi
from codi_jax.methods.inputs import Modules
from codi_jax.models.clip_text import CLIPTextConfig
from codi_jax.models.published import TEXT_ENCODERS, UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.schedule import NoiseSchedule

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "assets" / "recipes" / "emoji"
KEY = jax.random.key(0)


@dataclass(frozen=True)
class Args:
    """Times the training step of CoDi."""

    config: Literal["emoji", "sd-1.5"] = "emoji"
    """The embedded model (64 px), or SD 1.5 (512 px)."""
    batch: int = 32
    """Samples in a step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation and of the frozen networks, in both."""
    repeats: int = 10
    """Timed steps of each, after one that is not counted."""
    reference_python: str | None = None
    """Python of an environment with diffusers 0.38. If left out: only ours is timed."""
    reference_encodes: bool = False
    """The reference computes latents and text features in the step, and the losses are not compared."""


def configs(args: Args) -> dict[str, Any]:
    """The configurations of the networks, by their folders."""
    if args.config == "emoji":
        return {
            name: json.loads((EMOJI / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")
        }
    return {"unet": UNETS["sd-1.5"], "vae": VAE, "text_encoder": TEXT_ENCODERS["sd-1.x"]}


def problem(args: Args) -> tuple[codi.Config, dict[str, Any], dict[str, Any]]:
    """Configuration, random parameters by name, and a batch with all that either side reads."""
    config, dtype, rng = configs(args), jnp.dtype(args.dtype), np.random.default_rng(0)
    unet = UNet2DCondition(UNetConfig.from_dict(config["unet"]), dtype)
    vae = AutoencoderKL(VAEConfig.from_dict(config["vae"]), dtype)
    text = CLIPTextConfig.from_dict(config["text_encoder"])
    method = codi.configure(Modules(unet, vae), codi.CodiFlags())
    side = unet.config.sample_size
    assert isinstance(side, int)
    pixels, length, channels = side * vae.config.downscale, text.max_position_embeddings, vae.config.latent_channels

    def random_weights(module: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.03), module.abstract_params()
        )

    params = {"unet": random_weights(unet), "controlnet": random_weights(method.modules.controlnet)}
    batch = {
        "moments": rng.standard_normal((args.batch, side, side, 2 * channels)).astype("f2"),
        "context": rng.standard_normal((args.batch, length, text.hidden_size)).astype("f2"),
        "conditioning": rng.integers(0, 256, (args.batch, pixels, pixels, 3), np.uint8),
        "pixels": rng.integers(0, 256, (args.batch, pixels, pixels, 3), np.uint8),
        "input_ids": rng.integers(0, text.vocab_size, (args.batch, length), np.int32),
    }
    return method, params, batch


def teacher_schedule(args: Args) -> NoiseSchedule:
    if args.config == "emoji":
        return NoiseSchedule.from_pretrained(EMOJI)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **betas})


def ours(args: Args, method: codi.Config, params: dict[str, Any], batch: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Compiles, then does a step for each item that is asked for; the first item is the time of compilation."""
    flags = optim.OptimizerFlags(learning_rate=1e-4, lr_scheduler="constant")
    optimizer = optim.make_optimizer(flags, 1000)
    state = codi.init_state(method, params["unet"], optimizer, KEY, controlnet_params=params["controlnet"])
    state = dataclasses.replace(state, key=KEY)
    frozen = {
        "unet": jax.tree.map(lambda x: x.astype(args.dtype), params["unet"]),
        "schedule": codi.student_schedule(teacher_schedule(args), method.flags),
    }
    cached = {name: jnp.asarray(batch[name]) for name in ("moments", "context", "conditioning")}
    step = functools.partial(codi.train_step, config=method, optimizer=optimizer)
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, frozen, cached).compile()
    yield {"compile": time.perf_counter() - began}
    while True:
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, frozen, cached))
        yield {"seconds": time.perf_counter() - began, "loss": float(metrics["loss"])}


def theirs(
    args: Args, method: codi.Config, params: dict[str, Any], batch: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """The same, by the reference in its own process."""
    assert args.reference_python is not None
    assert method.modules.controlnet is not None
    schedule = teacher_schedule(args)
    # The key of the first step and microbatch.
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
    tree = {**params, "batch": batch, "alphas_cumprod": schedule.alphas_cumprod, "key": jax.random.key_data(key)}
    flat = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    settings = {
        **configs(args),
        "controlnet": method.modules.controlnet.config.to_dict(),
        "dtype": args.dtype,
        "encode": args.reference_encodes,
        "prediction_type": schedule.prediction_type,
        "scaling_factor": method.modules.vae.config.scaling_factor,
    }
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, allow_pickle=False, **flat)
        file.flush()
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


def main() -> None:
    """Runs the benchmark and prints the table."""
    args = tyro.cli(Args, use_underscores=True)
    method, params, batch = problem(args)
    sides = [ours(args, method, params, batch)]
    if args.reference_python is not None:
        sides.append(theirs(args, method, params, batch))
    compile_seconds = [next(side)["compile"] for side in sides]
    first = [next(side)["loss"] for side in sides]
    if len(sides) == 2 and not args.reference_encodes:
        tolerance = 1e-4 if args.dtype == "float32" else 3e-2
        if abs(first[0] - first[1]) > tolerance * first[1]:
            sys.exit(f"error: the losses differ, {first[0]} and {first[1]}: this is not the same maths.")
        print(f"loss of the first step: {first[0]:.6f} and {first[1]:.6f}")
    steps = [[next(side)["seconds"] for side in sides] for _ in range(args.repeats)]
    device = jax.devices()[0].device_kind
    print(f"{args.config}, batch {args.batch}, {args.dtype}, {device}, JAX {jax.__version__}\n")
    print("| step | seconds | samples/s | compilation, s |")
    print("|---|---:|---:|---:|")
    for name, column, compiled in zip(("codi_jax", "diffusers 0.38 Flax"), zip(*steps, strict=True), compile_seconds):
        median = statistics.median(column)
        print(f"| {name} | {median:.3f} | {args.batch / median:.1f} | {compiled:.1f} |")
    if len(sides) == 2:
        print(f"\nratio (median over neighbouring steps): {statistics.median(b / a for a, b in steps):.2f}")
    if memory := jax.devices()[0].memory_stats():
        print(f"peak device memory of codi_jax: {memory['peak_bytes_in_use'] / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
