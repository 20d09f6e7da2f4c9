"""Trains the UNet of a Stable Diffusion model on images and captions, and its text encoder if asked to.

python3 training_scripts/train_text_to_image_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --train_data_dir data/mine --resolution 512 --train_batch_size 4 --mixed_precision bf16 --output_dir runs/mine
"""

from dataclasses import dataclass
from typing import Literal

import jax

from codi_jax.cli import command_line
from codi_jax.data import DataFlags
from codi_jax.models import sharding
from codi_jax.training import loop
from codi_jax.training.denoising_training import DenoisingTrainingFlags, denoise
from codi_jax.training.pretrained import load_batches, load_pretrained, open_training_data, trainable
from codi_jax.training.validation import validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(DenoisingTrainingFlags, DataFlags):
    """Trains a text-to-image model."""

    train_text_encoder: bool = False
    """Train the text encoder too."""
    from_scratch: tuple[Literal["unet", "text_encoder"], ...] = ()
    """Networks that start from random parameters: only their config.json is read."""
    noise_offset: float = 0.0
    """Strength of a noise that is the same all over a channel."""
    input_perturbation: float = 0.0
    """Strength of further noise on the network's input."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet shall predict, if not what the model's scheduler says."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "noise_offset", "input_perturbation")


def main(args: Args) -> None:
    if "text_encoder" in args.from_scratch and not args.train_text_encoder:
        raise ValueError("--from_scratch text_encoder needs --train_text_encoder, or it stays random.")
    names = ("unet", "text_encoder") if args.train_text_encoder else ("unet",)
    args = loop.start(args)
    data = open_training_data(args)
    samples = validation_samples(args)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    untrained = {name: jax.random.fold_in(key, i) for i, name in enumerate(args.from_scratch)}
    pipeline = load_pretrained(args, mesh, untrained=untrained)
    if args.prediction_type is not None:
        pipeline.schedule = pipeline.schedule.with_config(prediction_type=args.prediction_type)
    loader = load_batches(args, pipeline, data, cache_text=not args.train_text_encoder)
    pipeline.params |= {name: trainable(pipeline, name, mesh) for name in names}
    denoise(
        args, pipeline, names, loader, samples, mesh,
        noise_offset=args.noise_offset, input_perturbation=args.input_perturbation,
    )  # fmt: skip


if __name__ == "__main__":
    command_line.run(Args, main)
