"""A whole Stable Diffusion model: load it, generate with it, save it.

Reads and writes diffusers folders. The task follows from the model: text-to-image (as many input channels as latents
have, 4), InstructPix2Pix editing (8) or inpainting (9), each with or without a ControlNet; SD 1.x, 2.x and SDXL.
"""

import dataclasses
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8
from transformers import CLIPTokenizer

from codi_jax.diffusion.sampling import COUNTED, Sampler, default_sampler, is_stochastic, timesteps_for
from codi_jax.diffusion.schedule import CONFIG_NAME, NoiseSchedule
from codi_jax.io.hub import ModelFolder
from codi_jax.io.images import Picture, as_list, stack_pictures, to_mask, to_pixels
from codi_jax.io.lora_files import load_lora
from codi_jax.io.weights import Model, Place, build_module, load_model, save_model
from codi_jax.models import sharding
from codi_jax.models.config import ConfigError, Params, WeightsError
from codi_jax.models.controlnet import ControlNet
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.lora import merge_lora
from codi_jax.pipeline.generation import Program, choose_guidance, generate
from codi_jax.pipeline.text import find_tokenizer, tokenize

# Steps that a sampler is made for: the few of a distilled student, or those of diffusers' pipelines.
_FEW_STEPS, _MANY_STEPS = 4, 50
_GUIDANCE_SCALE, _IMAGE_GUIDANCE_SCALE = 7.5, 1.5  # those of diffusers' pipelines
_ROOMS = (8, 64)  # numbers of steps that programs are compiled for, where a sampler can stop before

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and computation, as a flag says it."""

# What a model must have, and which class each may be: others' configurations would be read as if they were of these.
_REQUIRED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_SUPPORTED = "text-to-image, InstructPix2Pix, inpainting and ControlNet pipelines of Stable Diffusion 1.x, 2.x and XL"
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet")
_jitted_generate = jax.jit(generate, static_argnames="program")


@dataclasses.dataclass(eq=False)
class DiffusionPipeline:
    """A model in all its parts.

    Attributes:
      modules: ``unet``, ``vae``, ``text_encoder``, and where there are, ``text_encoder_2`` and ``controlnet``.
      params: their parameters, under the same names.
      tokenizers: ``tokenizer`` and, for SDXL, ``tokenizer_2``.
      schedule: the noise schedule.
      tokenizer_files: the files of each tokenizer, which `save_pretrained` copies.
      sources: where each module was loaded from, as the arguments of `codi_jax.io.weights.load_model` that say so.
      zeros_for_empty_prompt: whether the null text is zeros, SDXL's ``force_zeros_for_empty_prompt``.
      compile_seconds: what compiling took in the last call; 0 if the program was there already.
      seconds: what the last call took without compilation.
    """

    modules: dict[str, Any]
    params: dict[str, Params]
    tokenizers: dict[str, Any]
    schedule: NoiseSchedule
    tokenizer_files: dict[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    zeros_for_empty_prompt: bool = False
    compile_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._compiled: dict[Any, Any] = {}
        self._reporter = _StepReporter()
        if self.task is None:
            latents = self.modules["vae"].config.latent_channels
            raise ConfigError(
                f"the UNet has in_channels = {self.modules['unet'].config.in_channels}; with this VAE codi_jax can "
                f"sample models with {latents} (text-to-image), {2 * latents} (InstructPix2Pix) and {2 * latents + 1} "
                "(inpainting)."
            )
        if "controlnet" in self.modules:
            _check_controlnet(self.modules)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        controlnet: str | Path | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        lora_scale: float | int = 1.0,
        attention: Implementation = "auto",
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        controlnet_revision: str | None = None,
        tokenizer: str | Path | None = None,
        untrained: Mapping[str, Array | None] | None = None,
        place: Place | None = None,
    ) -> "DiffusionPipeline":
        """Loads a model.

        Args:
          source: a diffusers folder, or a repository on the Hugging Face Hub.
          controlnet: a ControlNet's folder or repository; the one in ``source`` if that has one.
          lora: LoRA files, folders or repositories, or files in one (``owner/name/file.safetensors``), merged into the
            weights one after the other.
          dtype: of the parameters and of the computation; float16 leaves a VAE that asks for it in float32.
          lora_scale: a factor on every LoRA.
          attention: the attention kernel.
          revision: branch, tag or commit of ``source``.
          variant: of the weight files, such as ``"fp16"``, for the parts and the ControlNet that have it.
          cache_dir: of the hub's files.
          local_files_only: never ask the hub.
          controlnet_revision: branch, tag or commit of ``controlnet``.
          tokenizer: folder or repository of another (first) tokenizer than the one in ``source``.
          untrained: parts that get random parameters instead of the folder's, and a key for each: what is needed of
            them is ``config.json``. With ``None`` for a key they get none, and the pipeline only tells and saves what
            it is.
          place: puts each loaded parameter on devices; ``None`` is the default device.

        Raises:
          WeightsError: if something is missing, or of another family, or does not fit.
          ConfigError: if a configuration cannot be built.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = ModelFolder(str(Path(source).expanduser()), **hub)
        index = read_index(folder)
        tokenizers, files = _load_tokenizers(folder, index, tokenizer, cache_dir)
        schedule = load_schedule(folder)
        names = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if _is_present(index, name)]
        if controlnet is None and _is_present(index, "controlnet"):
            names.append("controlnet")
        upcast = jnp.dtype(dtype) == jnp.float16 and folder.part("vae").read_json("config.json").get(
            "force_upcast", True
        )
        sources = {name: {"source": str(source), "subfolder": name, "variant": variant, **hub} for name in names}
        models = {}
        for name in names:
            of_part = jnp.float32 if name == "vae" and upcast else dtype
            if untrained is not None and name in untrained:
                module, key = build_module(folder.part(name), of_part, attention=attention), untrained[name]
                models[name] = module, None if key is None else module.random_params(key)
                continue
            models[name] = load_model(**sources[name], dtype=of_part, attention=attention, place=place)
        if controlnet is not None:
            of_controlnet = {**hub, "revision": controlnet_revision}
            sources["controlnet"] = {**_find_controlnet(controlnet, of_controlnet), "variant": variant}
            models["controlnet"] = _load_controlnet(
                sources["controlnet"], dtype=dtype, attention=attention, place=place
            )
        pipeline = cls(
            modules={name: module for name, (module, _) in models.items()},
            params={name: params for name, (_, params) in models.items() if params is not None},
            tokenizers=tokenizers,
            schedule=schedule,
            tokenizer_files=files,
            sources=sources,
            zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in models)),
        )
        for file in [lora] if isinstance(lora, str | Path) else lora or ():
            pipeline.merge_lora(file, lora_scale, cache_dir=cache_dir, local_files_only=local_files_only)
        return pipeline

    @property
    def task(self) -> str | None:
        """``"text-to-image"``, ``"edit"`` or ``"inpaint"``; ``None`` for a UNet that is for none of them."""
        latents = self.modules["vae"].config.latent_channels
        tasks = {latents: "text-to-image", 2 * latents: "edit", 2 * latents + 1: "inpaint"}
        return tasks.get(self.modules["unet"].config.in_channels)

    @property
    def is_xl(self) -> bool:
        """Whether this is an SDXL model."""
        return self.modules["unet"].config.addition_embed_type == "text_time"

    def check_lora(self, source: str | Path, **hub: Any) -> None:
        """Refuses what `merge_lora` would refuse with `WeightsError`; needs the LoRA, but not the model's weights."""
        names = ("unet", "text_encoder", "text_encoder_2")
        load_lora(source, {name: self.modules[name].abstract_params() for name in names if name in self.modules}, **hub)

    def merge_lora(self, source: str | Path, scale: float | int = 1.0, **hub: Any) -> None:
        """Merges a LoRA into the weights; raises `WeightsError` if it is not one for this model."""
        parts = {name: self.params.get(name) for name in ("unet", "text_encoder", "text_encoder_2")}
        for part, lora in load_lora(source, {k: v for k, v in parts.items() if v is not None}, **hub).items():
            self.params[part] = merge_lora(self.params[part], lora, float(scale))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Picture | Sequence[Picture] | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        *,
        mask_image: Picture | Sequence[Picture] | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance_scale: float | int | None = None,
        image_guidance_scale: float | int | None = None,
        controlnet_conditioning_scale: float | int = 1.0,
        sampler: Sampler | None = None,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        latents: Float[np.ndarray, "b h w c"] | Float[Array, "b h w c"] | None = None,
        noise: Float[np.ndarray, "m b h w c"] | Float[Array, "m b h w c"] | None = None,
        shared_attention: Sequence[float] | None = None,
        on_step: Callable[[int], Any] | None = None,
    ) -> UInt8[np.ndarray, "b height width 3"]:
        """Generates one image for each prompt.

        Args:
          prompt: one text, or several.
          image: what to edit or to paint into, one for all prompts or one for each (a list, or an array with four
            axes); for models that take it.
          control_image: the ControlNet's condition, likewise.
          mask_image: white where an inpainting model shall paint.
          negative_prompt: the text that guidance leads away from; ``None`` is the model's null text.
          steps: network evaluations of the sampler; ``None`` is 4 for the samplers of few-step students, or as many as
            a generator was trained for, else 50.
          guidance_scale: of the text; 1 or less is no guidance. A model with a guidance embedding takes it as an input.
            ``None`` is 7.5, and none for a generator, which was trained to need none.
          image_guidance_scale: of the image, for InstructPix2Pix; 1 needs two passes a step instead of three, and less
            is no guidance, neither of image nor of text. ``None`` is 1.5, and none for a generator.
          controlnet_conditioning_scale: a factor on the ControlNet's outputs.
          sampler: ``None`` is what the folder's scheduler says.
          timesteps: times of one's own instead of ``steps``, see `times`.
          height: in pixels; ``None`` is the given image's, or the model's own.
          width: likewise.
          seed: image i is that of seed + i, whatever the size of the batch.
          latents: noise to start from instead, N(0, I), [b, h, w, c].
          noise: what a stochastic sampler adds instead, [steps - 1, b, h, w, c].
          shared_attention: makes pairs by prompt-to-prompt: the first half of the prompts are the sources, the second
            half, in the same order, the variants. Each starts from the noise of its source, and takes its attention in
            this part of the steps, from the first on; see `codi_jax.models.prompt_to_prompt`.
          on_step: called with the index of every step that is done.

        Returns:
          The images.

        Raises:
          ValueError: if arguments do not fit the model or each other.
          FloatingPointError: if the model gave NaN or infinity.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt: give at least one.")
        sampler = sampler or default_sampler(self.schedule)
        is_generator = self.schedule.generator_timesteps is not None
        defaults = (1.0, 1.0) if is_generator else (_GUIDANCE_SCALE, _IMAGE_GUIDANCE_SCALE)
        guidance_scale = defaults[0] if guidance_scale is None else guidance_scale
        image_guidance_scale = defaults[1] if image_guidance_scale is None else image_guidance_scale
        times = self.times(steps, sampler, timesteps)
        size = self._size(height, width, image if image is not None else control_image)
        inputs = {
            **self._text_inputs(prompts, negative_prompt),
            **self._image_inputs(len(prompts), size, image, mask_image, control_image),
            **self._noise_inputs(len(prompts), size, sampler, len(times), seed, latents, noise),
            **_sharing_inputs(len(prompts), times, shared_attention),
            "timesteps": times,
            "num_steps": None,
            "guidance_scale": np.float32(guidance_scale),
            "image_guidance_scale": np.float32(image_guidance_scale),
            "control_scale": np.float32(controlnet_conditioning_scale),
        }
        if shared_attention is not None and latents is None:
            inputs["z"] = _of_sources(inputs["z"], axis=0)
            inputs["noise"] = None if inputs["noise"] is None else _of_sources(inputs["noise"], axis=1)
        if sampler in COUNTED:
            inputs = _padded(inputs)
        config = self.modules["unet"].config
        program = Program(
            modules=tuple(sorted(self.modules.items())),
            sampler=sampler,
            guidance=choose_guidance(
                guidance_scale,
                image_guidance_scale,
                embeds_guidance=config.time_cond_proj_dim is not None,
                edits=self.task == "edit",
            ),
            zero_null_text=negative_prompt is None and self.zeros_for_empty_prompt,
            on_step=self._reporter if on_step else None,
        )
        self._reporter.listener = on_step
        try:
            images, finite = self._run(program, inputs)
        finally:
            self._reporter.listener = None
        if not finite.all():
            raise FloatingPointError(
                f"image {int(np.argmin(finite))} has NaN or infinite values: with float16 try bfloat16 or float32; "
                "else the weights are broken."
            )
        return images

    def check(
        self,
        image: Picture | Sequence[Picture] | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        *,
        mask_image: Picture | Sequence[Picture] | None = None,
        steps: int | None = None,
        sampler: Sampler | None = None,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Refuses arguments of a call that do not fit the model or each other, as the call would; needs no weights.

        Args:
          image: this and the others are those of `__call__`.
          control_image: likewise.
          mask_image: likewise.
          steps: likewise.
          sampler: likewise.
          timesteps: likewise.
          height: likewise.
          width: likewise.

        Raises:
          ValueError: if the call would raise it.
        """
        self.times(steps, sampler, timesteps)
        self._size(height, width, image if image is not None else control_image)
        self._check_given(image, mask_image, control_image)

    def times(
        self, steps: int | None = None, sampler: Sampler | None = None, timesteps: Sequence[int] | None = None
    ) -> Num[np.ndarray, " n"]:
        """The training times at which a call with these arguments evaluates the network.

        Args:
          steps: see `__call__`.
          sampler: likewise.
          timesteps: descending times of one's own, such as ``[399]`` of a one-step generator.

        Raises:
          ValueError: if the sampler has not so many times, or cannot visit those given.
        """
        sampler = sampler or default_sampler(self.schedule)
        if timesteps is None:
            few = {"lcm": self.schedule.original_inference_steps, "codi": self.schedule.distill_learning_steps}
            default = min(_FEW_STEPS, few[sampler] or _FEW_STEPS) if sampler in few else _MANY_STEPS
            if sampler == "lcm" and self.schedule.generator_timesteps is not None:
                default = len(self.schedule.generator_timesteps)
            return timesteps_for(sampler, self.schedule, default if steps is None else steps)
        times, T = np.asarray(timesteps, np.int32), self.schedule.num_train_timesteps
        if steps not in (None, len(times)):
            raise ValueError(f"steps = {steps}, but timesteps has {len(times)} times: leave out one of the two.")
        if not len(times) or np.any(np.diff(times) >= 0) or times[0] >= T or times[-1] < 0:
            raise ValueError(f"timesteps = {times.tolist()}: they must descend, and lie in 0 to {T - 1}.")
        if sampler == "pndm" or (sampler == "ddim" and len(times) > 1):
            raise ValueError(f"the sampler {sampler} takes even steps only: with timesteps use another, such as lcm.")
        return times

    def save_pretrained(self, folder: str | Path, *, dtype: DTypeLike | Mapping[str, DTypeLike] | None = None) -> None:
        """Writes the model as a diffusers folder, which diffusers loads with the class that fits the task.

        Args:
          folder: new, or one whose parts are replaced; what the pipeline has no parameters of stays as it is.
          dtype: of the weight files, of all modules or of each by its name; ``None`` keeps each parameter's own.

        Raises:
          WeightsError: if something cannot be written. Every part is written whole or not at all, ``model_index.json``
            last.
        """
        folder = Path(folder).expanduser()
        for name, params in self.params.items():
            of_file = dtype.get(name) if isinstance(dtype, Mapping) else dtype
            save_model(folder, name, self.modules[name], params, dtype=of_file)
        if jax.process_index() != 0:
            return
        try:
            for name, files in self.tokenizer_files.items():
                (folder / name).mkdir(parents=True, exist_ok=True)
                for file in files:
                    if file.parent.resolve() != (folder / name).resolve():
                        shutil.copyfile(file, folder / name / file.name)
            self.schedule.save_pretrained(folder)
            unfinished = folder / ".model_index.json"
            unfinished.write_text(json.dumps(self._index(), indent=2) + "\n", encoding="utf-8")
            unfinished.replace(folder / "model_index.json")
        except OSError as error:
            raise WeightsError(f"Could not save {folder}: {error.strerror or error}.") from error

    def _index(self) -> dict[str, Any]:
        encoders = {
            name: ["transformers", "CLIPTextModelWithProjection" if module.config.with_projection else "CLIPTextModel"]
            for name, module in self.modules.items()
            if name.startswith("text_encoder")
        }
        index: dict[str, Any] = {
            "_class_name": self._diffusers_class(),
            "_diffusers_version": importlib.metadata.version("diffusers"),  # without it inpainting models fail to load
            "scheduler": ["diffusers", self.schedule.scheduler],
            **{name: ["transformers", "CLIPTokenizer"] for name in self.tokenizers},
            **encoders,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        if "controlnet" in self.modules:
            index["controlnet"] = ["diffusers", "ControlNetModel"]
        if self.is_xl:
            return {**index, "force_zeros_for_empty_prompt": self.zeros_for_empty_prompt}
        absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
        return {**index, **absent, "requires_safety_checker": False}

    def _diffusers_class(self) -> str:
        family = "StableDiffusionXL" if self.is_xl else "StableDiffusion"
        task = {"text-to-image": "", "edit": "InstructPix2Pix", "inpaint": "Inpaint"}[self.task or ""]
        # diffusers has no InstructPix2Pix with a ControlNet: it then loads the model without.
        control = "ControlNet" if "controlnet" in self.modules and self.task != "edit" else ""
        embeds_guidance = self.modules["unet"].config.time_cond_proj_dim is not None
        if embeds_guidance and not (self.is_xl or control or task):
            return "LatentConsistencyModelPipeline"
        return f"{family}{control}{task}Pipeline"

    def _run(self, program: Program, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Runs the program, compiled once for each kind of input; measures both apart."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        arguments = {name: self.params[name] for name in self.modules}, self.schedule, inputs
        leaves, tree = jax.tree.flatten(arguments)
        key = (program, tree, *map(jax.typeof, leaves))
        start = time.perf_counter()
        if key not in self._compiled:
            with sharding.context_of(self.params):
                self._compiled[key] = _jitted_generate.lower(*arguments, program).compile()
        compiled = time.perf_counter()
        images, finite = sharding.fetch(self._compiled[key](*arguments))
        jax.effects_barrier()
        self.compile_seconds, self.seconds = compiled - start, time.perf_counter() - compiled
        return images, finite

    def _size(self, height: int | None, width: int | None, picture: Any) -> tuple[int, int]:
        """The size of the images, in pixels, checked against what the VAE can halve."""
        downscale = self.modules["vae"].config.downscale
        if picture is not None and (height is None or width is None):
            picture = as_list(picture)[0]
            own = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
            default = tuple(side - side % downscale for side in own)
        else:
            sample_size = self.modules["unet"].config.sample_size or 64
            sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            default = tuple(side * downscale for side in sides)
        size = (default[0] if height is None else height, default[1] if width is None else width)
        if size[0] % downscale or size[1] % downscale or min(size) <= 0:
            raise ValueError(
                f"height = {size[0]}, width = {size[1]}: this model makes images whose sides are multiples of "
                f"{downscale} pixels."
            )
        return size

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Int[np.ndarray, "n s"]]:
        """Token ids for every text encoder, by its name; raises as `codi_jax.pipeline.text.tokenize`."""
        encoders = {name.replace("tokenizer", "text_encoder"): each for name, each in self.tokenizers.items()}
        return {name: tokenize(tokenizer, prompts, self.modules[name]) for name, tokenizer in encoders.items()}

    def _text_inputs(self, prompts: Sequence[str], negative_prompt: str | None) -> dict[str, Any]:
        null = self.tokenize([negative_prompt or ""])
        repeated = {name: ids.repeat(len(prompts), axis=0) for name, ids in null.items()}
        return {"ids": self.tokenize(prompts), "null_ids": repeated}

    def _image_inputs(
        self, batch: int, size: tuple[int, int], image: Any, mask_image: Any, control_image: Any
    ) -> dict[str, Any]:
        self._check_given(image, mask_image, control_image)
        inputs: dict[str, Any] = {}
        if image is not None:
            inputs["image"] = 2 * stack_pictures(image, batch, lambda each: to_pixels(each, size), "image") - 1
        if mask_image is not None:
            inputs["mask"] = stack_pictures(mask_image, batch, lambda each: to_mask(each, size), "mask_image")
        if control_image is not None:
            inputs["control"] = stack_pictures(
                control_image, batch, lambda each: to_pixels(each, size), "control_image"
            )
        if self.is_xl:
            # Original size, crop corner, target size: what SDXL was told of its training images.
            inputs["time_ids"] = np.asarray([[*size, 0, 0, *size]] * batch, np.float32)
        return inputs

    def _check_given(self, image: Any, mask_image: Any, control_image: Any) -> None:
        task, takes_control = self.task, "controlnet" in self.modules
        if image is None and task != "text-to-image":
            raise ValueError(f"this model is for the task {task!r}: give it an image.")
        if image is not None and task == "text-to-image":
            raise ValueError(
                "this model has 4 input channels and takes no image: use an InstructPix2Pix model (8 channels) to "
                "edit, an inpainting model (9 channels) to fill in, or a ControlNet with control_image."
            )
        if (mask_image is not None) != (task == "inpaint"):
            raise ValueError(
                "an inpainting model needs mask_image, white where it shall paint."
                if task == "inpaint"
                else f"mask_image is for inpainting models (9 channels), and this one is for the task {task!r}."
            )
        if (control_image is not None) != takes_control:
            raise ValueError(
                "the pipeline has a ControlNet: give it a control_image."
                if takes_control
                else "control_image needs a ControlNet: load one with controlnet=."
            )

    def _noise_inputs(
        self,
        batch: int,
        size: tuple[int, int],
        sampler: Sampler,
        steps: int,
        seed: int,
        latents: Any,
        noise: Any,
    ) -> dict[str, Any]:
        vae = self.modules["vae"].config
        shape = (size[0] // vae.downscale, size[1] // vae.downscale, vae.latent_channels)
        keys = [jax.random.key(seed + i) for i in range(batch)]
        if latents is None:
            latents = jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys])
        if latents.shape != (batch, *shape):
            raise ValueError(f"latents have shape {list(latents.shape)}, but {[batch, *shape]} is needed.")
        if not is_stochastic(sampler):
            noise = None
        elif noise is None:
            more = (steps - 1, *shape)
            noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, 1), more) for key in keys], axis=1)
        elif noise.shape != (steps - 1, batch, *shape):
            raise ValueError(f"noise has shape {list(noise.shape)}, but {[steps - 1, batch, *shape]} is needed.")
        return {"z": latents, "noise": noise}


def _sharing_inputs(batch: int, times: np.ndarray, shared_attention: Sequence[float] | None) -> dict[str, Any]:
    """For each pair the time down to which attention is shared, itself not included."""
    if shared_attention is None:
        return {}
    if 2 * len(shared_attention) != batch or not all(0 <= share <= 1 for share in shared_attention):
        raise ValueError(
            f"shared_attention = {list(shared_attention)} with {batch} prompts: give a number from 0 to 1 for each "
            "pair of them."
        )
    ends = np.append(times, -1)[np.rint(np.asarray(shared_attention) * len(times)).astype(int)]
    return {"shared_until": ends.astype(np.float32)}


def _of_sources(noise: Any, axis: int) -> Array:
    """The noise of the first half of a batch, for both halves."""
    first, _ = jnp.split(noise, 2, axis=axis)
    return jnp.concatenate([first, first], axis=axis)


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with room for more steps, so that the same program serves other numbers of them."""
    steps = len(inputs["timesteps"])
    room = next((room for room in _ROOMS if steps <= room), steps)
    noise = inputs["noise"]
    if noise is not None:
        noise = jnp.pad(noise, [(0, room - steps), *[(0, 0)] * (noise.ndim - 1)])
    times = np.pad(inputs["timesteps"], (0, room - steps), mode="edge")
    return {**inputs, "timesteps": times, "num_steps": np.int32(steps), "noise": noise}


def resolve_dtype(name: DType) -> DTypeLike:
    """The dtype of that name; auto is bfloat16 on GPU and TPU, float32 on a CPU."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def open_pipeline(
    source: str | Path, controlnet: str | Path | None = None, *, revision: str | None = None
) -> DiffusionPipeline:
    """A model without its weights: what can be checked before they are downloaded and read.

    Args:
      source: see `DiffusionPipeline.from_pretrained`.
      controlnet: likewise.
      revision: likewise.

    Raises:
      WeightsError: likewise.
      ConfigError: likewise.
    """
    pipeline = DiffusionPipeline.from_pretrained(source, revision=revision, untrained=dict.fromkeys(_PARTS))
    if controlnet is None:
        return pipeline
    folder = ModelFolder(**_find_controlnet(controlnet, {}))
    modules = pipeline.modules | {"controlnet": _require_controlnet(build_module(folder), folder.source)}
    return dataclasses.replace(pipeline, modules=modules)


class _StepReporter:
    """Tells the caller about steps. JAX keeps it with the compiled program, so it must not hold the pipeline."""

    listener: Callable[[int], Any] | None = None

    def __call__(self, step: Any) -> None:
        if self.listener is not None:
            self.listener(int(step))


def _check_controlnet(modules: Mapping[str, Any]) -> None:
    unet, controlnet = modules["unet"].config, modules["controlnet"].config
    if controlnet.in_channels != modules["vae"].config.latent_channels:
        raise ConfigError(
            f"the ControlNet has in_channels = {controlnet.in_channels}, but it gets the noisy latents alone, "
            f"{modules['vae'].config.latent_channels} channels."
        )
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        values = [getattr(config, key) for config in (controlnet, unet)]
        if len({value if isinstance(value, tuple) else (value,) * unet.num_blocks for value in values}) > 1:
            raise ConfigError(
                f"the ControlNet has {key} = {values[0]} and the UNet {values[1]}: take a ControlNet that was made for "
                "this model's family."
            )


def read_index(folder: ModelFolder) -> dict[str, Any]:
    """The ``model_index.json`` of a model, which says what its parts are.

    Raises:
      WeightsError: if there is none, or it is that of a pipeline which is not supported.
    """
    index = folder.read_json("model_index.json")
    what, absent = index.get("_class_name"), [name for name in _REQUIRED if not _is_present(index, name)]
    if absent:
        raise WeightsError(
            f"{folder}/model_index.json describes a {what} without {' and '.join(absent)}: it is no Stable Diffusion "
            f"1.x, 2.x or XL model; supported are {_SUPPORTED}."
        )
    for name, classes in _REQUIRED.items():
        found = str(index[name][-1])
        if found.removeprefix("Flax") not in classes:
            raise WeightsError(
                f"{folder}/model_index.json describes a {what} whose {name} is {found}, not {' or '.join(classes)}; "
                f"supported are {_SUPPORTED}."
            )
    return index


def load_schedule(folder: ModelFolder) -> NoiseSchedule:
    """The noise schedule of a model, without the rest of it.

    Raises:
      WeightsError: if the folder has none.
      ConfigError: if it cannot be computed.
    """
    scheduler = folder.part("scheduler")
    return NoiseSchedule.from_config(scheduler.read_json(CONFIG_NAME), f"{scheduler}/{CONFIG_NAME}")


def _load_tokenizers(
    folder: ModelFolder, index: Mapping[str, Any], other: str | Path | None, cache_dir: str | Path | None
) -> tuple[dict[str, CLIPTokenizer], dict[str, tuple[Path, ...]]]:
    """The tokenizers, the first one perhaps from elsewhere, and their files."""
    tokenizers, files = {}, {}
    for name in ("tokenizer", "tokenizer_2"):
        if _is_present(index, name):
            own = other is None or name != "tokenizer"
            files[name] = find_tokenizer(folder.part(name) if own else ModelFolder(str(other), cache_dir=cache_dir))
            tokenizers[name] = CLIPTokenizer.from_pretrained(files[name][0].parent)
    return tokenizers, files


def _is_present(index: Mapping[str, Any], name: str) -> bool:
    return bool(index.get(name)) and index[name][0] is not None


def _find_controlnet(source: str | Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Where `load_model` finds it. It is published on its own; a training run's output has it among other parts."""
    folder = ModelFolder(str(Path(source).expanduser()), **hub)
    subfolder = "controlnet" if folder.find("config.json") is None else None
    return {"source": folder.source, "subfolder": subfolder, **hub}


def _load_controlnet(source: dict[str, Any], **options: Any) -> tuple[Model, Params]:
    module, params = load_model(**source, **options)
    return _require_controlnet(module, source["source"]), params


def _require_controlnet(module: Model, source: str) -> ControlNet:
    if not isinstance(module, ControlNet):
        raise WeightsError(f"{source} is a {type(module).__name__}, not a ControlNet.")
    return module
