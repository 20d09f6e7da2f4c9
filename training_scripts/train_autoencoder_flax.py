"""Trains the autoencoder (VAE) of a latent diffusion model on images, from nothing or from one that exists.

python3 training_scripts/train_autoencoder_flax.py --model_config_name_or_path vae/config.json \
    --train_data_dir data/emoji/train --resolution 64 --train_batch_size 16 --max_train_steps 6000 --output_dir runs/vae
"""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from codi_jax import command_line, optim, sharding, train
from codi_jax.data import DataFlags, load_data
from codi_jax.methods import autoencoder
from codi_jax.validation import ValidationFlags, held_out, picture
from codi_jax.weights import ModelFolder, build_module, load_model, save_model

_HELD_OUT = 128  # images whose latents give the scaling factor


@dataclass(frozen=True)
class Args(train.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags):
    """Trains an autoencoder: images to latents and back."""

    pretrained_model_name_or_path: str | None = None
    """Model, or folder of an autoencoder, to start from."""
    model_config_name_or_path: str | None = None
    """The config.json of a new autoencoder, to start from random parameters."""
    rec_loss: Literal["l1", "l2"] = "l1"
    """Error of the reconstruction: mean absolute or mean squared."""
    kl_scale: float = 1e-6
    """Weight of the divergence of the latents from a standard normal distribution."""
    use_ema: bool = False
    """Keep a moving average of the parameters, and save that."""
    ema_decay: float = 0.999
    """Its decay."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which the autoencoder is saved."""


def main(args: Args) -> None:
    module, params = load(args)
    config = autoencoder.Config(
        module, args.rec_loss, args.kl_scale, args.ema_decay if args.use_ema else None, args.gradient_accumulation_steps
    )
    run_config = {"vae": module.config.to_dict(), **asdict(replace(config, vae=None))}
    args = train.start(args, run_config)
    mesh = sharding.make_mesh(args.fsdp)
    batch_size = train.global_batch_size(args)
    loader = load_data(
        args,
        _no_text,
        batch_size=batch_size,
        seed=args.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    num_steps = train.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=batch_size)
    key = jax.random.key(args.seed)
    if params is None:
        params = module.random_params(jax.random.fold_in(key, 1))
    state = optim.init_state(params, optimizer, key, ema=args.use_ema, mixed_precision=args.mixed_precision)
    pixels = jnp.asarray(held_out(args, _HELD_OUT).pictures)

    @jax.jit
    def reconstruct(state: Any) -> Any:
        return autoencoder.reconstruct(state.ema if args.use_ema else state.params, pixels, config)

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        shown, _ = reconstruct(state)
        rows = {"data": np.asarray(pixels), "reconstruction": np.asarray(shown)}
        return {"reconstruction": picture({name: row[: args.num_validation_images] for name, row in rows.items()})}

    def export(state: Any, folder: Path) -> None:
        _, latents = reconstruct(state)
        scaled = replace(module.config, scaling_factor=autoencoder.scaling_factor(latents))
        params = state.ema if args.use_ema else state.params
        save_model(folder, "vae", replace(module, config=scaled), params, dtype=args.save_dtype)

    train.train(
        functools.partial(autoencoder.train_step, config=config, optimizer=optimizer),
        state,
        {},
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
        run_config=run_config,
    )


def _no_text(captions: list[str]) -> dict[str, Any]:
    return {}


def load(args: Args) -> tuple[Any, Any]:
    """The module, and the parameters to start from or ``None``."""
    source, config = args.pretrained_model_name_or_path, args.model_config_name_or_path
    dtype = optim.compute_dtype(args.mixed_precision)
    if source is not None and config is None:
        subfolder = None if ModelFolder(source).find("config.json") else "vae"
        return load_model(source, subfolder, compute_dtype=dtype)
    if config is not None and source is None:
        folder = Path(config) if Path(config).is_dir() else Path(config).parent
        if Path(config).is_file() and Path(config).name != "config.json":
            raise ValueError(f"--model_config_name_or_path {config}: give a folder with a config.json, or that file.")
        return build_module(ModelFolder(str(folder)), dtype), None
    raise ValueError("give either --pretrained_model_name_or_path or --model_config_name_or_path.")


if __name__ == "__main__":
    command_line.run(Args, main)
