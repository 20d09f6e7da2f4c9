"""Speeds up an InstructPix2Pix model without training: adds the weight difference of its base model and a student.

python3 training_scripts/adapt_instruct_pix2pix.py \
    --pretrained_model_name_or_path timbrooks/instruct-pix2pix --lora latent-consistency/lcm-lora-sdv1-5 --weight 1 \
    --output_dir runs/fast-edit

python3 training_scripts/adapt_instruct_pix2pix.py \
    --pretrained_model_name_or_path diffusers/sdxl-instructpix2pix-768 --weight 0.5 --output_dir runs/fast-edit-xl \
    --base_model stabilityai/stable-diffusion-xl-base-1.0 --distilled_model latent-consistency/lcm-sdxl

Then edit in 4 or 5 steps with image guidance 1 and text guidance 1 to 3. Several weights give one folder each, and with
--validation_image an image that compares them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.io.images import labeled_rows, open_image, save_images, to_pixels
from codi_jax.methods.weight_delta import ConvIn
from codi_jax.models.lora import merge_lora
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.networks import require_instruct_pix2pix
from codi_jax.training.jobs.adaptation import delta_of_lora, delta_of_models, describe, open_editor, write_adapted
from codi_jax.training.tracking import log


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    """Adapts an InstructPix2Pix model to few steps, without training."""

    pretrained_model_name_or_path: str
    """The InstructPix2Pix model: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    base_model: str | None = None
    """The text-to-image model that the editor was fine-tuned from."""
    distilled_model: str | None = None
    """The distilled base model: a complete model, or the folder of only a UNet."""
    lora: str | None = None
    """A LoRA of the distilled model, instead of the two models: a file, a folder, an id on the hub or a file there,
    owner/name/file.safetensors. Its weights for the text encoders, if any, are added to them."""
    weight: tuple[float, ...] = (0.5,)
    """How much of the difference to add: 0.5 for complete SDXL models, 1 for a LoRA of SD 1.5. Several values give one
    folder each: weight-0.5, weight-1, ..."""
    conv_in: ConvIn = "skip"
    """The first convolution, which has more input channels in an editor: leave it unchanged, or add the difference to
    the channels that the others have."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, for each part of each model that has it."""
    save_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the adapted UNet's file. Default: as in the model's file."""
    validation_prompt: str | None = None
    """Instruction to show the result with."""
    validation_image: str | None = None
    """Image (file or URL) to edit with this instruction."""
    validation_sampling_steps: int = 5
    """Steps of the sampler for this image."""
    guidance_scale: float = 2.0
    """Guidance scale of the text for this image; the image's is 1."""
    seed: int = 0
    """Seed of this image."""
    output_dir: str
    """Folder for the adapted model."""

    def check(self) -> None:
        super().check()
        whole = self.base_model is not None and self.distilled_model is not None
        if whole == (self.lora is not None) or (self.base_model is None) != (self.distilled_model is None):
            raise ValueError("give either --base_model and --distilled_model, or --lora.")
        if (self.validation_prompt is None) != (self.validation_image is None):
            raise ValueError("--validation_prompt and --validation_image go together: give both, or neither.")
        folders = {_weight_folder(weight) for weight in self.weight}
        self.require("weight", 0 < len(folders) == len(self.weight), "one number or more, each of them once")
        self.require_at_least(1, "validation_sampling_steps")
        self.require_at_least(0, "guidance_scale")


def main(args: Args) -> None:
    args.check()
    image = None if args.validation_image is None else open_image(args.validation_image)
    source, folder = args.pretrained_model_name_or_path, Path(args.output_dir).expanduser()
    model = Model.from_pretrained(source, variant=args.variant, without_params=["unet"])
    require_instruct_pix2pix(model.networks, f"--pretrained_model_name_or_path {source}")
    model = model.replace(schedule=model.schedule.sampled(SamplingSpec.lcm()))
    if image is not None:
        model.check(image, steps=args.validation_sampling_steps)
    editor = open_editor(source, args.variant)
    if args.lora is not None:
        encoders = {name: params for name, params in model.params.items() if name.startswith("text_encoder")}
        delta = delta_of_lora(editor, args.lora, encoders)
    else:
        assert args.base_model is not None
        assert args.distilled_model is not None
        delta = delta_of_models(
            editor, args.base_model, args.distilled_model, conv_in=args.conv_in, variant=args.variant
        )
    log(describe(delta.plan) + "".join(f", and {name}" for name in delta.text_loras))
    rows: dict[str, Any] = {}
    for weight in args.weight:
        adapted = folder if len(args.weight) == 1 else folder / _weight_folder(weight)
        write_adapted(adapted, editor, delta, weight, args.save_dtype)
        text = {name: merge_lora(model.params[name], lora, weight) for name, lora in delta.text_loras.items()}
        model.with_params(text).save_pretrained(adapted)
        log(f"wrote {adapted}")
        if image is not None:
            rows[f"weight {weight:g}"] = _edit(args, adapted, image)
    if image is not None:
        height, width = next(iter(rows.values())).shape[1:3]
        shown = (to_pixels(image, (height, width)) * 255).round().astype(np.uint8)
        save_images(folder / "validation.png", labeled_rows({"source": shown[None], **rows})[None])


def _weight_folder(weight: float) -> str:
    return f"weight-{weight:g}"


def _edit(args: Args, folder: Path, image: Any) -> np.ndarray:
    assert args.validation_prompt is not None
    scales: dict[str, Any] = {"guidance_scale": args.guidance_scale, "image_guidance_scale": 1.0}
    model = Model.from_pretrained(folder)
    return model(args.validation_prompt, image, steps=args.validation_sampling_steps, seed=args.seed, **scales)


if __name__ == "__main__":
    command_line.run(Args, main)
