"""``python3 -m codi_jax.generate``: generates images with a Stable Diffusion model or a distilled student."""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from codi_jax.cli import command_line
from codi_jax.cli.flags import LARGEST_SEED, LARGEST_SIDE, Flags, Topic
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.io.images import check_output, open_image, save_images
from codi_jax.models import sharding
from codi_jax.pipeline.loading import resolve_dtype
from codi_jax.pipeline.machine_flags import MachineFlags
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.planned import plan_sampling
from codi_jax.planning.report import report
from codi_jax.planning.targets import open_target

_LONG_RUN = 10  # number of steps that makes a progress bar worthwhile


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
    """Which model, and what is added to it."""

    topic: ClassVar[Topic] = Topic.MODEL

    model: str
    """Folder of the model in diffusers' layout, its id (owner/name) on the Hugging Face Hub, or a single .safetensors
    or .ckpt file."""
    controlnet: tuple[str, ...] = ()
    """Folder or id of a ControlNet, or of several, whose outputs add up. Default: the one in the model's folder, if
    any."""
    unet: str | None = None
    """Another UNet for the model, such as a published student's: a file with its weights, also as
    owner/name/file.safetensors, or the folder or id of a UNet or model with a configuration of its own."""
    lora: tuple[str, ...] = ()
    """LoRA files, folders or ids to merge into the model, each with a scale of its own if one follows:
    style.safetensors:0.7 detail.safetensors:0.4. A file in a repository is owner/name/file.safetensors."""
    lora_scale: float = 1.0
    """Strength of every LoRA, besides its own scale."""
    textual_inversion: tuple[str, ...] = ()
    """Files, folders or ids with words that were learned by textual inversion, each with the word to use for it if one
    follows: easynegative.safetensors:<bad>. Default: the file's own word, or its name."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, for every part of the model and the ControlNet that has it."""
    single_file_config: str | None = None
    """For a model in a single file: a folder or id in diffusers' layout, whose configurations and vocabulary it takes.
    Default: a repository of its family."""


@dataclass(frozen=True, kw_only=True)
class InputFlags(Flags):
    """What the model is given."""

    topic: ClassVar[Topic] = Topic.INPUT

    prompt: str
    """Description of the image, or for an InstructPix2Pix model the edit instruction."""
    negative_prompt: str | None = None
    """Description of what to avoid."""
    long_prompts: bool = False
    """Read prompts of more than 77 tokens in chunks instead of cutting them off."""
    weighted_prompts: bool = False
    """Read (word:1.2), (word) and [word] as weights of words, as A1111's web UI does; prompts may be long, too."""
    image: str | None = None
    """File or URL of the image to start from, to edit or to paint into."""
    mask_image: str | None = None
    """File or URL of the mask, white where to paint; the rest of --image stays."""
    strength: float | None = None
    """How much of --image to change, from 0 to 1: this part of the steps is taken. Default: 0.8, or 1 with
    --mask_image."""
    control_image: tuple[str, ...] = ()
    """File or URL of the ControlNet's condition, such as an image of edges; one for each ControlNet."""
    controlnet_conditioning_scale: tuple[float, ...] = (1.0,)
    """Strength of the ControlNet, or of each of several."""
    control_guidance_start: tuple[float, ...] = (0.0,)
    """Part of the steps after which the ControlNet takes part, from 0 to 1; one number, or one for each."""
    control_guidance_end: tuple[float, ...] = (1.0,)
    """Part of the steps after which the ControlNet no longer takes part; one number, or one for each."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """How the model is sampled."""

    topic: ClassVar[Topic] = Topic.SAMPLING

    steps: int | None = None
    """Steps of the sampler. Default: 4 for students (samplers lcm, tcd and codi), as many as it was trained for for a
    one-step or few-step generator, 50 for other models."""
    guidance_scale: float | None = None
    """Classifier-free guidance on the prompt; 1 disables it and halves the time. Default: 7.5, or 1 for a one-step or
    few-step generator."""
    image_guidance_scale: float | None = None
    """Guidance on the input image, for InstructPix2Pix; at 1, a step takes two passes instead of three. Default: 1.5,
    or 1 for a one-step or few-step generator."""
    guidance_rescale: float = 0.0
    """Takes back the contrast that a high --guidance_scale adds, from 0 (not at all) to 1 (Lin et al., 2024)."""
    sampler: SamplerName | None = None
    """Sampler. Default: from the model's folder."""
    scheduler_config: tuple[str, ...] = ()
    """Entries of scheduler_config.json to change, such as timestep_spacing=trailing or use_karras_sigmas=true."""
    gamma: float = 0.3
    """Randomness of the sampler tcd, from 0 (none) to 1 (as in lcm)."""
    eta: float = 0.0
    """Randomness of the sampler ddim, from 0 (none) to 1 (as DDPM)."""
    timesteps: tuple[int, ...] = ()
    """Descending training timesteps to sample at instead of --steps, such as 399 for a one-step generator."""
    seed: int = 0
    """Seed of the first image; the others have the following seeds, regardless of the batch size."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    """How many images of which size, and where they go."""

    topic: ClassVar[Topic] = Topic.OUTPUT

    output: Path = Path("out.png")
    """Image file to write. Several images are written as a grid, plus one by one next to it as out_0.png, out_1.png,
    ..."""
    num_images: int = 1
    """Number of images to generate."""
    batch_size: int | None = None
    """Images generated at a time. Default: all."""
    height: int | None = None
    """In pixels. Default: the size of --image or --control_image, or the model's native size."""
    width: int | None = None
    """In pixels. Default: the size of --image or --control_image, or the model's native size."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Flags):
    """Planning instead of generating."""

    topic: ClassVar[Topic] = Topic.PLAN

    plan: str | None = None
    """Plan instead of generating: compile for these devices, which need not be here, and say what memory and time a
    batch takes: cpu, cpu:8, gpu (the one that is here), h100, h200:8, or a TPU slice such as v5e:2x2. Reads no weights.
    The exit status is 3 if it does not fit."""
    plan_output: Path = Path("outputs/plan.json")
    """File for the plan, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Args(PlanFlags, MachineFlags, OutputFlags, SamplingFlags, InputFlags, ModelFlags):
    """Generates images. The model determines the task: text to image, edit (InstructPix2Pix) or inpaint.

    Only --model and --prompt are required, and --image, --mask_image and --control_image if the model takes them. With
    --image, a model of text to image starts from that image, and with --mask_image it paints into it.
    """

    essential: ClassVar[tuple[str, ...]] = (
        "model", "prompt", "output", "image", "control_image", "lora", "steps", "guidance_scale", "seed", "num_images",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.num_images < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError("--num_images and --batch_size must be at least 1.")
        # Batches are padded to one size.
        fits = self.seed <= LARGEST_SEED - 2 * self.num_images
        self.require("seed", fits, "smaller: the other images have the seeds that follow, up to 2^63 - 1")
        self.require_at_least(0, "guidance_scale", "image_guidance_scale", "timesteps")
        self.require_in(0, 1, "gamma", "eta", "guidance_rescale", "strength")
        self.require_in(0, 1, "control_guidance_start", "control_guidance_end")
        _entries(self.scheduler_config)
        self.require_in(1, LARGEST_SIDE, "height", "width")
        check_output(self.output, self.num_images)


def run(args: Args) -> list[Path]:
    """Loads the model, generates, writes the images, and prints the time it took.

    Returns:
      The files written.

    Raises:
      ValueError: if the arguments contradict each other or the model, also as `WeightsError` and `ConfigError`.
      OSError: if an image does not exist, or the output cannot be written.
      FloatingPointError: if the model produces NaN.
    """
    args.check()
    if args.plan is not None:
        _plan(args, args.plan)
    pictures = _pictures(args)
    model = _changed(Model.open(args.model, args.controlnet or None, **_source(args)), args)
    times = model.check(
        **pictures,
        strength=args.strength,
        steps=args.steps,
        sampler=args.sampler,
        timesteps=args.timesteps or None,
        height=args.height,
        width=args.width,
    )
    for lora, _ in map(_with_scale, args.lora):
        model.check_lora(lora)
    keep_compiled_programs(args.ccache)
    made, compile_seconds, seconds = _generate(_load(args), args, pictures, len(times))
    files = save_images(args.output, made[: args.num_images])
    print(
        f"{seconds / len(made):.2f} seconds per image ({len(made)} in {seconds:.1f} s on "
        f"{jax.devices()[0].device_kind}), after {compile_seconds:.1f} s of compilation"
    )
    print("wrote " + ", ".join(map(str, files)))
    return files


def _plan(args: Args, target: str) -> NoReturn:
    """Plans one batch, and ends the process."""
    batch_size = min(args.batch_size or args.num_images, args.num_images)
    call = {"prompt": [args.prompt] * batch_size, **_pictures(args), **_sampling(args)}
    with tempfile.TemporaryDirectory(prefix="plan-", ignore_cleanup_errors=True) as folder:
        opened = open_target(target, Path(folder))
        dtype = resolve_dtype(args.dtype, opened.platform)
        model = Model.open(args.model, args.controlnet or None, dtype=dtype, attention=args.attention, **_source(args))
        model = _changed(model, args)
        made = plan_sampling(model, call, opened, f"generate, {args.model}")
    report(made, args.plan_output)


def _pictures(args: Args) -> dict[str, Any]:
    """The images that the model is given."""
    given = {"image": args.image, "mask_image": args.mask_image}
    pictures: dict[str, Any] = {name: open_image(source) for name, source in given.items() if source is not None}
    if args.control_image:
        conditions = [open_image(source) for source in args.control_image]
        pictures["control_image"] = conditions if len(conditions) > 1 else conditions[0]
    return pictures


def _sampling(args: Args) -> dict[str, Any]:
    """How the model is sampled, as arguments of its call."""
    return {
        "negative_prompt": args.negative_prompt,
        "long_prompts": args.long_prompts,
        "weighted_prompts": args.weighted_prompts,
        "strength": args.strength,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "image_guidance_scale": args.image_guidance_scale,
        "guidance_rescale": args.guidance_rescale,
        "controlnet_conditioning_scale": args.controlnet_conditioning_scale,
        "control_guidance_start": args.control_guidance_start,
        "control_guidance_end": args.control_guidance_end,
        "sampler": args.sampler,
        "gamma": args.gamma,
        "eta": args.eta,
        "timesteps": args.timesteps or None,
        "height": args.height,
        "width": args.width,
    }


def _with_scale(lora: str) -> tuple[str, float]:
    """A LoRA and its scale, 1 unless a number follows behind a colon."""
    name, colon, number = lora.rpartition(":")
    try:
        return (name, float(number)) if colon and name else (lora, 1.0)
    except ValueError:
        return lora, 1.0


def _with_word(source: str) -> tuple[str, str | None]:
    """A textual inversion and the word for it, if one follows behind a colon."""
    name, colon, word = source.rpartition(":")
    return (name, word) if colon and name and word else (source, None)


def _source(args: Args) -> dict[str, Any]:
    """Where the model is, besides its name."""
    return {"revision": args.revision, "config": args.single_file_config, "unet": args.unet}


def _entries(texts: Sequence[str]) -> dict[str, Any]:
    """Entries of ``scheduler_config.json`` from ``key=value``, with values as in JSON, or texts."""
    entries = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(
                f"--scheduler_config {text} is not possible: write key=value, as in use_karras_sigmas=true."
            )
        try:
            entries[key] = json.loads(value)
        except json.JSONDecodeError:
            entries[key] = value
    return entries


def _changed(model: Model, args: Args) -> Model:
    """The model with the words that the user adds, and the entries of its scheduler that the user changes."""
    for source, word in map(_with_word, args.textual_inversion):
        model = model.add_words(source, word)
    entries = _entries(args.scheduler_config)
    return model.replace(schedule=model.schedule.with_config(**entries)) if entries else model


def _load(args: Args) -> Model:
    model = Model.from_pretrained(
        args.model,
        args.controlnet or None,
        [*map(_with_scale, args.lora)],
        dtype=resolve_dtype(args.dtype),
        lora_scale=args.lora_scale,
        attention=args.attention,
        variant=args.variant,
        **_source(args),
        place=sharding.place_here(),
    )
    return _changed(model, args)


def _generate(
    pipeline: Model, args: Args, pictures: dict[str, Any], steps: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], float, float]:
    """The images, and the seconds of compilation and of generation. The last batch may have surplus images."""
    # The last batch is as large as the others even if fewer images are left: another size would compile again.
    batch_size = min(args.batch_size or args.num_images, args.num_images)
    starts = range(0, args.num_images, batch_size)
    images, compile_seconds, seconds = [], 0.0, 0.0
    # JAX cannot cache a program that reports its steps, so reports pay off only where steps are slow.
    reports = jax.default_backend() == "cpu" and steps >= _LONG_RUN and sys.stderr.isatty()
    hidden = not sys.stderr.isatty() or not (reports or len(starts) > 1)
    with tqdm(total=len(starts) * steps, unit="step", leave=False, disable=hidden) as bar:
        for start in starts:
            made = pipeline(
                [args.prompt] * batch_size,
                **pictures,
                **_sampling(args),
                seed=args.seed + start,
                on_step=(lambda _: bar.update()) if reports else None,
            )
            bar.update((len(images) + 1) * steps - bar.n)
            images.append(made)
            compile_seconds += pipeline.compile_seconds
            seconds += pipeline.seconds
    return np.concatenate(images), compile_seconds, seconds


def main() -> None:
    """The command line."""
    memory = "a smaller --batch_size, --height and --width"
    command_line.run(Args, run, "python3 -m codi_jax.generate", save_memory=memory)


if __name__ == "__main__":
    main()
