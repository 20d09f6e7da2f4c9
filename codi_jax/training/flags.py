"""The flags of a training run that starts from a model, as groups that scripts inherit from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from codi_jax.cli.flags import Adjustable, Flags, Local, Operational, Topic
from codi_jax.data import ConditionOf, DataFlags
from codi_jax.data.load import ConditionTask, condition_of_task
from codi_jax.models.kernels.attention import Implementation
from codi_jax.training.optim import OptimizerFlags
from codi_jax.training.starting import LoopFlags


@dataclass(frozen=True)
class Replacement:
    """Where one network of a model comes from, instead of the model's folder.

    Attributes:
      flag: the flag that asks for it, for messages.
      source: a folder or repository with its config.json. Default: the model's.
      revision: branch, tag or commit, if different from the model's.
      dtype: its computation dtype. Default: as for the other networks.
    """

    flag: str
    source: str | None = None
    revision: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeFlags(Flags):
    """Flags about how networks are computed and saved."""

    topic: ClassVar[Topic] = Topic.RUN

    gradient_checkpointing: Adjustable[bool] = False
    """Recompute activations in the backward pass: slower, but takes less memory."""
    save_dtype: Adjustable[Literal["float32", "float16", "bfloat16"]] = "float32"
    """Precision in which trained networks are saved."""


@dataclass(frozen=True)
class Shown:
    """How the models of a run are sampled for validation images.

    Attributes:
      steps: numbers of steps of the student, one row of images each. Default: its sampler's.
      scales: the student's guidance scales, as arguments of `codi_jax.pipeline.model.Model.__call__`.
      teacher_scales: the teacher's guidance scales; ``None`` shows no teacher.
    """

    steps: tuple[int | None, ...] = (None,)
    scales: Mapping[str, float] = field(default_factory=dict)
    teacher_scales: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ValidationFlags(Flags):
    """Flags about validation images."""

    topic: ClassVar[Topic] = Topic.VALIDATION

    validation_data_dir: Operational[str | None] = None
    """Folder of held-out samples to show, in the format of --train_data_dir. Default: training samples."""
    validation_prompt: Operational[tuple[str, ...]] = ()
    """Prompts to show instead of samples of the data."""
    validation_image: Operational[
        Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--val_image_url_or_path", "--val_image_url"])]
    ] = ()
    """Condition images (files or URLs) for these prompts, or images to edit: one per prompt, one for all prompts, or
    several for one prompt."""
    num_validation_images: Operational[int] = 8
    """Images per prompt of --validation_prompt, or per pair of prompt and image; without prompts, the number of data
    samples to show."""

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
class PlanFlags(Flags):
    """Flags for planning a run instead of starting it."""

    topic: ClassVar[Topic] = Topic.PLAN

    plan: Operational[str | None] = None
    """Plan instead of training: compile the step for these devices, which need not be here, and say what memory and
    time it takes. cpu, cpu:8, gpu (the one that is here), h100, h200:8, or a TPU slice such as v5e:4x4. Reads neither
    weights nor data. The exit status is 3 if it does not fit."""
    plan_batch: Operational[Literal["given", "auto"]] = "given"
    """auto: find the largest --train_batch_size that fits."""
    plan_output: Local[Path] = Path("outputs/plan.json")
    """File for the plan, as JSON."""


@dataclass(frozen=True, kw_only=True)
class RunFlags(ComputeFlags, LoopFlags, OptimizerFlags, DataFlags, ValidationFlags, PlanFlags):
    """The flags of every run, and the properties that follow from a script's own flags.

    A script overrides the properties that its flags change.
    """

    topic: ClassVar[Topic] = Topic.CHECKPOINTS

    essential: ClassVar[tuple[str, ...]] = (
        "train_data_dir", "dataset_name", "output_dir", "resolution", "train_batch_size", "learning_rate",
        "max_train_steps", "mixed_precision", "resume_from_checkpoint",
    )  # fmt: skip

    export_steps: Operational[int] = 0
    """Steps between exports into folders step-N, besides the one at the end; 0 for none. evaluate --training_steps
    compares them."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "export_steps")

    @property
    def condition(self) -> ConditionOf:
        """Where condition images or source images come from, as `codi_jax.data.load_data` takes it."""
        return None

    @property
    def reads_images(self) -> bool:
        """Whether the data has images, or only prompts."""
        return True

    @property
    def caches_text(self) -> bool:
        """Whether text features may be cached: not if the text encoder is trained."""
        return True

    @property
    def vae_parts(self) -> int:
        """The number of chunks in which a batch of images is encoded."""
        return 1

    @property
    def network_options(self) -> Mapping[str, Any]:
        """Computation options for the networks that have them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(ComputeFlags):
    """Flags about the pretrained model, and how it is computed and saved."""

    topic: ClassVar[Topic] = Topic.MODEL

    pretrained_model_name_or_path: str
    """Model to start from: a folder in diffusers' layout, an id on the Hugging Face Hub, or a single .safetensors or
    .ckpt file."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, for each part of the model that has it, including the ControlNet."""
    tokenizer_name: str | None = None
    """Folder or id of a tokenizer to use instead of the model's."""
    single_file_config: str | None = None
    """For a model in a single file: a folder or id in diffusers' layout, whose configurations and vocabulary it takes.
    Default: a repository of its family."""
    from_pt: Operational[bool] = False
    """Has no effect: PyTorch and Flax files are detected automatically."""
    scan_layers: Adjustable[bool] = False
    """Compile consecutive transformer blocks (up to ten in SDXL) as a loop: compiles much faster."""
    attention: Adjustable[Implementation] = "auto"
    """Attention kernel. auto: the fastest one for the device."""
    enable_xformers_memory_efficient_attention: Operational[bool] = False
    """Has no effect: --attention auto chooses a flash kernel if there is one."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(ModelFlags, RunFlags):
    """The flags of every run that starts from a model, and the properties that follow from a script's own flags."""

    essential: ClassVar[tuple[str, ...]] = ("pretrained_model_name_or_path", *RunFlags.essential)

    @property
    def controlnet(self) -> str | None:
        """Folder or repository of a ControlNet, if not the one in the model's folder."""
        return None

    @property
    def controlnet_revision_on_hub(self) -> str | None:
        """Branch, tag or commit of the ControlNet."""
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

    topic: ClassVar[Topic] = Topic.DATA

    task: ConditionTask = "column"
    """Where condition images come from. column, edit: --conditioning_image_column, whatever it holds: edges, depth, or
    for edit the image before the edit (with the edited one in --image_column and the instruction in --caption_column).
    The others are computed from the image itself: its edges (unless there is a column of them), a quarter of its
    resolution, or a hole in it."""

    @property
    def condition(self) -> ConditionOf:
        """Where they come from, as `codi_jax.data.load_data` takes it."""
        return condition_of_task(self.task)


@dataclass(frozen=True, kw_only=True)
class EditDataFlags(DataFlags):
    """The data flags for editors: each sample has an image before and after the edit, and the instruction."""

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

    topic: ClassVar[Topic] = Topic.VALIDATION

    validation_sampling_steps: Operational[int] = 50
    """Steps of the sampler for validation images."""
    guidance_scale: Operational[float] = 7.5
    """Guidance scale of the text in validation images."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "validation_sampling_steps")
        self.require_at_least(0, "guidance_scale")

    @property
    def shown(self) -> Shown:
        return Shown((self.validation_sampling_steps,), {"guidance_scale": self.guidance_scale})
