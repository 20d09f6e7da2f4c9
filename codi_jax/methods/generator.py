"""A generator of one or a few steps: what distribution matching trains, and how it turns noise into samples.

One step (Yin et al., 2024, arXiv:2311.18828): x = x̂(z, t*; G), a teacher's network asked at one time t* for the clean
latents of pure noise z. Several steps (DMD2, arXiv:2405.14867, section 4.4): the same at descending times, adding fresh
noise up to the next time in between, as the sampler of consistency models does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import Latents, NoiseSchedule
from codi_jax.models.config import Params
from codi_jax.models.lora import LARGEST_RANK, init_lora, merge_lora
from codi_jax.pipeline.conditions import Conditions, Frozen, Inputs
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict


@dataclasses.dataclass(frozen=True)
class GeneratorFlags(Flags):
    """What the generator is. The names are from DMD2's reference code."""

    conditioning_timestep: int = 399
    """t*, the time at which the generator receives noise."""
    denoising: bool = False
    """Train a generator of --num_denoising_step steps. Intermediate steps start from noised real images, or as
    --backward_simulation says."""
    num_denoising_step: int = 1
    """Number of steps of such a generator."""
    denoising_timestep: int = 1000
    """Its times are spread evenly below this one."""
    backward_simulation: bool = False
    """Let such a generator start from its own output of the previous steps, as in sampling."""
    generator_lora: bool = False
    """Train a LoRA on the teacher as the generator."""
    lora_rank: int = 64
    """Rank of the LoRA."""
    lora_alpha: float = 8.0
    """The LoRA's factor is alpha / rank."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "conditioning_timestep")
        self.require_at_least(1, "num_denoising_step", "denoising_timestep")
        self.require_in(1, LARGEST_RANK, "lora_rank")
        self.require_positive("lora_alpha")
        possible = self.num_denoising_step < self.denoising_timestep
        self.require("num_denoising_step", possible, f"less than --denoising_timestep {self.denoising_timestep}")
        for flag, given in (
            ("num_denoising_step", self.num_denoising_step > 1),
            ("backward_simulation", self.backward_simulation),
        ):
            if given and not self.denoising:
                raise ValueError(f"--{flag} is for generators of several steps: give --denoising, too.")

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The descending times at which the generator is trained and sampled."""
        if not self.denoising:
            return (self.conditioning_timestep,)
        stride = self.denoising_timestep // self.num_denoising_step
        return tuple(self.denoising_timestep - 1 - i * stride for i in range(self.num_denoising_step))


def generator_schedule(schedule: NoiseSchedule, flags: GeneratorFlags) -> NoiseSchedule:
    """The schedule to save with the generator: the teacher's, for the LCM sampler at the generator's times.

    Raises:
      ValueError: if the schedule does not have these times.
    """
    last = schedule.num_train_timesteps - 1
    if not 0 <= flags.timesteps[-1] <= flags.timesteps[0] <= last:
        flag, value = "conditioning_timestep", flags.conditioning_timestep
        if flags.denoising:
            flag, value = "denoising_timestep", flags.denoising_timestep
        raise ValueError(f"--{flag} {value} is off the model's schedule, which has the timesteps 0 to {last}.")
    return schedule.sampled(SamplingSpec.generator(flags.timesteps))


def init_generator(flags: GeneratorFlags, teacher_params: Params, key: Key[Array, ""]) -> Params:
    """The generator initialized as the teacher: ``unet``, or ``unet_lora``, which changes nothing yet.

    Args:
      flags: the generator's flags.
      teacher_params: the parameters of the teacher's UNet.
      key: for the LoRA.
    """
    if flags.generator_lora:
        return {"unet_lora": init_lora(key, teacher_params, flags.lora_rank, flags.lora_alpha)}
    return {"unet": teacher_params}


def generator_unet(params: Params, teacher_params: Params) -> Params:
    """The generator's UNet as one network, with a LoRA merged into the teacher's."""
    return params["unet"] if "unet" in params else merge_lora(teacher_params, params["unet_lora"])


@dataclasses.dataclass(frozen=True)
class Generator:
    """How samples are generated, for any parameters.

    Attributes:
      networks: the teacher's networks.
      flags: the generator's flags.
      latent_shape: the shape of one sample, [h, w, c], which prompts do not tell.
    """

    networks: Networks
    flags: GeneratorFlags
    latent_shape: tuple[int, int, int]

    def __call__(self, params: Params, frozen: Frozen, inputs: Inputs, key: Key[Array, ""]) -> Latents:
        """One x per condition: from noise, or from where the generator's previous step would have ended.

        Args:
          params: from `init_generator`.
          frozen: the teacher, whose ``unet`` a LoRA adapts.
          inputs: the conditions, and the real latents for a generator that starts from them.
          key: for the noise.
        """
        everything = {**frozen.params, **params}
        z, t = self._start(everything, frozen.schedule, inputs, key)
        return self._x0(everything, frozen.schedule, z, t, inputs.conditions)

    def _x0(
        self, params: Mapping[str, Any], schedule: NoiseSchedule, z: Latents, t: Int[Array, " b"], c: Conditions
    ) -> Latents:
        x0, _ = schedule.to_x0_eps(predict(self.networks, params, z, t, c), z, t)
        return x0

    def _start(
        self, params: Mapping[str, Any], schedule: NoiseSchedule, inputs: Inputs, key: Key[Array, ""]
    ) -> tuple[Latents, Int[Array, " b"]]:
        """The network's input, and its time."""
        c, B = inputs.conditions, len(inputs.conditions.full.context)
        noise_key, n_key, steps_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, (B, *self.latent_shape))
        times = jnp.asarray(self.flags.timesteps)
        if len(times) == 1:
            return noise, jnp.broadcast_to(times, (B,))
        if not self.flags.backward_simulation:
            n = jax.random.randint(n_key, (B,), 0, len(times))
            z = schedule.add_noise(inputs.z0, noise, times[n])
            return jnp.where((n == 0)[:, None, None, None], noise, z), times[n]
        # One n for all: the loop over the previous steps has the same length for every sample.
        n = jax.random.randint(n_key, (), 0, len(times))
        params = jax.lax.stop_gradient(params)

        def step(i: Array, z: Latents) -> Latents:
            x = self._x0(params, schedule, z, jnp.broadcast_to(times[i], (B,)), c)
            return schedule.add_noise(x, jax.random.normal(jax.random.fold_in(steps_key, i), x.shape), times[i + 1])

        return jax.lax.fori_loop(0, n, step, noise), jnp.broadcast_to(times[n], (B,))
