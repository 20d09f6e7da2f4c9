"""The flags that LCM scripts share, besides the method's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from codi_jax.cli.flags import Adjustable, ForValidation, Operational
from codi_jax.data import ConditionOf
from codi_jax.methods.lcm import LcmFlags, LcmTextFlags
from codi_jax.training.flags import ConditionFlags, Replacement, Shown, TrainingFlags

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class LcmRunFlags(LcmFlags, TrainingFlags):
    """The flags of an LCM run, except data and conditions."""

    pretrained_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--pretrained_teacher_model"])]
    """The teacher: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    revision: Annotated[str | None, tyro.conf.arg(aliases=["--teacher_revision"])] = None
    """Branch, tag or commit of the teacher on the hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """Autoencoder to use instead of the teacher's: a folder with its config.json, or an id on the hub."""
    vae_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of the autoencoder. Default: from --mixed_precision, but fp32 instead of fp16 for one that needs it
    (force_upcast)."""
    vae_encode_batch_size: Adjustable[int | None] = None
    """Number of images per device that the autoencoder takes at a time; fewer need less memory. Default: all."""
    cast_teacher_unet: Operational[bool] = False
    """Has no effect: frozen networks are always kept in the precision of the computation."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 for none."""
    validation_sampling_steps: ForValidation[tuple[int, ...]] = (1, 2, 4)
    """Numbers of steps with which validation images show the student."""
    guidance_scale: ForValidation[float] = 7.5
    """Guidance scale in validation images, for teacher and student."""
    image_guidance_scale: ForValidation[float] = 1.5
    """Guidance scale of the source image in validation images, for teacher and student."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        possible = all(1 <= steps <= self.num_ddim_timesteps for steps in self.validation_sampling_steps)
        self.require("validation_sampling_steps", possible, f"1 to --num_ddim_timesteps {self.num_ddim_timesteps}")
        self.require_at_least(1, "vae_encode_batch_size")
        divides = self.train_batch_size % (self.vae_encode_batch_size or 1) == 0
        what = f"a divisor of --train_batch_size {self.train_batch_size}, or larger"
        larger = (self.vae_encode_batch_size or 0) > self.train_batch_size
        self.require("vae_encode_batch_size", divides or larger, what)

    @property
    def vae_parts(self) -> int:
        return max(self.train_batch_size // (self.vae_encode_batch_size or self.train_batch_size), 1)

    @property
    def replacements(self) -> Mapping[str, Replacement]:
        path, precision = self.pretrained_vae_model_name_or_path, self.vae_precision
        if path is None and precision is None:
            return {}
        dtype = None if precision is None else _PRECISIONS[precision]
        return {"vae": Replacement(f"--pretrained_vae_model_name_or_path {path}", source=path, dtype=dtype)}

    @property
    def shown(self) -> Shown:
        scales = {"guidance_scale": self.guidance_scale, "image_guidance_scale": self.image_guidance_scale}
        # A LoRA takes no guidance weights.
        student = scales if self.lora is None else dict.fromkeys(scales, 1.0)
        return Shown(self.validation_sampling_steps, student, scales)


@dataclass(frozen=True, kw_only=True)
class LcmTextRunFlags(ConditionFlags, LcmTextFlags, LcmRunFlags):
    """The flags of a run for a text-to-image model."""

    controlnet_model_name_or_path: str | None = None
    """ControlNet that the teacher is distilled with, and that the student keeps unchanged."""

    @property
    def controlnet(self) -> str | None:
        return self.controlnet_model_name_or_path

    @property
    def condition(self) -> ConditionOf:
        return super().condition if self.controlnet_model_name_or_path is not None else None
