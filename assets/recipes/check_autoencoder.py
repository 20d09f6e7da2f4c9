"""Measures which attributes of avatars survive an autoencoder: no model on its latents can draw what it loses.

    python3 assets/recipes/check_autoencoder.py --vae runs/avatars/vae/vae

Also writes pictures of held-out avatars above their reconstructions.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from train_reader import drawn, report

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.evaluation.attributes import READER, Reader
from codi_jax.evaluation.features import in_batches
from codi_jax.io.weights import load_model
from codi_jax.methods.autoencoder import reconstruct


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    """Reads attributes off an autoencoder's reconstructions."""

    vae: Path
    """Folder of the autoencoder."""
    reader: Path = READER
    """Folder of the reader."""
    num_validation: int = 2_000
    """Held-out pictures."""
    picture: Path | None = None
    """File of the comparison."""


def main(args: Args) -> None:
    args.check()
    vae, params = load_model(args.vae)
    decode = jax.jit(lambda pixels: reconstruct(vae, params, pixels)[0])
    pixels, looks = drawn(10**6, args.num_validation)
    reconstructions = in_batches(decode, 50)(pixels)
    error = np.square(reconstructions.astype(np.float64) - pixels).mean(axis=(1, 2, 3))
    print(f"PSNR: {np.mean(10 * np.log10(255**2 / error)):.2f} dB")
    print(report(Reader(args.reader), reconstructions, looks))
    if args.picture is not None:
        rows = [np.concatenate(list(images[start : start + 12]), axis=1)
                for start in (0, 12) for images in (pixels, reconstructions)]  # fmt: skip
        picture = Image.fromarray(np.concatenate(rows))
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(args.picture)


if __name__ == "__main__":
    command_line.run(Args, main)
