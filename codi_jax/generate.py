"""``python3 -m codi_jax.generate``: images from a Stable Diffusion model or a distilled student."""

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from codi_jax.images import check_output, open_image, save_images
from codi_jax.models.attention import Implementation
from codi_jax.pipeline import DiffusionPipeline
from codi_jax.sampling import Sampler

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_LONG_RUN = 10  # steps from which a progress bar is worth its line


@dataclass(frozen=True)
class Args:
    """Generates images. The task follows from the model: text to image, edit (InstructPix2Pix) or inpaint."""

    model: str
    """Folder of the model in diffusers' layout, or its id on the Hugging Face Hub."""
    prompt: str
    """What to show; for an InstructPix2Pix model, what to change."""
    output: Path = Path("out.png")
    """File to write. Several images make a grid there, and single files out_0.png, out_1.png, ... beside it."""
    negative_prompt: str | None = None
    """What to lead away from."""
    image: str | None = None
    """File or URL of the image to edit or to paint into."""
    mask_image: str | None = None
    """Where an inpainting model paints: white."""
    control_image: str | None = None
    """The ControlNet's condition, such as an image of edges."""
    controlnet: str | None = None
    """Folder or id of a ControlNet."""
    lora: tuple[str, ...] = ()
    """LoRA files, folders or ids to merge into the model."""
    lora_scale: float = 1.0
    """A factor on every LoRA."""
    steps: int | None = None
    """Steps of the sampler. If left out: 4 for students (samplers lcm and codi), 50 for the others."""
    guidance_scale: float = 7.5
    """How strongly to follow the prompt; 1 is no guidance, which takes half the time."""
    image_guidance_scale: float = 1.5
    """How strongly to keep to the image, for InstructPix2Pix; at 1 a step takes two passes instead of three."""
    controlnet_conditioning_scale: float = 1.0
    """How strongly to follow the control image."""
    sampler: Sampler | None = None
    """If left out, what the model's folder says."""
    timesteps: tuple[int, ...] = ()
    """Descending training times to sample at, instead of --steps."""
    seed: int = 0
    """Of the first image; the next ones have the next seeds."""
    num_images: int = 1
    """How many images to make."""
    batch_size: int | None = None
    """How many of them at a time; all if left out."""
    height: int | None = None
    """In pixels; if left out, that of the given image or the model's own."""
    width: int | None = None
    """In pixels; if left out, that of the given image or the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and computation. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    attention: Implementation = "auto"
    """The attention kernel."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    ccache: Path | None = Path("~/.cache/codi_jax/xla")
    """Folder for compiled programs, which makes the next start faster; None to keep none."""


def run(args: Args) -> list[Path]:
    """Loads the model, generates, writes the images, and prints what it took.

    Returns:
      The files written.

    Raises:
      ValueError: if arguments do not fit each other or the model; also its kinds `WeightsError` and `ConfigError`.
      FileNotFoundError: if an image is not there.
      FloatingPointError: if the model gives NaN.
    """
    check_output(args.output)
    if args.num_images < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise ValueError("--num_images and --batch_size must be at least 1.")
    if args.controlnet is None and args.control_image is not None:
        print("No --controlnet is given: the one in the model's folder is used.", file=sys.stderr)
    given = {"image": args.image, "mask_image": args.mask_image, "control_image": args.control_image}
    pictures = {name: open_image(source) for name, source in given.items() if source is not None}
    keep_compiled_programs(args.ccache)
    pipeline = _load(args)
    images, compile_seconds, seconds = [], 0.0, 0.0
    batch_size = min(args.batch_size or args.num_images, args.num_images)
    for start in range(0, args.num_images, batch_size):
        images.append(_generate_batch(pipeline, args, pictures, args.seed + start, batch_size))
        compile_seconds += pipeline.compile_seconds
        seconds += pipeline.seconds
    made = np.concatenate(images)
    files = save_images(args.output, made[: args.num_images])
    device = jax.devices()[0]
    print(
        f"{seconds / len(made):.2f} seconds per image ({len(made)} in {seconds:.1f} s on {device.device_kind}), "
        f"compilation {compile_seconds:.1f} s apart"
    )
    print("wrote " + ", ".join(map(str, files)))
    return files


def keep_compiled_programs(folder: Path | None) -> None:
    """Makes JAX keep compiled programs in ``folder``; an environment variable of JAX's own goes first."""
    if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))


def _load(args: Args) -> DiffusionPipeline:
    half = jax.default_backend() != "cpu"
    return DiffusionPipeline.from_pretrained(
        args.model,
        args.controlnet,
        args.lora,
        dtype=(jnp.bfloat16 if half else jnp.float32) if args.dtype == "auto" else _DTYPES[args.dtype],
        lora_scale=args.lora_scale,
        attention=args.attention,
        revision=args.revision,
        variant=args.variant,
    )


def _generate_batch(
    pipeline: DiffusionPipeline, args: Args, pictures: dict[str, Any], seed: int, batch_size: int
) -> np.ndarray:
    # The last batch is as large as the others: a smaller one would be compiled anew.
    steps = len(args.timesteps) or args.steps
    with tqdm(total=steps, unit="step", disable=steps is not None and steps < _LONG_RUN, leave=False) as bar:
        on_step: Callable[[int], None] = lambda step: bar.update(step + 1 - bar.n)  # noqa: E731
        return pipeline(
            [args.prompt] * batch_size,
            **pictures,
            negative_prompt=args.negative_prompt,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
            controlnet_conditioning_scale=args.controlnet_conditioning_scale,
            sampler=args.sampler,
            timesteps=args.timesteps or None,
            height=args.height,
            width=args.width,
            seed=seed,
            on_step=on_step,
        )


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, use_underscores=True)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        run(args)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
