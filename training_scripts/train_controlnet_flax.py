"""Trains a ControlNet: a Stable Diffusion model learns to follow condition images, and stays as it is without them.

python3 training_scripts/train_controlnet_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/controlnet
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codi_jax import command_line, optim, sharding, train
from codi_jax.data import DataFlags
from codi_jax.images import labelled_rows
from codi_jax.methods import denoising
from codi_jax.methods.inputs import add_controlnet, init_controlnet
from codi_jax.pretrained import (
    ConditionFlags,
    ModelFlags,
    load_batches,
    load_pretrained,
    modules_of,
    open_training_data,
    save_trained,
    trainable,
    with_controlnet,
)
from codi_jax.validation import ValidationFlags, generate_with, validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(ModelFlags, ConditionFlags, train.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags):
    """Trains a ControlNet on a frozen text-to-image model."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet to go on training. If left out: a new one, a copy of the UNet's encoder."""
    snr_gamma: float | None = None
    """Gamma of the min-SNR weights of the loss, usually 5. If left out: no weights. With a model that predicts v
    they leave the noisiest times next to untrained."""
    use_ema: bool = False
    """Keep a moving average of the parameters, and show and save that."""
    ema_decay: float = 0.9999
    """Its decay."""
    validation_sampling_steps: int = 50
    """Steps of the sampler for validation pictures."""
    guidance_scale: float = 7.5
    """Guidance scale of validation pictures."""


def main(args: Args) -> None:
    run_config = {name: getattr(args, name) for name in _RUN_CONFIG}
    args = train.start(args, run_config)
    data = open_training_data(args, args.condition)
    samples = validation_samples(args, args.condition)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    pipeline = load_pretrained(args, mesh, args.controlnet_model_name_or_path)
    loader = load_batches(args, pipeline, data, args.condition)
    modules = modules_of(pipeline, ("controlnet",), args)
    if modules.controlnet is None:
        modules = add_controlnet(modules)
        params = init_controlnet(modules, trainable(args, pipeline, "unet", mesh), jax.random.fold_in(key, 0))
    else:
        params = trainable(args, pipeline, "controlnet", mesh)
    pipeline = with_controlnet(pipeline, modules.controlnet)
    ema_decay = args.ema_decay if args.use_ema else None
    config = denoising.Config(
        modules, args.snr_gamma, ema_decay=ema_decay, accumulation=args.gradient_accumulation_steps
    )
    num_steps = train.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=train.global_batch_size(args))
    state = optim.init_state(
        {"controlnet": params}, optimizer, key, ema=args.use_ema, mixed_precision=args.mixed_precision
    )

    def validate(state: Any, step: int) -> dict[str, np.ndarray]:
        steps = args.validation_sampling_steps
        made = generate_with(pipeline, state.result, samples, steps=steps, guidance_scale=args.guidance_scale)
        rows = {"condition": samples.conditions, f"{steps} steps": made, "data": samples.pictures}
        return {"samples": labelled_rows(rows)}

    def export(state: Any, folder: Path) -> None:
        save_trained(args, pipeline, folder, {"controlnet": (modules.controlnet, state.result["controlnet"])})

    train.train(
        functools.partial(denoising.train_step, config=config, optimizer=optimizer),
        state,
        {**pipeline.params, "schedule": pipeline.schedule},
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
        run_config=run_config,
    )


_RUN_CONFIG = (
    "pretrained_model_name_or_path", "controlnet_model_name_or_path", "task", "resolution",
    "gradient_accumulation_steps", "use_ema", "use_8bit_adam", "mixed_precision",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
