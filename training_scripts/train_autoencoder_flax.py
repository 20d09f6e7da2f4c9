"""Trains the autoencoder (VAE) of a latent diffusion model on images, from scratch or from an existing one.

The data needs no captions: a folder of images is enough.

python3 training_scripts/train_autoencoder_flax.py --model_config_name_or_path vae/config.json \
    --train_data_dir data/avatars/train --resolution 64 --train_batch_size 16 --max_train_steps 6000 \
    --output_dir runs/vae
"""

from dataclasses import dataclass

from codi_jax.cli import command_line
from codi_jax.methods import autoencoder
from codi_jax.training.jobs.autoencoder import HOOKS, VaeFlags, open_vae
from codi_jax.training.run import run


@dataclass(frozen=True, kw_only=True)
class Args(autoencoder.AutoencoderFlags, VaeFlags):
    """Trains an autoencoder: images to latents and back."""


def main(args: Args) -> None:
    args.check()
    vae = open_vae(args).networks.vae  # the VAE is part of the run's identity; refused before a folder is created
    run(autoencoder.METHOD, args, hooks=HOOKS, identity={"vae": vae.config.to_dict()})


if __name__ == "__main__":
    command_line.run(Args, main)
