"""The flags of a training run that starts from a model, in groups that scripts inherit from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from codi_jax.cli.flags import Adjustable, Flags, Operational
from codi_jax.data import ConditionOf, DataFlags
from codi_jax.data.load import ConditionTask, condition_of_task
from codi_jax.models.kernels.attention import Implementation
from codi_jax.training.loop import LoopFlags
from codi_jax.training.optim import OptimizerFlags


@dataclass(frozen=True)
class Replacement:
    """Where one network of a model comes from, instead of the model's folder.

    Attributes:
      flag: that asks for it, for messages.
      source: folder or repository with its config.json; ``None`` is the model's own.
      revision: branch, tag or commit, if another than the model's.
      dtype: of its computation; ``None`` is that of the other networks.
    """

    flag: str
    source: str | None = None
    revision: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeFlags(Flags):
    """Flags about how networks are computed and saved."""

    gradient_checkpointing: Adjustable[bool] = False
    """Recompute activations in the backward pass: slower, in less memory."""
    save_dtype: Adjustable[Literal["float32", "float16", "bfloat16"]] = "float32"
    """Precision in which trained networks are saved."""


@dataclass(frozen=True)
class Shown:
    """How the models of a run are sampled for validation pictures.

    Attributes:
      steps: of the student, a row of pictures each; ``None`` is its sampler's default.
      scales: guidance scales of the student, as arguments of `codi_jax.pipeline.model.Model.__call__`.
      teacher_scales: of the teacher, likewise; ``None`` shows no teacher.
    """

    steps: tuple[int | None, ...] = (None,)
    scales: Mapping[str, float] = field(default_factory=dict)
    teacher_scales: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ValidationFlags(Flags):
    """Flags about validation pictures."""

    validation_data_dir: Operational[str | None] = None
    """Folder of samples to show that are not trained on, like --train_data_dir. Default: training samples."""
    validation_prompt: Operational[tuple[str, ...]] = ()
    """Prompts to show instead of samples of the data."""
    validation_image: Operational[
        Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--val_image_url_or_path", "--val_image_url"])]
    ] = ()
    """Condition images (files or URLs) for these prompts, or images to edit: one for each prompt, one for all prompts,
    or several for one prompt."""
    num_validation_images: Operational[int] = 8
    """Pictures of each prompt of --validation_prompt, or of each prompt with its image; without prompts, the samples of
    the data that are shown."""

    @property
    def shown(self) -> Shown:
        """How models are sampled; scripts override it."""
        return Shown()

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_validation_images")
        images, prompts = len(self.validation_image), len(self.validation_prompt)
        if images and not prompts:
            raise ValueError('--validation_image needs --validation_prompt: give one, such as "", the empty one.')
        if images != prompts and images > 1 and prompts > 1:
            raise ValueError(
                f"--validation_image has {images} images and --validation_prompt {prompts} prompts: give one of "
                "either, or as many images as prompts."
            )
        if prompts and self.validation_data_dir is not None:
            raise ValueError("--validation_prompt and --validation_data_dir exclude each other: give one of them.")


@dataclass(frozen=True, kw_only=True)
class RunFlags(ComputeFlags, LoopFlags, OptimizerFlags, DataFlags, ValidationFlags):
    """The flags of every run, and what follows from a script's further ones.

    A script overrides the properties that its flags change.
    """

    @property
    def condition(self) -> ConditionOf:
        """Where condition images or source images come from, as `codi_jax.data.load_data` takes it."""
        return None

    @property
    def reads_images(self) -> bool:
        """Whether the data has images, or prompts alone."""
        return True

    @property
    def caches_text(self) -> bool:
        """Whether text features may be cached; not where the text encoder is trained."""
        return True

    @property
    def vae_parts(self) -> int:
        """In how many parts a batch of images is encoded."""
        return 1

    @property
    def network_options(self) -> Mapping[str, Any]:
        """Options of computation for the networks that have them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(ComputeFlags):
    """Flags about the pretrained model, and how it is computed and saved."""

    pretrained_model_name_or_path: str
    """Model to start from: a folder in diffusers' layout, or an id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit of it on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, for each part of the model that has it; the ControlNet, too."""
    tokenizer_name: str | None = None
    """Folder or id of another tokenizer than the model's own."""
    from_pt: Operational[bool] = False
    """Has no effect: PyTorch and Flax files are told apart by themselves."""
    scan_layers: Adjustable[bool] = False
    """Compile transformer blocks in a row, of which SDXL has up to ten, as a loop: ready much sooner."""
    attention: Adjustable[Implementation] = "auto"
    """Attention kernel. auto: the fastest that the device has."""
    enable_xformers_memory_efficient_attention: Operational[bool] = False
    """Has no effect: --attention auto chooses a flash kernel where there is one."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(ModelFlags, RunFlags):
    """The flags of every run that starts from a model, and what follows from a script's further ones."""

    @property
    def controlnet(self) -> str | None:
        """Folder or repository of a ControlNet, if not the one in the model's folder."""
        return None

    @property
    def controlnet_revision_on_hub(self) -> str | None:
        """Branch, tag or commit of it."""
        return None

    @property
    def starts_random(self) -> tuple[str, ...]:
        """The networks that start from random parameters."""
        return ()

    @property
    def replacements(self) -> Mapping[str, Replacement]:
        """Networks that come from elsewhere, by name."""
        return {}

    @property
    def network_options(self) -> Mapping[str, Any]:
        return {"scan_layers": self.scan_layers}


@dataclass(frozen=True, kw_only=True)
class ConditionFlags(Flags):
    """What the images of a ControlNet are."""

    task: ConditionTask = "column"
    """Where condition images come from. column, edit: --conditioning_image_column, whatever it holds: edges, depth, for
    edit the image before it (with the edited one in --image_column and the instruction in --caption_column). The others
    are made from the image itself: its edges (unless there is a column of them), a quarter of its resolution, or a hole
    in it."""

    @property
    def condition(self) -> ConditionOf:
        """Where they come from, as `codi_jax.data.load_data` takes it."""
        return condition_of_task(self.task)


@dataclass(frozen=True, kw_only=True)
class EditDataFlags(DataFlags):
    """Which data, for editors: each sample has an image before and after the edit, and the instruction."""

    conditioning_image_column: Annotated[
        str, tyro.conf.arg(name="original_image_column", aliases=["--conditioning_image_column"])
    ] = "input_image"
    """Column of the images before the edit."""
    caption_column: Annotated[str, tyro.conf.arg(name="edit_prompt_column", aliases=["--caption_column"])] = (
        "edit_prompt"
    )
    """Column of the instructions."""
    image_column: Annotated[str, tyro.conf.arg(name="edited_image_column", aliases=["--image_column"])] = "edited_image"
    """Column of the images after the edit."""

    @property
    def condition(self) -> ConditionOf:
        """Where images before the edit come from, as `codi_jax.data.load_data` takes it."""
        return "column"


@dataclass(frozen=True, kw_only=True)
class ManyStepsFlags(TrainingFlags):
    """The flags of a run whose model is sampled in many steps, with guidance."""

    validation_sampling_steps: Operational[int] = 50
    """Steps of the sampler for validation pictures."""
    guidance_scale: Operational[float] = 7.5
    """Guidance scale of the text in validation pictures."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "validation_sampling_steps")
        self.require_at_least(0, "guidance_scale")

    @property
    def shown(self) -> Shown:
        return Shown((self.validation_sampling_steps,), {"guidance_scale": self.guidance_scale})
