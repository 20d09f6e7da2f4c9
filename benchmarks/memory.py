"""Compiles a training step for absent devices, from shapes only, and reports the memory it takes.

    python3 benchmarks/memory.py --target h200 --resolution 1024 --batch 4      # pip install "jax[cuda12]"
    python3 benchmarks/memory.py --target v5e:4x4 --fsdp 16 --scan_layers       # pip install "jax[tpu]"
    python3 benchmarks/memory.py --method disback --target h200 --resolution 1024
    python3 benchmarks/memory.py --method disback --part generator --target v5e:4x8 --fsdp 32 --scan_layers

The packages are needed only for their compilers. The step is LCM's, or that of DisBack's second stage, with weights of
the published architecture as shapes only, and with latents and text cached. Nothing is executed. For a TPU, the memory
is read from the compiler's report as soon as it is allocated: generating the code would take hours and tens of GB.
"""

import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import disback, lcm
from codi_jax.models import sharding
from codi_jax.models.published import UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.conditions import Frozen, NullText
from codi_jax.pipeline.networks import Networks
from codi_jax.planning.chips import GPUS
from codi_jax.planning.programs import bytes_on_device, with_shardings
from codi_jax.planning.targets import open_target
from codi_jax.training import loop, optim
from codi_jax.training.method import Method, Setup

GIB = 2**30
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Args:
    """Compiles a training step ahead of time, in bfloat16."""

    method: Literal["lcm", "disback"] = "lcm"
    """The method whose step to compile."""
    part: Literal["generator", "fake_score"] | None = None
    """For DisBack, compile only this network's update, with the state of both. Default: the entire step."""
    config: Literal["sdxl-instruct-pix2pix", "sd-instruct-pix2pix", "sdxl-base", "sd-2.1", "sd-1.5"] | None = None
    """The published architecture of the teacher. Default: SDXL, an editor for LCM."""
    target: str = "h200"
    """h100, h200, or a TPU slice as its compiler names it, such as v5e:4x4."""
    devices: int | None = None
    """Number of devices of the slice to use. Default: all."""
    fsdp: int = 1
    """Number of devices to split parameters and optimizer over."""
    resolution: int = 768
    """Side of the images."""
    batch: int = 1
    """Samples per device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    scan_layers: bool = False
    """Compile consecutive transformer blocks as a loop."""
    use_8bit_adam: bool = False
    """Keep Adam's moments in 8 bits."""

    @property
    def architecture(self) -> str:
        return self.config or {"lcm": "sdxl-instruct-pix2pix", "disback": "sdxl-base"}[self.method]


@dataclass(frozen=True)
class Training:
    """A step with the shapes of its inputs, except the batch."""

    step: Callable[..., Any]
    state: Any
    frozen: Frozen


def main(args: Args) -> None:
    if args.part is not None and args.method != "disback":
        sys.exit(f"--part {args.part} is of no use with --method {args.method}: only the step of disback has parts.")
    with tempfile.TemporaryDirectory() as dump:
        compile_step(args, Path(dump))
    sys.stdout.flush()
    os._exit(0)  # a TPU's compiler is still running


def compile_step(args: Args, dump: Path) -> None:
    mesh = make_mesh(args, dump)
    networks = make_networks(args)
    training = {"lcm": lcm_training, "disback": disback_training}[args.method](args, networks)
    state = with_shardings(training.state, sharding.shardings(mesh, training.state))
    frozen = with_shardings(training.frozen, sharding.shardings(mesh, training.frozen))
    batch = abstract_batch(args, networks, mesh.size * args.batch)
    batch = with_shardings(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    step = loop.jit_step(training.step, state, mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, batch)
    began = time.perf_counter()
    needed = total(lowered.compile()) if args.target in GPUS else total_on_tpu(lowered, dump)
    report(args, mesh, bytes_on_device((state, frozen, batch)), needed, time.perf_counter() - began)


def lcm_training(args: Args, networks: Networks) -> Training:
    method: Method[Any, Any] = lcm.EDIT if networks.is_instruct_pix2pix else lcm.TEXT
    flags = lcm.LcmEditFlags(conditioning_dropout_prob=0.05) if networks.is_instruct_pix2pix else lcm.LcmTextFlags()
    setup = method.configure(networks, flags, remat=args.gradient_checkpointing)
    optimizer = make_optimizer(args)
    return abstract_training(method, setup, flags, optimizer, method.step(setup, optimizer))


def disback_training(args: Args, networks: Networks) -> Training:
    """Stage 2, the larger one: the generator, the fake score and a target."""
    flags, optimizers = disback.DisbackFlags(dfake_gen_update_ratio=5), (make_optimizer(args), make_optimizer(args))
    method = disback.backtracking(args.resolution, has_path=False)
    setup = method.configure(networks, flags, remat=args.gradient_checkpointing)
    parts = {None: disback.train_step, "generator": generator_train_step, "fake_score": fake_train_step}
    step = functools.partial(parts[args.part], setup=setup, optimizer=optimizers)
    return abstract_training(method, setup, flags, optimizers, step)


def abstract_training(
    method: Method[Any, Any], setup: Setup, flags: Any, optimizer: Any, step: Callable[..., Any]
) -> Training:
    """The step with the shapes of its state and the frozen networks: in half precision, except the encoders."""
    unet, schedule = setup.networks.unet.abstract_params(), teacher_schedule()
    state = jax.eval_shape(lambda params: method.init(setup, lambda _: params, optimizer, jax.random.key(0)), unet)
    stored = jax.tree.map(lambda leaf: shape(*leaf.shape), unet)
    frozen = Frozen(
        params={"unet": stored} if "unet" in setup.frozen else {},
        schedule=jax.eval_shape(lambda: method.sampling(schedule, flags)),
        teacher_schedule=jax.eval_shape(lambda: schedule),
        null_text=abstract_null_text(setup.networks.unet.config),
        target=stored if setup.target else None,
    )
    return Training(step, state, frozen)


def generator_train_step(
    state: Any, frozen: Any, batch: Any, *, setup: disback.DisbackSetup, optimizer: disback.Optimizers
) -> tuple[Any, Any]:
    """The first half of DisBack's step: its parts are smaller programs to compile, and run one after another."""
    generator, metrics = disback.generator_step(
        state.generator, state.fake.params, frozen, batch, setup=setup, optimizer=optimizer[0]
    )
    return disback.DisbackState(generator, state.fake), metrics


def fake_train_step(
    state: Any, frozen: Any, batch: Any, *, setup: disback.DisbackSetup, optimizer: disback.Optimizers
) -> tuple[Any, Any]:
    """The second half."""
    fake, metrics = disback.fake_step(
        state.fake, state.generator.params, frozen, batch, setup=setup, optimizer=optimizer[1]
    )
    return disback.DisbackState(state.generator, fake), metrics


def make_optimizer(args: Args) -> optax.GradientTransformation:
    return optim.make_optimizer(optim.OptimizerFlags(use_8bit_adam=args.use_8bit_adam), 1000)


def teacher_schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})


def make_mesh(args: Args, dump: Path) -> Mesh:
    """A mesh of absent devices, whose compiler writes its reports into the folder."""
    devices = open_target(args.target, dump).devices[: args.devices]
    shape = (len(devices) // args.fsdp, args.fsdp)
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def make_networks(args: Args) -> Networks:
    dtype = optim.compute_dtype("bf16")
    unet = UNet2DCondition(UNetConfig.from_dict(UNETS[args.architecture]), dtype=dtype, scan_layers=args.scan_layers)
    return Networks(unet, AutoencoderKL(VAEConfig.from_dict(VAE), dtype=dtype))


def abstract_null_text(config: UNetConfig) -> NullText:
    added = config.example_added_cond()
    pooled = shape(*added["text_embeds"].shape) if added else None
    return NullText(shape(1, TEXT_TOKENS, config.context_dims[0]), pooled)


def abstract_batch(args: Args, networks: Networks, size: int) -> dict[str, Any]:
    config = networks.unet.config
    batch = {"context": shape(size, TEXT_TOKENS, config.context_dims[0], dtype=jnp.float16)}
    if added := config.example_added_cond():
        batch["pooled"] = shape(size, added["text_embeds"].shape[1], dtype=jnp.float16)
        batch["time_ids"] = shape(size, added["time_ids"].shape[1], dtype=jnp.float32)
    side = latents_side(args, networks)
    moments = shape(size, side, side, 2 * networks.vae.config.latent_channels, dtype=jnp.float16)
    if networks.is_instruct_pix2pix:
        batch["conditioning_moments"] = moments
    return batch if args.method == "disback" else {**batch, "moments": moments}  # DisBack has only prompts


def latents_side(args: Args, networks: Networks) -> int:
    return args.resolution // networks.vae.config.downscale


def shape(*axes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def total(program: jax.stages.Compiled) -> int:
    """Bytes per device of the step's inputs, outputs and temporaries."""
    memory: Any = program.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + made


def total_on_tpu(lowered: jax.stages.Lowered, dump: Path) -> int:
    """The same, before code generation; a step that does not fit is refused before that."""
    compilation = ThreadPoolExecutor(1).submit(lowered.compile)
    while not wait([compilation], timeout=1).done:
        # The file that the compiler begins when the report is complete.
        for path in dump.glob("*train_step*.after_optimizations-buffer-assignment-values.txt"):
            text = path.with_name(path.name.replace("-values", "")).read_text()
            # Allocations in memories other than HBM have a color.
            return sum(int(size) for size in re.findall(r"^allocation \d+: size (\d+), (?!color)", text, re.MULTILINE))
    return total(compilation.result())


def report(args: Args, mesh: Mesh, given: int, needed: int, seconds: float) -> None:
    devices = f"{mesh.size} × {mesh.devices.flat[0].device_kind}, fsdp {args.fsdp}"
    method = args.method if args.part is None else f"{args.method} ({args.part})"
    print(f"{method}, {args.architecture}, {args.resolution} px, {args.batch} a device, {devices}")
    print(f"state and frozen networks  {given / GIB:8.2f} GiB a device")
    print(f"temporary                  {(needed - given) / GIB:8.2f} GiB a device")
    print(f"in all                     {needed / GIB:8.2f} GiB a device")
    print(f"compiled in                {seconds:8.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
