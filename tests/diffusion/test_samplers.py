"""The samplers against diffusers' schedulers and pipelines, and against NumPy in float64 from the equations.

The network is a smooth function of z and t that torch, JAX and NumPy evaluate alike.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any, get_args

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from schedulers import CLASSES, PREDICTION_TYPES, PUBLISHED, SD, SPACINGS, config_for, make, replay

from codi_jax.diffusion.noise_levels import respaced_levels
from codi_jax.diffusion.samplers import SAMPLERS, sample
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (2, 3, 4, 2)
STEPS = (1, 2, 4, 20, 50)
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.is_stochastic]
COUNTED = [name for name, sampler in SAMPLERS.items() if sampler.is_counted]
# Steps and ᾱ in float32, here and there.
TOLERANCE = 2e-5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(np.float32)


GAIN, DRIFT, OFFSET = 0.6 + 0.1 * normal(1), normal(2), normal(3)


def denoise(xp: Any) -> Callable[[Any, Any], Any]:
    """The network, in torch, jax.numpy or numpy."""
    as_array = xp.tensor if xp is torch else xp.asarray

    def prediction(z: Any, t: Any) -> Any:
        return xp.tanh(as_array(GAIN) * z + as_array(DRIFT) * (t / 1000) + as_array(OFFSET))

    return prediction


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.abs(theirs).max() > 0.01, "an output of zeros proves nothing"
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def diffusers_sample(config: dict[str, Any], z: np.ndarray, **set_timesteps: Any) -> tuple[np.ndarray, np.ndarray]:
    """The loop of diffusers' pipelines: the times, and what comes out."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(**set_timesteps)
    x, model = torch.tensor(z) * scheduler.init_noise_sigma, denoise(torch)
    for t in scheduler.timesteps:
        prediction = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return scheduler.timesteps.numpy(), x.numpy()


def our_sample(
    sampler: SamplerName, schedule: NoiseSchedule, z: np.ndarray, times: np.ndarray, noise: Any = None
) -> Any:
    noise = None if noise is None else jnp.asarray(noise)
    run = jax.jit(lambda schedule, z: sample(sampler, denoise(jnp), schedule, z, times, noise))
    return run(schedule, jnp.asarray(z))


@pytest.fixture
def replayed_noise(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Noise for 50 steps, which diffusers draws one after the other."""
    noise = normal(4, max(STEPS), *SHAPE)
    replay(noise, monkeypatch)
    return noise


# ---- Samplers against diffusers


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("sampler", "prediction_type"),
    [
        *itertools.product(["ddim", "euler", "dpm-solver++", "unipc"], PREDICTION_TYPES),
        *itertools.product(["pndm"], ["epsilon", "v_prediction"]),
    ],
)
def test_deterministic_samplers(sampler: SamplerName, prediction_type: str, spacing: str):
    config = config_for(sampler, prediction_type=prediction_type, timestep_spacing=spacing)
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    for steps in STEPS:
        times, expected = diffusers_sample(config, z, num_inference_steps=steps)
        ours = timesteps_for(sampler, schedule, steps)
        np.testing.assert_array_equal(ours, times)
        assert relative_error(our_sample(sampler, schedule, z, ours), expected) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm-solver++", "unipc"])
def test_zero_terminal_snr(sampler: SamplerName, prediction_type: str, spacing: str):
    config = config_for(sampler, prediction_type=prediction_type, timestep_spacing=spacing, rescale_betas_zero_snr=True)
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    for steps in (2, 20):
        _, expected = diffusers_sample(config, z, num_inference_steps=steps)
        ours = our_sample(sampler, schedule, z, timesteps_for(sampler, schedule, steps))
        # Euler in diffusers subtracts numbers of the size of σ/α = 4096, in float32: 4096 × 2⁻²³ = 5e-4.
        assert relative_error(ours, expected) <= (1e-3 if sampler == "euler" else TOLERANCE), steps


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_cosine_schedule(sampler: SamplerName):
    """Its ᾱ ends at 2e-9: less than the 2⁻²⁴ that stands for a zero, and not to be replaced by it."""
    config = config_for(
        sampler, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    _, expected = diffusers_sample(config, z, num_inference_steps=4)
    ours = our_sample(sampler, schedule, z, timesteps_for(sampler, schedule, 4))
    assert relative_error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_where_the_last_step_ends(sampler: SamplerName, set_alpha_to_one: bool):
    config = config_for(sampler, set_alpha_to_one=set_alpha_to_one)
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    _, expected = diffusers_sample(config, z, num_inference_steps=5)
    assert relative_error(our_sample(sampler, schedule, z, timesteps_for(sampler, schedule, 5)), expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("eta", "to_one"), [(0.4, True), (1.0, True), (1.0, False)])
def test_ddim_with_noise(eta: float, to_one: bool, prediction_type: str, spacing: str):
    """But without noise after the last step, which diffusers adds where ᾱ does not end at 1."""
    config = config_for("ddim", prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    scheduler, model, noise = diffusers.DDIMScheduler.from_config(config), denoise(torch), normal(4, 20, *SHAPE)
    for steps in (1, 2, 20):
        scheduler.set_timesteps(steps)
        x = torch.tensor(z)
        for index, (t, added) in enumerate(zip(scheduler.timesteps, torch.tensor(noise), strict=False)):
            now = eta if index < steps - 1 else 0.0
            x = scheduler.step(model(x, t), t, x, eta=now, variance_noise=added, return_dict=False)[0]
        given = jnp.asarray(noise[: steps - 1]) if steps > 1 else None
        ours = sample(
            "ddim", denoise(jnp), schedule, jnp.asarray(z), timesteps_for("ddim", schedule, steps), given, eta=eta
        )
        assert relative_error(ours, x) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral(prediction_type: str, spacing: str, replayed_noise: np.ndarray):
    sampler = "euler-ancestral"
    config = config_for(sampler, prediction_type=prediction_type, timestep_spacing=spacing)
    schedule, z, steps = NoiseSchedule.from_config(config), normal(0), 20
    times, expected = diffusers_sample(config, z, num_inference_steps=steps)
    ours = timesteps_for(sampler, schedule, steps)
    np.testing.assert_array_equal(ours, times)
    result = our_sample(sampler, schedule, z, ours, replayed_noise[: steps - 1])
    assert relative_error(result, expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dpm_solver_on_the_stochastic_equation(prediction_type: str, spacing: str, replayed_noise: np.ndarray):
    config = config_for(
        "dpm-solver++-sde", algorithm_type="sde-dpmsolver++", prediction_type=prediction_type, timestep_spacing=spacing
    )
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    assert default_sampler(schedule) == "dpm-solver++-sde"
    steps = 20
    times, expected = diffusers_sample(config, z, num_inference_steps=steps)
    ours = timesteps_for("dpm-solver++-sde", schedule, steps)
    np.testing.assert_array_equal(ours, times)
    result = our_sample("dpm-solver++-sde", schedule, z, ours, replayed_noise[: steps - 1])
    assert relative_error(result, expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_heun(prediction_type: str, spacing: str):
    config = config_for("heun", prediction_type=prediction_type, timestep_spacing=spacing)
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    assert default_sampler(schedule) == "heun"
    for steps in (1, 2, 5, 20):
        times, expected = diffusers_sample(config, z, num_inference_steps=steps)
        ours = timesteps_for("heun", schedule, steps)
        assert len(ours) == 2 * steps - 1
        np.testing.assert_array_equal(ours, times)
        # diffusers takes the difference of two numbers of the size of σ/α = 14 at the start.
        assert relative_error(our_sample("heun", schedule, z, ours), expected) <= 5 * TOLERANCE, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("levels", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm-solver++", "unipc"])
def test_other_noise_levels(sampler: SamplerName, levels: str, spacing: str):
    config = config_for(sampler, timestep_spacing=spacing, **{f"use_{levels}_sigmas": True})
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    # Their DPM-Solver and UniPC round the times of Karras' levels, as we do, but cut off the others, of 998.99… to 998.
    is_cut = sampler in ("dpm-solver++", "unipc") and levels != "karras"
    for steps in (2, 5, 20):
        times, expected = diffusers_sample(config, z, num_inference_steps=steps)
        ours = timesteps_for(sampler, schedule, steps)
        np.testing.assert_allclose(ours, times, atol=1 if is_cut else 1e-3)
        assert relative_error(our_sample(sampler, schedule, z, ours), expected) <= (2e-3 if is_cut else 1e-4), steps


def test_levels_of_karras_by_their_equation():
    """(σ_max^(1/ρ) + i/(n − 1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ with ρ = 7 (Karras et al., 2022, equation 5)."""
    made = respaced_levels(14.6, 0.03, 6, "karras")
    i, n = np.arange(6), 6
    wanted = (14.6 ** (1 / 7) + i / (n - 1) * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7
    np.testing.assert_allclose(made, wanted, rtol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", STEPS)
def test_lcm(steps: int, prediction_type: str, replayed_noise: np.ndarray):
    config = {**PUBLISHED["lcm-dreamshaper"], "prediction_type": prediction_type}
    schedule, z = NoiseSchedule.from_config(config), normal(0)
    times, expected = diffusers_sample(config, z, num_inference_steps=steps)
    ours = timesteps_for("lcm", schedule, steps)
    np.testing.assert_array_equal(ours, times)
    assert relative_error(our_sample("lcm", schedule, z, ours, replayed_noise[: steps - 1]), expected) <= TOLERANCE


@pytest.mark.parametrize("times", [[399], [999, 759, 20]])
def test_lcm_with_times_of_ones_own(times: list[int], replayed_noise: np.ndarray):
    config = PUBLISHED["lcm-dreamshaper"]
    z, noise = normal(0), replayed_noise[: len(times) - 1]
    _, expected = diffusers_sample(config, z, timesteps=times)
    ours = our_sample("lcm", NoiseSchedule.from_config(config), z, np.array(times), noise if len(times) > 1 else None)
    assert relative_error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_tcd(steps: int, gamma: float, prediction_type: str, replayed_noise: np.ndarray):
    schedule = make(prediction_type=prediction_type).sampled(SamplingSpec.tcd(50))
    scheduler = diffusers.TCDScheduler.from_config(schedule.to_config())
    scheduler.set_timesteps(steps)
    times = timesteps_for("tcd", schedule, steps)
    np.testing.assert_array_equal(times, scheduler.timesteps)
    x, model = torch.tensor(normal(0)), denoise(torch)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, eta=gamma, return_dict=False)[0]
    # Padded to a program for more steps, as pipelines do; those beyond the count would change the result.
    room = 8
    noise = jnp.pad(jnp.asarray(replayed_noise[: steps - 1]), [(0, room - steps), *[(0, 0)] * len(SHAPE)])
    padded = np.pad(times, (0, room - steps), mode="edge")
    z, num_steps = jnp.asarray(normal(0)), jnp.int32(steps)
    ours = sample("tcd", denoise(jnp), schedule, z, padded, noise, gamma=gamma, num_steps=num_steps)
    assert relative_error(ours, x.numpy()) <= TOLERANCE


def test_gamma_is_that_of_tcd():
    """At γ = 1 each step ends at s = 0, so what follows depends on the noise; at γ = 0 not at all."""
    schedule = make().sampled(SamplingSpec.tcd(10))
    times, z = timesteps_for("tcd", schedule, 3), jnp.ones(SHAPE)

    def run(gamma: float, scale: float) -> jax.Array:
        return sample("tcd", denoise(jnp), schedule, z, times, jnp.full((2, *SHAPE), scale), gamma=gamma)

    np.testing.assert_array_equal(run(0.0, 1.0), run(0.0, 5.0))
    assert np.abs(np.asarray(run(1.0, 1.0) - run(1.0, 5.0))).max() > 0.1


# ---- CoDi against NumPy


@pytest.mark.parametrize("grid", ["trailing", "leading"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_codi_from_its_equations(prediction_type: str, grid: str):
    schedule = make(prediction_type=prediction_type).sampled(SamplingSpec.codi(50, grid, timestep_scaling=0.02))
    ᾱ = np.asarray(schedule.alphas_cumprod, np.float64)
    for steps in STEPS:
        times = timesteps_for("codi", schedule, steps)
        z = normal(0).astype(np.float64)
        for i, t in enumerate(times):
            α, σ, F = np.sqrt(ᾱ[t]), np.sqrt(1 - ᾱ[t]), denoise(np)(z, t)
            x, ε = {
                "epsilon": ((z - σ * F) / α, F),
                "v_prediction": (α * z - σ * F, α * F + σ * z),
                "sample": (F, (z - α * F) / σ),
            }[prediction_type]
            τ = 0.02 * t
            x = 0.25 / (τ**2 + 0.25) * z + τ / np.sqrt(τ**2 + 0.25) * x
            if i + 1 < steps:
                z = np.sqrt(ᾱ[times[i + 1]]) * x + np.sqrt(1 - ᾱ[times[i + 1]]) * ε
        assert relative_error(our_sample("codi", schedule, normal(0), times), x) <= TOLERANCE, steps


@pytest.mark.parametrize("grid", ["trailing", "leading"])
@pytest.mark.parametrize("size", [20, 50])
def test_codi_takes_as_many_steps_as_asked_and_stays_on_its_grid(size: int, grid: str):
    schedule = make().sampled(SamplingSpec.codi(size, grid))
    trained = {
        n * (1000 // size) - (grid == "trailing") for n in range(grid == "trailing", size + (grid == "trailing"))
    }
    for steps in range(1, size + 1):
        times = timesteps_for("codi", schedule, steps)
        assert len(times) == steps  # a stride of ⌊50/15⌋ = 3 would give 17 steps, ⌈50/15⌉ = 4 would give 13
        assert set(times.tolist()) <= trained
        assert times[0] == max(trained)
        assert np.all(np.diff(times) < 0)


def test_stock_diffusers_samples_a_codi_student_nearly_alike():
    student = make().sampled(SamplingSpec.codi(50))
    z = normal(0)
    times, theirs = diffusers_sample(student.to_config(), z, num_inference_steps=5)
    np.testing.assert_array_equal(timesteps_for("codi", student, 5), times)
    ours = our_sample("codi", student, z, times.astype(np.int32))
    assert relative_error(ours, theirs) <= 1e-3


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("given", [None, 3, 5])
def test_noise_of_the_wrong_length(sampler: SamplerName, given: int | None):
    schedule = make()
    noise = None if given is None else jnp.zeros((given, *SHAPE))
    with pytest.raises(ValueError, match=rf"5 steps need 4 arrays of noise, but {given or 0} were given"):
        sample(sampler, denoise(jnp), schedule, jnp.zeros(SHAPE), np.arange(5)[::-1] * 200, noise)


# ---- How they run


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_the_network_is_traced_once_and_sees_float32_and_a_scalar(sampler: SamplerName):
    schedule, steps, seen = make(timestep_spacing="trailing").sampled(SamplingSpec.codi(50)), 7, []
    times = timesteps_for(sampler, schedule, steps)
    noise = jnp.asarray(normal(4, steps - 1, *SHAPE))

    def half_precision_network(z: jax.Array, t: jax.Array) -> jax.Array:
        seen.append((z.dtype, t.shape))
        return denoise(jnp)(z, t).astype(jnp.bfloat16)

    @jax.jit
    def run(schedule: NoiseSchedule, z: jax.Array, times: jax.Array) -> jax.Array:
        return sample(sampler, half_precision_network, schedule, z, times, noise)

    z = jnp.asarray(normal(0), jnp.bfloat16)
    result = run(schedule, z, jnp.asarray(times))
    assert seen == [(jnp.float32, ())]
    assert result.dtype == jnp.float32
    assert np.all(np.isfinite(result))


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_every_step_is_reported_when_it_is_done(sampler: SamplerName):
    schedule, events = make().sampled(SamplingSpec.codi(50)), []
    times = timesteps_for(sampler, schedule, 6)
    noise = jnp.asarray(normal(4, 5, *SHAPE))

    def slow_network(z: np.ndarray, t: np.ndarray) -> np.ndarray:
        events.append("network")
        return np.asarray(denoise(np)(np.asarray(z), np.asarray(t)), np.float32)

    def network(z: jax.Array, t: jax.Array) -> jax.Array:
        return jax.pure_callback(slow_network, jax.ShapeDtypeStruct(z.shape, z.dtype), z, t)

    @jax.jit
    def run(z: jax.Array) -> jax.Array:
        return sample(sampler, network, schedule, z, times, noise, on_step=lambda i: events.append(int(i)))

    z = jnp.asarray(normal(0))
    with_report = run(z).block_until_ready()
    jax.effects_barrier()
    assert events == [event for i in range(len(times)) for event in ("network", i)]
    np.testing.assert_allclose(with_report, our_sample(sampler, schedule, normal(0), times, noise), atol=1e-5)


@pytest.mark.parametrize("sampler", COUNTED)
def test_times_that_only_fill_the_array_change_nothing(sampler: SamplerName):
    """One program for 1 to 50 steps; what stands behind those that count is garbage, and must not be read."""
    schedule, traced = make().sampled(SamplingSpec.codi(50)), []

    @jax.jit
    def run(times: jax.Array, noise: jax.Array | None, num_steps: jax.Array) -> jax.Array:
        traced.append(sampler)
        z = jnp.asarray(normal(0))
        return sample(sampler, denoise(jnp), schedule, z, times, noise, num_steps=num_steps)

    room = 60
    for steps in (1, 2, 4, 8, 50):
        times = timesteps_for(sampler, schedule, steps)
        noise = normal(4, steps - 1, *SHAPE) if SAMPLERS[sampler].is_stochastic else None
        expected = our_sample(sampler, schedule, normal(0), times, noise)
        padded = np.pad(times, (0, room - steps), constant_values=3)
        if noise is not None:
            noise = jnp.pad(noise, [(0, room - steps), *[(0, 0)] * len(SHAPE)], constant_values=np.nan)
        result = run(jnp.asarray(padded), noise, jnp.int32(steps))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5, err_msg=f"{steps} steps")
    assert traced == [sampler]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in COUNTED])
def test_the_other_samplers_cannot_be_counted(sampler: SamplerName):
    with pytest.raises(ValueError, match=rf"the sampler {re.escape(sampler)} visits all of its timesteps"):
        sample(sampler, denoise(jnp), make(), jnp.zeros(SHAPE), np.arange(4)[::-1] * 200, num_steps=jnp.int32(2))


# ---- Files that leave keys out


_KEYS_OF_SAMPLERS = ("set_alpha_to_one", "steps_offset", "timestep_spacing", "skip_prk_steps", "prediction_type")
LEFT_OUT: dict[str, dict[str, Any]] = {
    **{name: PUBLISHED[name] for name in ("sd-1.4, sd-1.5", "sd-2.1", "sdxl-base", "instruct-pix2pix")},
    # As Stable Diffusion was first published: nothing but the noise, and what PNDM needs.
    "sd, first": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.2.2",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "skip_prk_steps": True,
        "trained_betas": None,
    },
}
LEFT_OUT |= {
    f"{name}, bare": {key: value for key, value in SD.items() if key not in _KEYS_OF_SAMPLERS} | {"_class_name": name}
    for name in CLASSES.values()
}


def switched(file: dict[str, Any], sampler: str) -> Any:
    """As users do it: ``pipeline.scheduler = SomeScheduler.from_config(pipeline.scheduler.config)``."""
    loaded = getattr(diffusers, file["_class_name"]).from_config(file)
    # diffusers' pipelines turn clip_sample off; and none of them wants the Runge-Kutta steps.
    more: dict[str, Any] = {"clip_sample": False} if sampler in ("ddim", "lcm", "tcd") else {}
    more |= {"skip_prk_steps": True} if sampler == "pndm" else {}
    more |= {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm-solver++-sde" else {}
    return getattr(diffusers, CLASSES[sampler]).from_config(loaded.config, **more)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [case for case in itertools.product(LEFT_OUT, CLASSES) if case != ("PNDMScheduler, bare", "pndm")],  # it is refused
)
def test_what_a_file_leaves_out_has_the_defaults_of_the_class_that_samples(
    name: str, sampler: SamplerName, replayed_noise: np.ndarray
) -> None:
    """Where the first step starts and the last one ends depends on them, as times do."""
    scheduler, schedule, z, steps = (
        switched(LEFT_OUT[name], sampler),
        NoiseSchedule.from_config(LEFT_OUT[name]),
        normal(0),
        10,
    )
    scheduler.set_timesteps(steps)
    x, model = torch.tensor(z) * scheduler.init_noise_sigma, denoise(torch)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    times = timesteps_for(sampler, schedule, steps)
    np.testing.assert_allclose(times, scheduler.timesteps.numpy(), rtol=1e-6)
    noise = replayed_noise[: steps - 1] if SAMPLERS[sampler].is_stochastic else None
    tolerance = (5 if sampler == "heun" else 1) * TOLERANCE
    assert relative_error(our_sample(sampler, schedule, z, times, noise), x.numpy()) <= tolerance
