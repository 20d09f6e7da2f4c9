"""Trains the UNet of a Stable Diffusion model on images and captions, and its text encoder if asked to.

python3 training_scripts/train_text_to_image_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/mine
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from codi_jax import command_line, optim, sharding, train
from codi_jax.data import DataFlags
from codi_jax.images import labelled_rows
from codi_jax.methods import denoising
from codi_jax.pretrained import (
    ModelFlags,
    load_batches,
    load_pretrained,
    modules_of,
    open_training_data,
    save_trained,
    trainable,
)
from codi_jax.validation import ValidationFlags, generate_with, validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(ModelFlags, train.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags):
    """Trains a text-to-image model."""

    train_text_encoder: bool = False
    """Train the text encoder too."""
    from_scratch: tuple[Literal["unet", "text_encoder"], ...] = ()
    """Networks that start from random parameters: only their config.json is read."""
    snr_gamma: float | None = None
    """Gamma of the min-SNR weights of the loss, usually 5. If left out: no weights. With a model that predicts v
    they leave the noisiest times next to untrained."""
    noise_offset: float = 0.0
    """Strength of a noise that is the same all over a channel."""
    input_perturbation: float = 0.0
    """Strength of further noise on the network's input."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet shall predict, if not what the model's scheduler says."""
    use_ema: bool = False
    """Keep a moving average of the parameters, and show and save that."""
    ema_decay: float = 0.9999
    """Its decay."""
    validation_sampling_steps: int = 50
    """Steps of the sampler for validation pictures."""
    guidance_scale: float = 7.5
    """Guidance scale of validation pictures."""


def main(args: Args) -> None:
    if "text_encoder" in args.from_scratch and not args.train_text_encoder:
        raise ValueError("--from_scratch text_encoder needs --train_text_encoder, or it stays random.")
    names = ("unet", "text_encoder") if args.train_text_encoder else ("unet",)
    run_config = {name: getattr(args, name) for name in _RUN_CONFIG}
    args = train.start(args, run_config)
    data = open_training_data(args)
    samples = validation_samples(args)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    untrained = {name: jax.random.fold_in(key, i) for i, name in enumerate(args.from_scratch)}
    pipeline = load_pretrained(args, mesh, untrained=untrained)
    if args.prediction_type is not None:
        pipeline.schedule = pipeline.schedule.with_config(prediction_type=args.prediction_type)
    batch_size = train.global_batch_size(args)
    loader = load_batches(args, pipeline, data, cache_text=not args.train_text_encoder)
    config = denoising.Config(
        modules_of(pipeline, names, args),
        args.snr_gamma,
        args.noise_offset,
        args.input_perturbation,
        args.ema_decay if args.use_ema else None,
        args.gradient_accumulation_steps,
    )
    optimizer = optim.make_optimizer(args, train.num_steps(args, loader.samples_per_epoch), batch_size=batch_size)
    params = {name: trainable(args, pipeline, name, mesh) for name in names}
    state = optim.init_state(params, optimizer, key, ema=args.use_ema, mixed_precision=args.mixed_precision)
    frozen = {name: params for name, params in pipeline.params.items() if name not in names}

    def validate(state: Any, step: int) -> dict[str, np.ndarray]:
        steps = args.validation_sampling_steps
        made = generate_with(pipeline, state.result, samples, steps=steps, guidance_scale=args.guidance_scale)
        return {"samples": labelled_rows({"data": samples.pictures, f"{steps} steps": made})}

    def export(state: Any, folder: Path) -> None:
        save_trained(args, pipeline, folder, {k: (pipeline.modules[k], v) for k, v in state.result.items()})

    train.train(
        functools.partial(denoising.train_step, config=config, optimizer=optimizer),
        state,
        {**frozen, "schedule": pipeline.schedule},
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
        run_config=run_config,
    )


_RUN_CONFIG = (
    "pretrained_model_name_or_path", "train_text_encoder", "from_scratch", "resolution",
    "gradient_accumulation_steps", "use_ema", "use_8bit_adam", "mixed_precision",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
