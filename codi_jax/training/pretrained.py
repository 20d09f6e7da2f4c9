"""What training scripts share: the model and the batches that a run starts from, and the folder it is written to."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array

from codi_jax.cli.flags import Adjustable, Flags, Operational
from codi_jax.data import ConditionOf, DataFlags, Encoders, Loader, Source, load_data, open_data
from codi_jax.diffusion.sampling import default_sampler, most_steps, timesteps_for
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.io import processes
from codi_jax.io.hub import ModelFolder
from codi_jax.io.weights import Model, build_module, load_model
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.unet import UNetEncoder
from codi_jax.pipeline.conditions import Modules, encode_prompts, null_text, posterior
from codi_jax.pipeline.model import DiffusionPipeline, load_schedule, read_index
from codi_jax.training import optim
from codi_jax.training.loop import global_batch_size
from codi_jax.training.validation import ValidationFlags

_STEPS_OF_TEACHER = 50  # in validation pictures, if it was not distilled for fewer


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
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
    gradient_checkpointing: Adjustable[bool] = False
    """Recompute activations in the backward pass: slower, in less memory."""
    scan_layers: Adjustable[bool] = False
    """Compile transformer blocks in a row, of which SDXL has up to ten, as a loop: ready much sooner."""
    attention: Adjustable[Implementation] = "auto"
    """Attention kernel. auto: the fastest that the device has."""
    enable_xformers_memory_efficient_attention: Operational[bool] = False
    """Has no effect: --attention auto chooses a flash kernel where there is one."""
    save_dtype: Adjustable[Literal["float32", "float16", "bfloat16"]] = "float32"
    """Precision in which trained networks are saved."""


@dataclass(frozen=True, kw_only=True)
class ConditionFlags(Flags):
    """What the images of a ControlNet are."""

    task: Literal["column", "edit", "canny", "super_resolution", "inpainting"] = "column"
    """Where condition images come from. column, edit: --conditioning_image_column, whatever it holds: edges, depth, for
    edit the image before it (with the edited one in --image_column and the instruction in --caption_column). The others
    are made from the image itself: its edges (unless there is a column of them), a quarter of its resolution, or a hole
    in it."""

    @property
    def condition(self) -> ConditionOf:
        """Where they come from, as `codi_jax.data.load_data` takes it."""
        return "column" if self.task == "edit" else self.task


@dataclass(frozen=True, kw_only=True)
class EditFlags(DataFlags):
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
    conditioning_dropout_prob: float = 0.0
    """Probability p of training without the instruction, without the image, and without both, each; 0.05 is usual for
    teachers, whose guidance needs it."""

    def check(self) -> None:
        super().check()
        self.require("conditioning_dropout_prob", 0 <= self.conditioning_dropout_prob <= 1 / 3, "between 0 and 1/3")

    @property
    def condition(self) -> ConditionOf:
        """Where images before the edit come from, as `codi_jax.data.load_data` takes it."""
        return "column"


@dataclass(frozen=True, kw_only=True)
class PretrainedFlags(ModelFlags, DataFlags, optim.OptimizerFlags):
    """The flags that this file reads; a script's own have more."""


def load_pretrained(
    flags: Any,
    mesh: Mesh,
    controlnet: str | Path | None = None,
    controlnet_revision: str | None = None,
    *,
    untrained: Mapping[str, Array | None] | None = None,
) -> DiffusionPipeline:
    """The model on the mesh, for computing with: in half precision if training is.

    Args:
      flags: `PretrainedFlags`.
      mesh: from `codi_jax.models.sharding.make_mesh`.
      controlnet: a ControlNet, if not the one in the model's folder.
      controlnet_revision: branch, tag or commit of it on the hub.
      untrained: see `DiffusionPipeline.from_pretrained`.

    Raises:
      ValueError: if it cannot be loaded, or the resolution is not one that its VAE can take.
    """
    _check_resolution(flags)
    _check_validation(flags)
    if controlnet is not None:
        ModelFolder(str(Path(controlnet).expanduser()), None, controlnet_revision, flags.cache_dir).find("config.json")
    pipeline = DiffusionPipeline.from_pretrained(
        flags.pretrained_model_name_or_path,
        controlnet,
        controlnet_revision=controlnet_revision,
        dtype=optim.compute_dtype(flags.mixed_precision),
        attention=flags.attention,
        untrained=untrained,
        tokenizer=flags.tokenizer_name,
        place=sharding.place(mesh),
        revision=flags.revision,
        variant=flags.variant,
        cache_dir=flags.cache_dir,
    )
    pipeline.params = sharding.put(mesh, pipeline.params)  # those of --from_scratch are not there yet
    return pipeline


def pretrained_schedule(flags: Any) -> NoiseSchedule:
    """The model's noise schedule, before the model is downloaded and read.

    Args:
      flags: `PretrainedFlags`.

    Raises:
      ValueError: if there is none, or it cannot be computed.
    """
    return load_schedule(_folder(flags))


def pretrained_unet(flags: Any) -> Model:
    """The model's UNet without its weights, before they are downloaded and read.

    Args:
      flags: `PretrainedFlags`.

    Raises:
      ValueError: if there is none, or it cannot be built.
    """
    return build_module(_folder(flags).part("unet"))


def _folder(flags: Any) -> ModelFolder:
    folder = ModelFolder(
        str(Path(flags.pretrained_model_name_or_path).expanduser()), None, flags.revision, flags.cache_dir
    )
    read_index(folder)
    return folder


def _check_resolution(flags: Any) -> None:
    """Before weights are downloaded and read: the configurations say enough."""
    folder = _folder(flags)
    vae: Any = build_module(folder.part("vae")).config
    unet: Any = build_module(folder.part("unet")).config
    flags.check_resolution(vae.downscale * 2 ** (unet.num_blocks - 1), f"the model {folder}")


def steps_of_teacher(teacher: NoiseSchedule) -> int:
    """The number of steps in which a teacher with this schedule is shown in validation pictures."""
    return most_steps(teacher, _STEPS_OF_TEACHER)


def _check_validation(flags: Any) -> None:
    """Before weights are read, and not at the first validation: can the model be sampled as its pictures need it?"""
    if not isinstance(flags, ValidationFlags):
        return
    schedule = pretrained_schedule(flags)
    steps = getattr(flags, "validation_sampling_steps", None)
    try:
        # Several numbers are those of a student, beside which its teacher is shown.
        shown = steps if isinstance(steps, int) else steps_of_teacher(schedule)
        timesteps_for(default_sampler(schedule), schedule, shown)
    except ValueError as error:
        flag = (
            f"--validation_sampling_steps {steps}" if isinstance(steps, int) else "validation pictures of the teacher"
        )
        raise ValueError(f"{flag}: {error}") from error


def require_editor(pipeline: DiffusionPipeline, flag: str = "--pretrained_model_name_or_path") -> None:
    """Refuses a model that takes no source image.

    Args:
      pipeline: of the model.
      flag: that named it, for the message.

    Raises:
      ValueError: if it is no InstructPix2Pix model.
    """
    if pipeline.task != "edit":
        channels = pipeline.modules["unet"].config.in_channels
        latents = pipeline.modules["vae"].config.latent_channels
        raise ValueError(
            f"{flag}: its UNet has {channels} input channels, and that of an InstructPix2Pix model has {2 * latents}: "
            "train one with train_instruct_pix2pix_flax.py first."
        )


def modules_of(pipeline: DiffusionPipeline, trained: Sequence[str], flags: Any) -> Modules:
    """The modules; those that are trained recompute activations, and UNets scan their layers, if asked for."""

    def configured(name: str, module: Any) -> Any:
        scan = {"scan_layers": flags.scan_layers} if isinstance(module, UNetEncoder) else {}
        return dataclasses.replace(module, remat=flags.gradient_checkpointing and name in trained, **scan)

    return Modules(**{name: configured(name, module) for name, module in pipeline.modules.items()})


def trainable(pipeline: DiffusionPipeline, name: str, mesh: Mesh) -> Params:
    """The parameters of one network in float32, to start training from."""
    params = pipeline.params[name]
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        return params
    return load_model(**pipeline.sources[name], place=sharding.place(mesh))[1]


def with_network(
    pipeline: DiffusionPipeline, name: str, source: Mapping[str, Any], flags: Any, mesh: Mesh, dtype: Any = None
) -> DiffusionPipeline:
    """The pipeline with another network in place of one of its own.

    Args:
      pipeline: of `load_pretrained`.
      name: of the network.
      source: what `codi_jax.io.weights.load_model` reads it from, as in ``pipeline.sources``.
      flags: `PretrainedFlags`.
      mesh: where its parameters go.
      dtype: of the computation; ``None`` is that of the network that it replaces.

    Raises:
      ValueError: if it cannot be loaded.
    """
    dtype = pipeline.modules[name].dtype if dtype is None else dtype
    module, params = load_model(**source, dtype=dtype, attention=flags.attention, place=sharding.place(mesh))
    return dataclasses.replace(
        pipeline,
        modules=pipeline.modules | {name: module},
        params=pipeline.params | {name: params},
        sources=pipeline.sources | {name: dict(source)},
    )


def with_controlnet(pipeline: DiffusionPipeline, controlnet: Model | None) -> DiffusionPipeline:
    """The pipeline with another ControlNet, or with none.

    Its parameters are given when it generates, see `codi_jax.training.validation.generate_with`.
    """
    modules, params = (
        {name: part for name, part in parts.items() if name != "controlnet"}
        for parts in (pipeline.modules, pipeline.params)
    )
    return dataclasses.replace(
        pipeline, modules=modules if controlnet is None else modules | {"controlnet": controlnet}, params=params
    )


def null_text_of(pipeline: DiffusionPipeline) -> dict[str, Array]:
    """The text that guidance leads away from, for ``frozen``; see `codi_jax.pipeline.conditions.null_text`."""
    ids = jax.tree.map(jnp.asarray, pipeline.tokenize([""]))
    return null_text(Modules(**pipeline.modules), pipeline.params, ids, zeros=pipeline.zeros_for_empty_prompt)


def open_training_data(flags: Any, condition: ConditionOf = None, *, has_images: bool = True) -> Source:
    """The data, before the model is loaded.

    Args:
      flags: `PretrainedFlags` and `codi_jax.training.loop.LoopFlags`.
      condition: see `codi_jax.data.load_data`.
      has_images: whether images are read, or prompts alone.

    Raises:
      ValueError: as `codi_jax.data.open_data`, or if the processes of the run do not see the same data.
    """
    source = open_data(flags, batch_size=global_batch_size(flags), condition=condition, has_images=has_images)
    seen = {"number of samples": len(source), "content": source.content_digest()}
    processes.agree("data", seen, f"give all machines the same {source.name}")
    return source


def load_batches(
    flags: Any, pipeline: DiffusionPipeline, source: Source, condition: ConditionOf = None, *, cache_text: bool = True
) -> Loader:
    """This process's share of the batches, with latents and text features cached if ``--cache_latents`` says so.

    Args:
      flags: `PretrainedFlags` and `codi_jax.training.loop.LoopFlags`.
      pipeline: for its tokenizers, and its VAE and text encoders.
      source: of `open_training_data`.
      condition: see `codi_jax.data.load_data`.
      cache_text: whether text features may be cached; not where the text encoder is trained.

    Raises:
      ValueError: as `codi_jax.data.load_data`.
    """
    return load_data(
        flags,
        pipeline.tokenize,
        batch_size=global_batch_size(flags),
        seed=flags.seed,
        condition=condition,
        source=source,
        time_ids=pipeline.is_xl,
        encoders=encoders_of(pipeline, cache_text) if flags.cache_latents else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def encoders_of(pipeline: DiffusionPipeline, cache_text: bool = True) -> Encoders:
    """The networks whose results are cached: the VAE and, unless they are trained, the text encoders."""
    modules, params = Modules(**pipeline.modules), pipeline.params

    @jax.jit
    def images(params: Any, pixels: Any) -> Any:
        q = posterior(modules.vae, params, {"pixels": pixels})
        return jnp.concatenate([q.mean, q.logvar], axis=-1)

    @jax.jit
    def text(params: Any, ids: Any) -> Any:
        context, pooled = encode_prompts(modules, params, ids)
        return {"context": context, "pooled": pooled} if pipeline.is_xl else {"context": context}

    names = ["vae", *(name for name in params if cache_text and name.startswith("text_encoder"))]
    # Processes take turns to build a cache, so each computes on its own.
    needed = {name: jax.tree.map(_own_copy, params[name]) for name in names}
    digest = hashlib.sha256()
    for name in names:
        digest.update(repr(pipeline.modules[name]).encode())
        for leaf in jax.tree.leaves(needed[name]):
            digest.update(np.asarray(leaf).tobytes())
    for file in (file for files in pipeline.tokenizer_files.values() for file in files):
        digest.update(file.read_bytes())

    def on_devices(program: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            with sharding.context_of(needed):
                return program(needed, inputs)

        return run

    of_text = on_devices(text) if cache_text else None
    return Encoders(on_devices(images), of_text, digest.hexdigest(), conditions_too=modules.edits)


def _own_copy(leaf: Array) -> Array:
    """An array on devices of this process: itself, unless it lies on those of several."""
    return leaf if leaf.is_fully_addressable else jnp.asarray(sharding.fetch(leaf))


def save_trained(
    flags: Any,
    pipeline: DiffusionPipeline,
    folder: Path,
    trained: Mapping[str, tuple[Model, Params]],
) -> None:
    """Writes a complete diffusers folder: what was trained, and the rest of the model as it was.

    Args:
      flags: `PretrainedFlags`.
      pipeline: of `load_pretrained`, with the schedule to save.
      folder: to write into.
      trained: modules and parameters by name.

    Raises:
      WeightsError: if something cannot be written.
    """
    modules, params = dict(pipeline.modules), {}
    for name in pipeline.modules.keys() - trained.keys():
        # As precise as the files that they came from, whatever training computed with.
        params[name] = load_model(**pipeline.sources[name], dtype=None, place=lambda _, array: array)[1]
    modules |= {name: module for name, (module, _) in trained.items()}
    params |= {name: of_network for name, (_, of_network) in trained.items()}
    whole = dataclasses.replace(pipeline, modules=modules, params=params)
    of_file: dict[str, Any] = dict.fromkeys(trained, flags.save_dtype)
    whole.save_pretrained(folder, dtype=of_file)
