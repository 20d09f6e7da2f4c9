"""Trains InstructPix2Pix: a Stable Diffusion model (1.x, 2.x or SDXL) learns to edit images by instruction.

python3 training_scripts/train_instruct_pix2pix_flax.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name timbrooks/instructpix2pix-clip-filtered --original_image_column original_image \
    --resolution 256 --train_batch_size 4 --conditioning_dropout_prob 0.05 --mixed_precision bf16 --output_dir runs/edit
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codi_jax import command_line, optim, sharding, train
from codi_jax.images import labelled_rows
from codi_jax.methods import denoising
from codi_jax.methods.inputs import widen_for_edits
from codi_jax.pretrained import (
    EditFlags,
    ModelFlags,
    load_batches,
    load_pretrained,
    modules_of,
    null_text_of,
    open_training_data,
    require_editor,
    save_trained,
    trainable,
)
from codi_jax.validation import ValidationFlags, generate_with, validation_samples


@dataclass(frozen=True, kw_only=True)
class Args(ModelFlags, train.LoopFlags, optim.OptimizerFlags, EditFlags, ValidationFlags):
    """Trains an editor on pairs of images and instructions."""

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
    """Guidance scale of the text in validation pictures."""
    image_guidance_scale: float = 1.5
    """Guidance scale of the image in validation pictures."""


def main(args: Args) -> None:
    run_config = {name: getattr(args, name) for name in _RUN_CONFIG}
    args = train.start(args, run_config)
    data = open_training_data(args, args.condition)
    samples = validation_samples(args, args.condition)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    pipeline = load_pretrained(args, mesh)
    unet, params = pipeline.modules["unet"], trainable(args, pipeline, "unet", mesh)
    if pipeline.task == "text-to-image":
        unet, params = widen_for_edits(unet, params)
    pipeline = dataclasses.replace(
        pipeline, modules=pipeline.modules | {"unet": unet}, params=pipeline.params | {"unet": params}
    )
    require_editor(pipeline)
    loader = load_batches(args, pipeline, data, args.condition)
    config = denoising.Config(
        modules_of(pipeline, ("unet",), args),
        args.snr_gamma,
        ema_decay=args.ema_decay if args.use_ema else None,
        accumulation=args.gradient_accumulation_steps,
        dropout=args.conditioning_dropout_prob,
    )
    num_steps = train.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=train.global_batch_size(args))
    state = optim.init_state({"unet": params}, optimizer, key, ema=args.use_ema, mixed_precision=args.mixed_precision)
    null_text = null_text_of(pipeline)
    del pipeline.params["unet"], params  # those that are trained are in the state

    def validate(state: Any, step: int) -> dict[str, np.ndarray]:
        scales = {"guidance_scale": args.guidance_scale, "image_guidance_scale": args.image_guidance_scale}
        steps = args.validation_sampling_steps
        made = generate_with(pipeline, state.result, samples, steps=steps, **scales)
        rows = {"source": samples.conditions, f"{steps} steps": made, "wanted": samples.pictures}
        return {"samples": labelled_rows(rows)}

    def export(state: Any, folder: Path) -> None:
        save_trained(args, pipeline, folder, {"unet": (pipeline.modules["unet"], state.result["unet"])})

    train.train(
        functools.partial(denoising.train_step, config=config, optimizer=optimizer),
        state,
        {**pipeline.params, **null_text, "schedule": pipeline.schedule},
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
        run_config=run_config,
    )


_RUN_CONFIG = (
    "pretrained_model_name_or_path", "resolution", "conditioning_dropout_prob", "gradient_accumulation_steps",
    "use_ema", "use_8bit_adam", "mixed_precision",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
