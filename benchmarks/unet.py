"""Times the UNet, forward and forward + backward, against PyTorch in the same run.

    python3 benchmarks/unet.py --config sd-1.5
    python3 benchmarks/unet.py --config sdxl-base --device gpu --dtype bfloat16 --batch 4

The two libraries take turns, so that a machine whose speed drifts slows both; the table gives medians, and the ratio is
the median of the ratios of neighboring runs. Weights are random: they do not affect the time.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.published import UNETS
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Args:
    """Times the UNet against PyTorch."""

    config: Literal["sd-1.5", "sd-2.1", "sdxl-base", "small-sd", "tiny-sd"] = "sd-1.5"
    """The published architecture, at its own resolution."""
    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    """The device; PyTorch runs on cpu and gpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation, in both libraries."""
    attention: Implementation = "auto"
    """Our attention kernel; PyTorch always uses scaled_dot_product_attention."""
    batch: int = 1
    """Samples at a time."""
    latents: int | None = None
    """Height and width of the latents, if not the architecture's own."""
    repeats: int = 5
    """Timed runs of each, after an uncounted one."""
    backward: bool = True
    """Whether to time forward + backward as well."""
    remat: bool = False
    """Whether ours recomputes activations in the backward pass."""
    pytorch: bool = True
    """Whether to run PyTorch at all."""


Run = Callable[[], None]


def jax_runs(args: Args, config: UNetConfig) -> tuple[dict[str, Run], dict[str, float]]:
    """Our forward and forward + backward pass, compiled, and the compile time in seconds."""
    device = jax.devices(args.device)[0]
    dtype = jnp.dtype(args.dtype)
    module = UNet2DCondition(config, dtype, args.attention, args.remat)
    rng = np.random.default_rng(0)

    def weight(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, dtype=np.float32) * 0.02
        return jax.device_put(values.astype(dtype), device)

    params = jax.tree.map(weight, module.abstract_params())
    inputs = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), numpy_inputs(args, config)), device)

    def forward(params: Any, inputs: dict[str, Any]) -> jax.Array:
        return module.apply({"params": params}, **inputs)[0]

    def loss(params: Any, inputs: dict[str, Any]) -> jax.Array:
        return jnp.mean(forward(params, inputs).astype(jnp.float32) ** 2)

    functions = {"forward": forward} | ({"forward + backward": jax.grad(loss)} if args.backward else {})
    runs, compile_seconds = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(params, inputs).compile()
        compile_seconds[name] = time.perf_counter() - start
        runs[name] = lambda compiled=compiled: jax.block_until_ready(compiled(params, inputs))
    return runs, compile_seconds


def torch_runs(args: Args, config: UNetConfig) -> dict[str, Run]:
    """The same in PyTorch diffusers, eager, as its users run it."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    device = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config.to_dict())
    model = model.to(getattr(torch, args.dtype)).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inputs = jax.tree.map(
        lambda x: torch.from_numpy(x).to(device, getattr(torch, args.dtype)), numpy_inputs(args, config)
    )
    inputs["sample"] = inputs["sample"].permute(0, 3, 1, 2).contiguous()
    inputs["timestep"] = inputs.pop("timesteps")
    inputs["added_cond_kwargs"] = inputs.pop("added_cond", None)
    synchronise = torch.cuda.synchronize if device == "cuda" else contextlib.nullcontext

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)
        synchronise()

    def backward() -> None:
        model(**inputs).sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        synchronise()

    return {"forward": forward} | ({"forward + backward": backward} if args.backward else {})


def numpy_inputs(args: Args, config: UNetConfig) -> dict[str, Any]:
    """Random inputs: NHWC latents, times, text, and SDXL's extra conditions."""
    rng = np.random.default_rng(0)
    side = latent_side(args, config)
    inputs: dict[str, Any] = {
        "sample": rng.standard_normal((args.batch, side, side, config.in_channels), dtype=np.float32),
        "timesteps": np.full(args.batch, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal(
            (args.batch, TEXT_TOKENS, config.context_dims[0]), dtype=np.float32
        ),
    }
    added = config.example_added_cond()
    if added is not None:
        inputs["added_cond"] = {
            name: np.broadcast_to(value, (args.batch, *value.shape[1:])).astype(np.float32)
            for name, value in added.items()
        }
    return inputs


def latent_side(args: Args, config: UNetConfig) -> int:
    """Height and width of the latents."""
    side = args.latents or config.sample_size
    assert isinstance(side, int)
    return side


def timed(run: Run) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours: Run, theirs: Run | None, repeats: int) -> tuple[float, float | None, float | None]:
    """Medians of both, and the median of the ratios of neighboring runs, ours to theirs."""
    ours()
    if theirs is None:
        return statistics.median(timed(ours) for _ in range(repeats)), None, None
    theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(a / b for a, b in pairs)


def main() -> None:
    """Runs the benchmark and prints the table."""
    args = tyro.cli(Args, use_underscores=True)
    config = UNetConfig.from_dict(UNETS[args.config])
    if args.pytorch and args.device == "tpu":
        sys.exit("error: PyTorch does not run on TPU here: add --no-pytorch.")
    runs, compile_seconds = jax_runs(args, config)
    other = torch_runs(args, config) if args.pytorch else {}
    side = latent_side(args, config)
    device = jax.devices(args.device)[0].device_kind
    print(
        f"{args.config}, {side} x {side} latents, batch {args.batch}, {args.dtype}, {device}, JAX {jax.__version__}\n"
    )
    print(f"| {'pass':18} | codi_jax, s | PyTorch, s | ratio | samples/s | compilation, s |")
    print(f"|{'-' * 20}|------------:|-----------:|------:|----------:|---------------:|")
    for name, run in runs.items():
        gc.collect()
        mine, theirs, ratio = compare(run, other.get(name), args.repeats)
        shown = (f"{theirs:10.3f}", f"{ratio:5.2f}") if theirs is not None else (f"{'-':>10}", f"{'-':>5}")
        print(
            f"| {name:18} | {mine:11.3f} | {shown[0]} | {shown[1]} | {args.batch / mine:9.2f} | "
            f"{compile_seconds[name]:14.1f} |"
        )
    if memory := jax.devices(args.device)[0].memory_stats():
        print(f"\npeak device memory of codi_jax: {memory['peak_bytes_in_use'] / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
