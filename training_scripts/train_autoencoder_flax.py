"""Trains the autoencoder (VAE) of a latent diffusion model on images, from nothing or from one that exists.

The data needs no captions: a folder of images will do.

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

from codi_jax.cli import command_line
from codi_jax.cli.flags import Adjustable
from codi_jax.data import DataFlags, load_data, open_data
from codi_jax.io.hub import ModelFolder
from codi_jax.io.images import labeled_rows
from codi_jax.io.weights import build_module, load_model, save_model
from codi_jax.methods import autoencoder
from codi_jax.models import sharding
from codi_jax.models.vae import AutoencoderKL
from codi_jax.training import loop, optim
from codi_jax.training.validation import ValidationFlags, held_out

_HELD_OUT = 128  # images whose latents give the scaling factor


@dataclass(frozen=True)
class Args(loop.LoopFlags, optim.OptimizerFlags, optim.EmaFlags, DataFlags, ValidationFlags):
    """Trains an autoencoder: images to latents and back."""

    pretrained_model_name_or_path: str | None = None
    """Model, or folder of an autoencoder, to start from."""
    revision: str | None = None
    """Branch, tag or commit of it on the hub."""
    variant: str | None = None
    """Variant of its weight files, such as fp16."""
    model_config_name_or_path: Adjustable[str | None] = None
    """The config.json of a new autoencoder, to start from random parameters."""
    rec_loss: Literal["l1", "l2"] = "l1"
    """Error of the reconstruction: mean absolute or mean squared."""
    kl_scale: float = 1e-6
    """Weight of the divergence of the latents from a standard normal distribution."""
    gradient_checkpointing: Adjustable[bool] = False
    """Recompute activations in the backward pass: slower, in less memory."""
    save_dtype: Adjustable[Literal["float32", "float16", "bfloat16"]] = "float32"
    """Precision in which the autoencoder is saved."""

    def check(self) -> None:
        for flag in ("validation_prompt", "validation_image"):
            if getattr(self, flag):
                raise ValueError(f"--{flag} has no place here: give --validation_data_dir, a folder of images to show.")
        super().check()
        self.require_at_least(0, "kl_scale")


def main(args: Args) -> None:
    args.check()
    folder, has_weights = source_of(args)
    module = build_module(folder, optim.compute_dtype(args.mixed_precision), remat=args.gradient_checkpointing)
    if not isinstance(module, AutoencoderKL):
        raise ValueError(f"{folder} is a {type(module).__name__}, not an autoencoder.")
    args.check_resolution(module.config.downscale, f"the autoencoder {folder}")
    config = autoencoder.Config(
        module, args.rec_loss, args.kl_scale, args.decay_if_kept, args.gradient_accumulation_steps
    )
    run_config = {"vae": module.config.to_dict(), **asdict(replace(config, vae=None))}
    args = loop.start(args, run_config)
    batch_size = loop.global_batch_size(args)
    data = open_data(args, batch_size=batch_size, has_text=False)
    samples = held_out(args, _HELD_OUT, has_text=False)
    mesh, key = sharding.make_mesh(args.fsdp), jax.random.key(args.seed)
    loader = load_data(
        args,
        None,
        batch_size=batch_size,
        seed=args.seed,
        source=data,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    num_steps = loop.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=batch_size)
    if has_weights:
        _, params = load_model(
            folder.source,
            folder.subfolder,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            place=sharding.place(mesh),
        )
    else:
        params = module.random_params(jax.random.fold_in(key, 1))
    state = optim.init_state(params, optimizer, key, ema=args.use_ema, mixed_precision=args.mixed_precision)

    @jax.jit
    def of_all(params: Any, pixels: Any) -> Any:
        def of_one(image: Any) -> Any:
            return jax.tree.map(lambda x: x[0], autoencoder.reconstruct(params, image[None], config))

        return jax.lax.map(of_one, pixels, batch_size=args.train_batch_size)

    def reconstruct(state: Any) -> tuple[np.ndarray, np.ndarray]:
        return sharding.fetch(of_all(state.result, samples.pictures))

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        rows = {"data": samples.pictures, "reconstruction": reconstruct(state)[0]}
        return {"reconstruction": labeled_rows({name: row[: args.num_validation_images] for name, row in rows.items()})}

    def export(state: Any, folder: Path) -> None:
        latents = jnp.asarray(reconstruct(state)[1])
        scaled = replace(module.config, scaling_factor=autoencoder.scaling_factor(latents))
        save_model(folder, "vae", replace(module, config=scaled), state.result, dtype=args.save_dtype)

    loop.train(
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


def source_of(args: Args) -> tuple[ModelFolder, bool]:
    """The folder with the autoencoder's config.json, and whether to start from its weights, too."""
    source, config = args.pretrained_model_name_or_path, args.model_config_name_or_path
    if source is not None and config is None:
        folder = ModelFolder(str(Path(source).expanduser()), None, args.revision, args.cache_dir)
        return folder if folder.find("config.json") else folder.part("vae"), True
    if config is not None and source is None:
        path = Path(config).expanduser()
        if not path.exists():
            raise ValueError(f"there is no file {config}: check --model_config_name_or_path.")
        if path.is_file() and path.name != "config.json":
            raise ValueError(f"--model_config_name_or_path {config}: give a folder with a config.json, or that file.")
        return ModelFolder(str(path if path.is_dir() else path.parent)), False
    raise ValueError("give either --pretrained_model_name_or_path or --model_config_name_or_path.")


if __name__ == "__main__":
    command_line.run(Args, main)
