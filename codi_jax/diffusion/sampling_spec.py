"""How to sample a model: the part of ``scheduler_config.json`` that training a student changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codi_jax.diffusion.scheduler_config import (
    GENERATOR_TIMESTEPS,
    SCHEDULER_OF,
    DistillationGrid,
    NoiseLevels,
    SamplerName,
    TimestepSpacing,
)

_FEW_STEPS, _MANY_STEPS = 4, 50  # of a distilled student; of diffusers' pipelines
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_WITH_LEVELS = ("euler", "heun", "dpm-solver++", "dpm-solver++-sde", "unipc")  # which diffusers lets choose them
_GUIDANCE_SCALES = (7.5, 1.5)  # of the text and of the source image, in diffusers' pipelines


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How to sample a model, as its ``scheduler_config.json`` says.

    A model is sampled the way it was last trained for. A training method creates the spec with one of the class
    methods; it is saved with the student's noise schedule, see `codi_jax.diffusion.schedule.NoiseSchedule.sampled`.

    Examples:
      >>> schedule = schedule.sampled(SamplingSpec.lcm(num_steps=50))

    Attributes:
      scheduler: the diffusers class that the file names.
      sampler: the equivalent sampler; ``None`` if there is none.
      timestep_spacing: how the times of a many-step sampler are spread over 0 … T−1.
      steps_offset: added to the times of leading spacing.
      set_alpha_to_one: whether ᾱ_{−1}, where the last step of a sampler ends, is 1; otherwise it is ᾱ_0.
      levels: how the noise levels of a sampler in σ/α lie between the first and the last one.
      grid_steps: N, the size of the grid that a few-step student was distilled on; ``None`` if the sampler needs a grid
        but the file has none.
      grid: which grid, see `codi_jax.diffusion.schedule.distillation_grid`.
      timestep_scaling: the factor from t to τ in the boundary scalings of a consistency function.
      timesteps: the descending times that a generator was trained at; ``None`` for other models.
    """

    scheduler: str
    sampler: SamplerName | None
    timestep_spacing: TimestepSpacing = "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = True
    levels: NoiseLevels = "spaced"
    grid_steps: int | None = 50
    grid: DistillationGrid = "trailing"
    timestep_scaling: float = 10.0
    timesteps: tuple[int, ...] | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any], sampler: SamplerName | None = None) -> "SamplingSpec":
        """Reads the checked values of a file.

        Args:
          values: from `codi_jax.diffusion.scheduler_config.read_values`.
          sampler: the sampler to read them for. Default: the one that the file asks for.
        """
        is_codi, times = values["distill_learning_steps"] is not None, values[GENERATOR_TIMESTEPS]
        sampler = sampler or _sampler_of(values)
        return cls(
            scheduler=values["_class_name"],
            sampler=sampler,
            timestep_spacing=values["timestep_spacing"],
            steps_offset=values["steps_offset"],
            set_alpha_to_one=values["set_alpha_to_one"],
            levels=_levels_of(values) if sampler in _WITH_LEVELS else "spaced",
            grid_steps=values["distill_learning_steps" if sampler == "codi" else "original_inference_steps"],
            grid=values["distill_grid"] if sampler == "codi" else "trailing",
            timestep_scaling=float(values["distill_timestep_scaling" if is_codi else "timestep_scaling"]),
            timesteps=None if times is None else tuple(times),
        )

    @classmethod
    def codi(
        cls, num_steps: int, grid: DistillationGrid = "trailing", timestep_scaling: float = 10.0
    ) -> "SamplingSpec":
        """The spec of a CoDi student: the grid that it is trained on is saved with it.

        The other keys make stock diffusers sample the student almost as the sampler ``codi`` does: DDIM steps on evenly
        spread times, the last of which ends at x̂. (diffusers warns that it ignores the ``distill_`` keys.)

        Args:
          num_steps: N of `codi_jax.diffusion.schedule.distillation_grid`.
          grid: which grid.
          timestep_scaling: the factor from t to τ in the boundary scalings.
        """
        return cls(
            scheduler="DDIMScheduler",
            sampler="codi",
            timestep_spacing=grid,
            steps_offset=1 if grid == "trailing" else 0,  # trailing times have no offset
            grid_steps=num_steps,
            grid=grid,
            timestep_scaling=timestep_scaling,
        )

    @classmethod
    def lcm(cls, num_steps: int = 50, timestep_scaling: float = 10.0) -> "SamplingSpec":
        """The spec of an LCM student; the defaults match published students.

        Args:
          num_steps: N of `codi_jax.diffusion.schedule.distillation_grid`.
          timestep_scaling: the factor from t to τ in the boundary scalings.
        """
        return cls(
            scheduler="LCMScheduler",
            sampler="lcm",
            timestep_spacing="leading",  # the class's default, which its times do not depend on
            grid_steps=num_steps,
            timestep_scaling=float(timestep_scaling),
        )

    @classmethod
    def tcd(cls, num_steps: int = 50) -> "SamplingSpec":
        """The spec of a TCD student; the default matches published students.

        Args:
          num_steps: N of `codi_jax.diffusion.schedule.distillation_grid`.
        """
        return cls(scheduler="TCDScheduler", sampler="tcd", timestep_spacing="leading", grid_steps=num_steps)

    @classmethod
    def generator(cls, timesteps: Sequence[int]) -> "SamplingSpec":
        """The spec of a generator that is sampled at these descending times, by the LCM sampler.

        diffusers samples it with its ``LCMScheduler`` when given the times: ``timesteps=[399]``.
        """
        return cls(scheduler="LCMScheduler", sampler="lcm", timestep_spacing="leading", timesteps=tuple(timesteps))

    @classmethod
    def many_steps(cls) -> "SamplingSpec":
        """DDIM at trailing times, which also suit a signal of zero at the last time (Lin et al., 2024, section 3.3)."""
        return cls(scheduler="DDIMScheduler", sampler="ddim")

    def to_config(self) -> dict[str, Any]:
        """The keys of ``scheduler_config.json``, except the noise's, for a spec made by the class methods."""
        # With any other offset, diffusers' pipelines warn that the file is outdated.
        keys: dict[str, Any] = {
            "_class_name": self.scheduler, "clip_sample": False, "steps_offset": self.steps_offset,
        }  # fmt: skip
        if self.scheduler == "DDIMScheduler":
            keys |= {"timestep_spacing": self.timestep_spacing, "set_alpha_to_one": self.set_alpha_to_one}
        if self.sampler == "codi":
            return keys | {
                "distill_learning_steps": self.grid_steps,
                "distill_grid": self.grid,
                "distill_timestep_scaling": self.timestep_scaling,
            }
        if self.timesteps is not None:
            return keys | {GENERATOR_TIMESTEPS: [*self.timesteps]}
        if self.scheduler in _FEW_STEP_SCHEDULERS:
            keys |= {"original_inference_steps": self.grid_steps, "timestep_scaling": self.timestep_scaling}
        return keys

    @property
    def is_of_student(self) -> bool:
        """Whether the model was distilled for few steps."""
        return self.sampler == "codi" or self.timesteps is not None or self.scheduler in _FEW_STEP_SCHEDULERS

    @property
    def default_guidance_scales(self) -> tuple[float, float]:
        """The guidance scales of text and source image; a generator was trained to need no guidance."""
        return (1.0, 1.0) if self.timesteps is not None else _GUIDANCE_SCALES

    def default_steps(self, sampler: SamplerName) -> int:
        """The default number of steps of this sampler: few for a student, 50 for other models."""
        if sampler not in ("lcm", "codi", "tcd"):
            return _MANY_STEPS
        if sampler == "lcm" and self.timesteps is not None:
            return len(self.timesteps)
        return min(_FEW_STEPS, self.grid_steps or _FEW_STEPS)

    def most_steps(self, wanted: int) -> int:
        """This many steps, or as many as the model can take if it was distilled for fewer."""
        if self.timesteps is not None:
            return min(wanted, len(self.timesteps))
        has_grid = self.sampler in ("lcm", "codi", "tcd")
        return min(wanted, self.grid_steps) if has_grid and self.grid_steps else wanted


def _sampler_of(values: Mapping[str, Any]) -> SamplerName | None:
    if values["distill_learning_steps"] is not None:
        return "codi"
    # A file that diffusers switched to another class keeps the entry, which that class does not read.
    is_dpm_solver = values["_class_name"] == SCHEDULER_OF["dpm-solver++-sde"]
    if is_dpm_solver and values.get("algorithm_type") == "sde-dpmsolver++":
        return "dpm-solver++-sde"
    for sampler, scheduler in SCHEDULER_OF.items():
        if scheduler == values["_class_name"]:
            return sampler
    return None


def _levels_of(values: Mapping[str, Any]) -> NoiseLevels:
    names: tuple[NoiseLevels, ...] = ("karras", "exponential", "beta")
    for name in names:
        if values.get(f"use_{name}_sigmas"):
            return name
    return "spaced"
