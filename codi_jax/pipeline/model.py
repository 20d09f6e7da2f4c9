"""A complete Stable Diffusion model: generate with it, save it.

The model determines the task: text-to-image (4 input channels, as many as the latents), InstructPix2Pix editing (8) or
inpainting (9), each with or without a ControlNet; SD 1.x, 2.x and SDXL.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8

from codi_jax.diffusion.guidance import Guidance, choose_guidance
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for, visited_times
from codi_jax.io.images import Picture
from codi_jax.io.lora_files import load_lora
from codi_jax.io.state_dict import PlaceFn
from codi_jax.models.config import ConfigError, Params
from codi_jax.models.kernels.attention import Implementation
from codi_jax.models.lora import merge_lora
from codi_jax.pipeline import loading, saving, words
from codi_jax.pipeline.call_inputs import check_images, image_size, make_inputs, skipped_times
from codi_jax.pipeline.generation import Program, split_over_devices
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.programs import Programs
from codi_jax.pipeline.text import prompt_inputs, tokenize

_ADAPTABLE = ("unet", "text_encoder", "text_encoder_2")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with all its parts. Immutable: methods that change something return a new model.

    Examples:
      >>> model = Model.from_pretrained("assets/avatars")
      >>> images = model("a planet with a ring", steps=20, guidance_scale=3, seed=1)  # uint8, [1, height, width, 3]

    Attributes:
      networks: the networks, static.
      params: their parameters, by name. A model without some or all of them can still be inspected and saved.
      schedule: the noise schedule, with `sampling`.
      tokenizers: ``tokenizer`` and, for SDXL, ``tokenizer_2``.
      tokenizer_files: the files of each tokenizer, which `save_pretrained` copies.
      sources: where each network was loaded from, as arguments of `codi_jax.io.weights.load_model`.
      zeros_for_empty_prompt: whether the null text is zeros, SDXL's ``force_zeros_for_empty_prompt``.
      programs: compiled programs.
    """

    networks: Networks
    params: Mapping[str, Params]
    schedule: NoiseSchedule | Any  # None for an autoencoder alone
    tokenizers: Mapping[str, Any]
    tokenizer_files: Mapping[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    zeros_for_empty_prompt: bool = False
    programs: Programs = dataclasses.field(default_factory=Programs)

    def __post_init__(self) -> None:
        if self.networks.unet is None:  # an autoencoder alone
            return
        if self.task is None:
            latents = self.networks.vae.config.latent_channels
            raise ConfigError(
                f"the UNet has in_channels = {self.networks.unet.config.in_channels}; with this VAE codi_jax can "
                f"sample models with {latents} (text-to-image), {2 * latents} (InstructPix2Pix) and {2 * latents + 1} "
                "(inpainting)."
            )
        if self.networks.controlnet is not None:
            loading.check_controlnet(self.networks)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        controlnet: str | Path | Sequence[str | Path] | None = None,
        lora: str | Path | Sequence[str | Path | tuple[str | Path, float | int]] | None = None,
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
        config: str | Path | None = None,
        unet: str | Path | None = None,
        without_params: Collection[str] = (),
        place: PlaceFn | None = None,
    ) -> "Model":
        """Loads a model.

        Args:
          source: a diffusers folder, a repository on the Hugging Face Hub, or a single file with a complete model.
          controlnet: a ControlNet's folder or repository, or several. Default: the one in ``source``, if any.
          lora: LoRA files, folders or repositories, or files in one (``owner/name/file.safetensors``), merged into the
            weights one after another; each alone or with a scale of its own, as ``(file, scale)``.
          dtype: the dtype of parameters and computation; with float16, a VAE that asks for float32 stays in float32.
          lora_scale: a factor for every LoRA.
          attention: the attention kernel.
          revision: a branch, tag or commit of ``source``.
          variant: the variant of the weight files, such as ``"fp16"``, for the parts and the ControlNet that have it.
          cache_dir: the cache for the hub's files.
          local_files_only: never ask the hub.
          controlnet_revision: branch, tag or commit of ``controlnet``.
          tokenizer: a folder or repository whose tokenizer replaces the (first) one in ``source``.
          config: for a single file, a diffusers folder or repository with its configurations and vocabulary. Default: a
            repository of the file's family.
          unet: another UNet, such as a published student's: a file with parameters for ``source``'s own, or the folder
            or repository of a UNet or model with a configuration of its own.
          without_params: names of networks whose weights are not read: only their ``config.json`` has to exist.
          place: puts each loaded parameter on devices; ``None`` is the default device.

        Raises:
          WeightsError: if something is missing, of another family, or does not fit.
          ConfigError: if a configuration cannot be built.
        """
        model = cls(
            **loading.load_parts(
                source,
                controlnet,
                dtype=dtype,
                attention=attention,
                revision=revision,
                variant=variant,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                controlnet_revision=controlnet_revision,
                tokenizer=tokenizer,
                config=config,
                unet=unet,
                without_params=without_params,
                place=place,
            )
        )
        for each in [lora] if isinstance(lora, str | Path) else lora or ():
            file, scale = each if isinstance(each, tuple) else (each, 1.0)
            model = model.merge_lora(file, scale * lora_scale, cache_dir=cache_dir, local_files_only=local_files_only)
        return model

    @classmethod
    def open(
        cls, source: str | Path, controlnet: str | Path | Sequence[str | Path] | None = None, **options: Any
    ) -> "Model":
        """A model without its weights, for checks before they are downloaded and read.

        Args:
          source: see `from_pretrained`.
          controlnet: see `from_pretrained`.
          **options: other arguments of `from_pretrained`.

        Raises:
          WeightsError: as in `from_pretrained`.
          ConfigError: as in `from_pretrained`.
        """
        return cls.from_pretrained(source, controlnet, without_params=loading.ALL_PARTS, **options)

    @property
    def task(self) -> str | None:
        """``"text-to-image"``, ``"edit"`` or ``"inpaint"``; ``None`` for any other UNet."""
        return self.networks.task

    @property
    def sampling(self) -> SamplingSpec:
        """How to sample the model."""
        return self.schedule.sampling

    @property
    def compile_seconds(self) -> float:
        """Compile time of the last call; 0 if the program was already compiled."""
        return self.programs.compile_seconds

    @property
    def seconds(self) -> float:
        """Run time of the last call, without compilation."""
        return self.programs.seconds

    def replace(self, **changes: Any) -> "Model":
        """The model with these attributes replaced."""
        return dataclasses.replace(self, **changes)

    def with_params(self, params: Mapping[str, Params]) -> "Model":
        """The model with these parameters instead of its own, by network name."""
        return self.replace(params={**self.params, **params})

    def without_params(self, *names: str) -> "Model":
        """The model without the parameters of these networks, to free their memory."""
        return self.replace(params={name: params for name, params in self.params.items() if name not in names})

    def with_network(self, name: str, network: Any, params: Params | None = None, source: Any = None) -> "Model":
        """The model with one of its networks replaced.

        Args:
          name: the network's name.
          network: the new network; ``None`` removes it.
          params: its parameters; ``None`` if they are given later.
          source: where it was loaded from, see `sources`. Default: unchanged.
        """
        model = self.without_params(name) if params is None else self.with_params({name: params})
        sources = self.sources if source is None else {**self.sources, name: source}
        return model.replace(networks=dataclasses.replace(self.networks, **{name: network}), sources=sources)

    def add_words(self, source: str | Path, word: str | None = None, **hub: Any) -> "Model":
        """The model with words that stand for learned features (textual inversion, Gal et al., 2023).

        Examples:
          >>> model.add_words("sd-concepts-library/cat-toy")("a photo of <cat-toy>")

        Args:
          source: the file, or the folder or repository with ``learned_embeds.safetensors`` or ``.bin``.
          word: what to write in prompts. Default: the file's own words, or the file's name where it has none.
          **hub: attributes of `codi_jax.io.hub.ModelFolder`.

        Raises:
          WeightsError: if the file is not for this model, or a word already means something.
        """
        return words.add(self, source, word, **hub)

    def check_lora(self, source: str | Path, **hub: Any) -> None:
        """Raises the `WeightsError` that `merge_lora` would raise; needs the LoRA, but not the model's weights."""
        networks = self.networks.by_name()
        load_lora(source, {name: networks[name].abstract_params() for name in _ADAPTABLE if name in networks}, **hub)

    def merge_lora(self, source: str | Path, scale: float | int = 1.0, **hub: Any) -> "Model":
        """The model with a LoRA merged into its weights; raises `WeightsError` if the LoRA is not for this model."""
        parts = {name: self.params[name] for name in _ADAPTABLE if name in self.params}
        loras = load_lora(source, parts, **hub)
        return self.with_params({name: merge_lora(parts[name], lora, float(scale)) for name, lora in loras.items()})

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Picture | Sequence[Picture] | None = None,
        control_image: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        *,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float | int | None = None,
        negative_prompt: str | None = None,
        long_prompts: bool = False,
        weighted_prompts: bool = False,
        steps: int | None = None,
        guidance_scale: float | int | None = None,
        image_guidance_scale: float | int | None = None,
        guidance_rescale: float | int = 0.0,
        controlnet_conditioning_scale: float | int | Sequence[float | int] = 1.0,
        control_guidance_start: float | int | Sequence[float | int] = 0.0,
        control_guidance_end: float | int | Sequence[float | int] = 1.0,
        sampler: SamplerName | None = None,
        gamma: float | int = 0.3,
        eta: float | int = 0.0,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        latents: Float[np.ndarray, "b h w c"] | Float[Array, "b h w c"] | None = None,
        noise: Float[np.ndarray, "m b h w c"] | Float[Array, "m b h w c"] | None = None,
        shared_attention: Sequence[float] | None = None,
        on_step: Callable[[int], Any] | None = None,
    ) -> UInt8[np.ndarray, "b height width 3"]:
        """Generates one image per prompt.

        Args:
          prompt: one text, or several.
          image: the image to start from, to edit or to paint into, one for all prompts or one per prompt (a list, or an
            array with four axes).
          control_image: the ControlNet's condition, as for ``image``; for several, a list with one entry for each.
          mask_image: white where to paint; the rest of the image stays.
          strength: how much of the image to change: this part of the steps is taken, from the image with noise; with
            1 and a mask, from noise alone. Default: 0.8, or 1 with a mask. InstructPix2Pix models take none.
          negative_prompt: the text that guidance points away from. Default: the model's null text.
          long_prompts: whether prompts may have more tokens than the text encoders take, which read them in chunks;
            else the rest is cut off, with a warning.
          weighted_prompts: whether parentheses weigh words, ``(word:1.2)``, see `codi_jax.pipeline.emphasis`; prompts
            may then be long, too.
          steps: network evaluations of the sampler. Default: 4 for the samplers of few-step students, or as many as a
            generator was trained for, else 50.
          guidance_scale: the text's scale; 1 or less is no guidance. A model with a guidance embedding takes it as an
            input. Default: 7.5, or none for a generator, which was trained to need none.
          image_guidance_scale: the image's scale, for InstructPix2Pix; 1 needs two passes per step instead of three,
            and less turns off all guidance. Default: 1.5, or none for a generator.
          guidance_rescale: φ of `codi_jax.diffusion.guidance.rescaled_guidance`, for high scales without edits.
          controlnet_conditioning_scale: a factor on the ControlNet's outputs, or one for each of several.
          control_guidance_start: the part of the steps after which the ControlNet takes part, or one for each.
          control_guidance_end: the part of the steps after which it no longer does, or one for each.
          sampler: the sampler's name. Default: from the folder's scheduler.
          gamma: γ of the sampler tcd: 0 is deterministic; use more for more steps (diffusers' ``eta``).
          eta: η of the sampler ddim: 0 adds no noise, and 1 is DDPM.
          timesteps: custom times instead of ``steps``, see `times`.
          height: in pixels. Default: the given image's, or else the model's.
          width: in pixels. Default: as for ``height``.
          seed: image i has seed + i, whatever the batch size.
          latents: noise to start from, N(0, I), [b, h, w, c]. Default: random.
          noise: the noise that a stochastic sampler adds, [steps - 1, b, h, w, c]. Default: random.
          shared_attention: generates pairs by prompt-to-prompt: the first half of the prompts are the sources and the
            second half, in the same order, the variants. Each variant starts from its source's noise and uses its
            source's attention in this initial fraction of the steps; see `codi_jax.models.prompt_to_prompt`.
          on_step: called with the index of every finished step.

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
        times = self.times(steps, sampler, timesteps)
        inputs = make_inputs(
            self.networks,
            sampler,
            times,
            texts=prompt_inputs(
                self.tokenizers,
                self.networks.text_encoders,
                prompts,
                negative_prompt,
                is_long=long_prompts,
                is_weighted=weighted_prompts,
            ),
            size=image_size(self.networks, height, width, image, control_image),
            image=image,
            mask_image=mask_image,
            control_image=control_image,
            strength=strength,
            control_scale=controlnet_conditioning_scale,
            control_start=control_guidance_start,
            control_end=control_guidance_end,
            gamma=gamma,
            eta=eta,
            seed=seed,
            latents=latents,
            noise=noise,
            shared_attention=shared_attention,
        )
        return self._generate(
            sampler,
            self._guidance(guidance_scale, image_guidance_scale, guidance_rescale),
            inputs,
            zero_null_text=negative_prompt is None and self.zeros_for_empty_prompt,
            on_step=on_step,
        )

    def _guidance(self, scale: float | int | None, image_scale: float | int | None, rescale: float | int) -> Guidance:
        default, image_default = self.sampling.default_guidance_scales
        return choose_guidance(
            default if scale is None else scale,
            image_default if image_scale is None else image_scale,
            embeds_guidance=self.networks.unet.config.time_cond_proj_dim is not None,
            is_edit=self.task == "edit",
            rescale=rescale,
        )

    def _generate(
        self,
        sampler: SamplerName,
        guidance: Guidance,
        inputs: Mapping[str, Any],
        *,
        zero_null_text: bool,
        on_step: Callable[[int], Any] | None,
    ) -> UInt8[np.ndarray, "b height width 3"]:
        reporter = self.programs.reporter
        program = Program(self.networks, sampler, zero_null_text, reporter if on_step else None)
        params = {name: self.params[name] for name in self.networks.by_name()}
        guidance, arrays = jax.tree.map(jnp.asarray, (guidance, inputs))
        arguments = params, self.schedule, guidance, split_over_devices(params, arrays)
        reporter.listener = on_step
        try:
            images, finite = self.programs.run(program, *arguments)
        finally:
            reporter.listener = None
        if not finite.all():
            raise FloatingPointError(
                f"image {int(np.argmin(finite))} has NaN or infinite values: with float16 try bfloat16 or float32; "
                "else the weights are broken."
            )
        return images

    def check(
        self,
        image: Picture | Sequence[Picture] | None = None,
        control_image: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        *,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float | int | None = None,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Num[np.ndarray, " n"]:
        """Refuses arguments of a call that do not fit the model or each other, as the call would; needs no weights.

        Args:
          image: see `__call__`, as for all arguments.
          control_image: see `__call__`.
          mask_image: see `__call__`.
          strength: see `__call__`.
          steps: see `__call__`.
          sampler: see `__call__`.
          timesteps: see `__call__`.
          height: see `__call__`.
          width: see `__call__`.

        Returns:
          The training times at which the call evaluates the network.

        Raises:
          ValueError: if the call would raise one.
        """
        check_images(self.networks, image, mask_image, control_image, strength)
        image_size(self.networks, height, width, image, control_image)
        sampler = sampler or default_sampler(self.schedule)
        times = self.times(steps, sampler, timesteps)
        skipped = skipped_times(self.networks, sampler, times, image, mask_image, strength)
        return visited_times(sampler, times, skipped)

    def times(
        self, steps: int | None = None, sampler: SamplerName | None = None, timesteps: Sequence[int] | None = None
    ) -> Num[np.ndarray, " n"]:
        """The training times at which a call with these arguments evaluates the network, if it starts from noise.

        Args:
          steps: see `__call__`.
          sampler: see `__call__`.
          timesteps: custom descending times, such as ``[399]`` for a one-step generator.

        Raises:
          ValueError: if the sampler does not have that many times, or cannot visit the given ones.
        """
        sampler = sampler or default_sampler(self.schedule)
        if timesteps is None:
            default = self.schedule.read_by(sampler).sampling.default_steps(sampler)
            return timesteps_for(sampler, self.schedule, default if steps is None else steps)
        times, T = np.asarray(timesteps, np.int32), self.schedule.num_train_timesteps
        if steps not in (None, len(times)):
            raise ValueError(f"steps = {steps}, but timesteps has {len(times)} times: give only one of the two.")
        if not len(times) or np.any(np.diff(times) >= 0) or times[0] >= T or times[-1] < 0:
            raise ValueError(f"timesteps = {times.tolist()}: they must descend, and be in 0 to {T - 1}.")
        if sampler == "pndm" or (sampler == "ddim" and len(times) > 1):
            raise ValueError(f"the sampler {sampler} takes even steps only: with timesteps use another, such as lcm.")
        return times

    def save_pretrained(self, folder: str | Path, *, dtype: DTypeLike | Mapping[str, DTypeLike] | None = None) -> None:
        """Writes the model as a diffusers folder, which diffusers loads with the class that fits the task.

        Args:
          folder: a new folder, or one whose parts are replaced; parts that the model has no parameters for stay as they
            are.
          dtype: the dtype of the weight files, for all networks or by network name. Default: each parameter's own.

        Raises:
          WeightsError: if something cannot be written. Every part is written completely or not at all,
            ``model_index.json`` last.
        """
        saving.save(self, Path(folder).expanduser(), dtype)

    def save_single_file(
        self,
        path: str | Path,
        part: Literal["unet", "controlnet"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the model as one safetensors file under the names of the original code, for ComfyUI and its like.

        Examples:
          >>> model.save_single_file("mine.safetensors", dtype="float16")

        Args:
          path: the file.
          part: the UNet or the ControlNet alone. Default: everything but a ControlNet, which is in a file of its own
            there.
          dtype: precision in the file. Default: each parameter's own.
          metadata: texts by name, besides what is known of the model.

        Raises:
          WeightsError: if the model lacks parameters or takes guidance as an input, or the file cannot be written.
        """
        saving.save_single_file(self, Path(path).expanduser(), part, dtype, metadata or {})

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Int[np.ndarray, "n s"]]:
        """Token ids for every text encoder, by name; raises as `codi_jax.pipeline.text.tokenize` does."""
        encoders = self.networks.text_encoders
        by_encoder = {name.replace("tokenizer", "text_encoder"): each for name, each in self.tokenizers.items()}
        return {name: tokenize(tokenizer, prompts, encoders[name]) for name, tokenizer in by_encoder.items()}
