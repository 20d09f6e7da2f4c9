"""Distribution matching against its equations in NumPy, in float64; exact scores of mixtures; the reference's traps."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
from numerics import COLUMN, Problem, alpha_sigma, assert_equals, draw_latents, x_and_eps
from standins import EDITING, MODULES, SCHEDULER, float64, make_batch, null_text, numpy_predict

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import disback
from codi_jax.methods import dmd as dm
from codi_jax.methods.generator import Generator, generator_schedule
from codi_jax.pipeline.conditions import Modules
from codi_jax.training import optim

B = standins.CHANNELS
SHAPE = (B, B, standins.CHANNELS)
GENERATOR_LOSS = SimpleNamespace(
    loss=lambda params, state, frozen, batch, key, config: dm.generator_loss(
        params, state.other, frozen, batch, key, config
    )
)
FAKE_LOSS = SimpleNamespace(
    loss=lambda params, state, frozen, batch, key, config: dm.fake_loss(params, state.other, frozen, batch, key, config)
)
COMBINATIONS = list(itertools.product(["text", "edit", "controlnet"], ["epsilon", "v_prediction", "sample"]))


def schedule_of(prediction_type: str, **changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type, **changes})


def make_problem(method: Any, task: str, prediction_type: str, **flags: Any) -> Problem:
    edits = task == "edit"
    modules = {"text": dataclasses.replace(MODULES, controlnet=None), "edit": EDITING, "controlnet": MODULES}[task]
    of_method = disback.DisbackFlags(**{"real_guidance_scale": 3.0, "fake_guidance_scale": 1.0, **flags})
    of_method.check()
    config = dm.Config(Generator(modules, of_method, SHAPE), of_method)
    generator, fake, target = ({"unet": standins.unet_params(seed, edits=edits)} for seed in (2, 4, 1))
    frozen = {**target, **null_text(), "schedule": schedule_of(prediction_type)}
    if task == "controlnet":
        frozen["controlnet"] = standins.controlnet_params(6)
    of_generator = method is GENERATOR_LOSS
    state = SimpleNamespace(params=generator if of_generator else fake, other=fake if of_generator else generator)
    return Problem(method, config, state, frozen, make_batch(B), jax.random.key(8))


@dataclasses.dataclass
class Equations:
    """What both losses are made of, in float64."""

    problem: Problem

    def __post_init__(self) -> None:
        self.schedule, self.flags = self.problem.frozen["schedule"], self.problem.config.flags
        self.batch, self.frozen = self.problem.float64()
        self.alpha, self.sigma = alpha_sigma(self.schedule)
        batch, modules = self.batch, self.problem.config.generator.modules
        self.control = batch["conditioning"] / 255 if modules.controlnet is not None else None
        image = np.split(batch["conditioning_moments"], 2, axis=-1)[0] if modules.edits else None
        null_context, null_pooled = (np.repeat(self.frozen[name], B, 0) for name in ("null_context", "null_pooled"))
        self.full = batch["context"], batch["pooled"], image
        self.image_only = null_context, null_pooled, image
        self.null = null_context, null_pooled, None if image is None else np.zeros_like(image)

    def output(self, unet: Any, z: Any, t: Any, given: Any) -> np.ndarray:
        context, pooled, image = given
        networks = {**self.frozen, "unet": unet}
        return numpy_predict(networks, z, t, context, pooled, self.batch["time_ids"], self.control, image)

    def guided(self, unet: Any, z: Any, t: Any, text: float, image: float) -> np.ndarray:
        full, null = (self.output(unet, z, t, given) for given in (self.full, self.null))
        if text <= 1 or (self.full[2] is not None and image < 1):  # as in DMD2's code, and in all pipelines
            return full
        if self.full[2] is None:
            return null + text * (full - null)
        of_image = self.output(unet, z, t, self.image_only)
        return null + image * (of_image - null) + text * (full - of_image)

    def x0(self, out: np.ndarray, z: np.ndarray, t: np.ndarray) -> np.ndarray:
        return x_and_eps(self.schedule.prediction_type, out, z, self.alpha[t][COLUMN], self.sigma[t][COLUMN])[0]

    def add_noise(self, x: np.ndarray, noise: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.alpha[t][COLUMN] * x + self.sigma[t][COLUMN] * noise

    def generate(self, unet: Any, key: jax.Array) -> np.ndarray:
        """In one step of noise."""
        z = float64(jax.random.normal(jax.random.split(key, 3)[0], (B, *SHAPE)))
        t = np.full(B, self.flags.conditioning_timestep)
        return self.x0(self.output(unet, z, t, self.full), z, t)

    def gradient(self, x: np.ndarray, fake: Any, target: Any, key: jax.Array) -> np.ndarray:
        """g of equation 7, as it stands there."""
        t_key, noise_key = jax.random.split(key)
        t = np.asarray(jax.random.randint(t_key, (B,), 20, 981))
        x_t = self.add_noise(x, float64(jax.random.normal(noise_key, x.shape)), t)
        flags = self.flags
        of_fake = self.x0(self.guided(fake, x_t, t, flags.fake_guidance_scale, 1.0), x_t, t)
        scales = flags.real_guidance_scale, flags.real_image_guidance_scale
        of_target = self.x0(self.guided(target, x_t, t, *scales), x_t, t)
        return (of_fake - of_target) / np.abs(x - of_target).mean((1, 2, 3), keepdims=True)


@pytest.mark.parametrize("fake_scale", [1.0, 2.0])
@pytest.mark.parametrize(("task", "prediction_type"), COMBINATIONS)
def test_the_generators_loss_and_gradient_equal_the_equations(task: str, prediction_type: str, fake_scale: float):
    problem = make_problem(GENERATOR_LOSS, task, prediction_type, fake_guidance_scale=fake_scale, dm_loss_weight=2.0)
    equations = Equations(problem)
    _, x_key, g_key, _ = jax.random.split(problem.key, 4)
    fake = float64(problem.state.other)["unet"]
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    wanted_x = x - equations.gradient(x, fake, equations.frozen["unet"], g_key)  # no gradient through this

    def loss(theta: Any) -> Any:
        return 2.0 * 0.5 * np.mean((equations.generate(theta["unet"], x_key) - wanted_x) ** 2)

    assert_equals(problem, loss)


@pytest.mark.parametrize(
    ("task", "scales"), [("text", (0.0, 1.5)), ("edit", (0.5, 1.5)), ("edit", (1.0, 1.5)), ("edit", (3.0, 0.5))]
)
def test_low_scales_are_no_guidance_of_the_target_either(task: str, scales: tuple[float, float]):
    text, image = scales
    plain, problem = (
        make_problem(GENERATOR_LOSS, task, "epsilon", real_guidance_scale=s_T, real_image_guidance_scale=s_I)
        for s_T, s_I in ((1.0, 1.0), (text, image))
    )
    equations = Equations(problem)
    _, x_key, g_key, _ = jax.random.split(problem.key, 4)
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    g = equations.gradient(x, float64(problem.state.other)["unet"], equations.frozen["unet"], g_key)
    np.testing.assert_allclose(problem.loss()[0], 0.5 * np.mean(g**2), rtol=1e-4)
    assert problem.loss()[0] == plain.loss()[0]


@pytest.mark.parametrize(("task", "prediction_type"), COMBINATIONS)
def test_the_fake_scores_loss_and_gradient_equal_the_equations(task: str, prediction_type: str):
    problem = make_problem(FAKE_LOSS, task, prediction_type)
    equations, schedule = Equations(problem), problem.frozen["schedule"]
    _, x_key, t_key, noise_key, _ = jax.random.split(problem.key, 5)
    x = equations.generate(float64(problem.state.other)["unet"], x_key)
    t = np.asarray(jax.random.randint(t_key, (B,), 0, 1000))
    noise = float64(jax.random.normal(noise_key, x.shape))
    alpha, sigma = equations.alpha[t][COLUMN], equations.sigma[t][COLUMN]
    y = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[schedule.prediction_type]
    x_t = equations.add_noise(x, noise, t)

    def loss(theta: Any) -> Any:
        return np.mean((equations.output(theta["unet"], x_t, t, equations.full) - y) ** 2)

    assert_equals(problem, loss)


# ---- The GAN loss of DMD2


class StandInHead:
    """A logit of each sample by a few weights."""

    def apply(self, variables: Any, low: Any) -> Any:
        return (low * variables["params"]["k"]).mean((1, 2, 3))


HEAD = {"k": 5 * standins.controlnet_params(9)["e"]}


@pytest.fixture
def stand_in_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm.Config, "head", property(lambda _: StandInHead()))


def numpy_logits(equations: Equations, fake: Any, x: np.ndarray, key: jax.Array) -> np.ndarray:
    """Of φ's lowest features, at t = 0, or of noised images at times below the highest."""
    t_key, noise_key = jax.random.split(key)
    t = np.zeros(B, int)
    if equations.flags.diffusion_gan:
        t = np.asarray(jax.random.randint(t_key, (B,), 0, 300))
        x = equations.add_noise(x, float64(jax.random.normal(noise_key, x.shape)), t)
    batch, unet = equations.batch, fake["unet"]
    temb = t / 1000 + batch["pooled"].mean(1) * batch["time_ids"][:, 0]
    low = x * unet["a"] * temb[COLUMN] + batch["context"].mean((1, 2))[COLUMN] * unet["b"]
    return (low * fake["head"]["k"]).mean((1, 2, 3))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


GAN = {"cls_on_clean_image": True, "gen_cls_loss": True, "diffusion_gan_max_timestep": 300}


@pytest.mark.usefixtures("stand_in_head")
@pytest.mark.parametrize("gan_alone", [False, True])
@pytest.mark.parametrize("diffusion_gan", [False, True])
def test_the_generators_loss_with_the_gan_equals_the_equations(diffusion_gan: bool, gan_alone: bool):
    """Distribution matching and the GAN loss are added, unless the latter is to be alone."""
    flags = {**GAN, "diffusion_gan": diffusion_gan, "gan_alone": gan_alone, "gen_cls_loss_weight": 0.7}
    problem = make_problem(GENERATOR_LOSS, "text", "epsilon", **flags)
    problem.state.other["head"] = HEAD
    equations = Equations(problem)
    _, x_key, g_key, logits_key = jax.random.split(problem.key, 4)
    fake = float64(problem.state.other)
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    wanted_x = x - equations.gradient(x, fake["unet"], equations.frozen["unet"], g_key)

    def loss(theta: Any) -> Any:
        x = equations.generate(theta["unet"], x_key)
        matching = 0 if gan_alone else 0.5 * np.mean((x - wanted_x) ** 2)
        return matching + 0.7 * np.mean(softplus(-numpy_logits(equations, fake, x, logits_key)))

    assert_equals(problem, loss)


@pytest.mark.usefixtures("stand_in_head")
@pytest.mark.parametrize("diffusion_gan", [False, True])
def test_the_heads_loss_equals_the_equations(diffusion_gan: bool):
    """Beside denoising; real latents and generated ones are noised apart."""
    flags = {**GAN, "diffusion_gan": diffusion_gan, "guidance_cls_loss_weight": 0.7}
    problem = make_problem(FAKE_LOSS, "text", "epsilon", **flags)
    problem.state.params["head"] = HEAD
    equations = Equations(problem)
    z0_key, x_key, t_key, noise_key, logits_key = jax.random.split(problem.key, 5)
    x = equations.generate(float64(problem.state.other)["unet"], x_key)
    z0 = draw_latents(equations.batch, z0_key)
    t = np.asarray(jax.random.randint(t_key, (B,), 0, 1000))
    noise = float64(jax.random.normal(noise_key, x.shape))
    x_t = equations.add_noise(x, noise, t)
    real_key, made_key = jax.random.split(logits_key)

    def loss(theta: Any) -> Any:
        denoising = np.mean((equations.output(theta["unet"], x_t, t, equations.full) - noise) ** 2)
        of_real, of_made = (numpy_logits(equations, theta, *given) for given in ((z0, real_key), (x, made_key)))
        return denoising + 0.7 * np.mean(softplus(-of_real) + softplus(of_made))

    assert_equals(problem, loss)


def test_prompts_alone_will_do():
    problem = make_problem(GENERATOR_LOSS, "text", "epsilon")
    with_images = problem.loss()[0]
    problem.batch = {name: array for name, array in problem.batch.items() if name in ("context", "pooled", "time_ids")}
    assert problem.loss()[0] == with_images


def test_float32_is_enough_at_noisy_times():
    """Two scores that are nearly the same, where x̂ = (z − σε̂)/α is large: the reference needs float64 here.

    From the networks' outputs as they are, in float32; subtracting the x̂ would be off by a hundred times as much.
    """
    problem = make_problem(GENERATOR_LOSS, "text", "epsilon", min_step_percent=0.98, real_guidance_scale=1.0)
    modules, schedule = problem.config.generator.modules, problem.frozen["schedule"]
    nearly, target = jax.tree.map(lambda x: x * (1 + 1e-3), problem.frozen["unet"]), problem.frozen["unet"]
    x = jax.random.normal(jax.random.key(0), (B, *SHAPE))
    inputs = dm.prepare(modules, problem.frozen, problem.batch, problem.key)
    g = dm.matching_gradient({"unet": nearly}, problem.frozen, x, inputs, problem.key, problem.config)
    t_key, noise_key = jax.random.split(problem.key)
    t = jax.random.randint(t_key, (B,), 980, 981)
    x_t = schedule.add_noise(x, jax.random.normal(noise_key, x.shape), t)
    outputs = [dm.predict(modules, {"unet": unet}, x_t, t, inputs.cond) for unet in (nearly, target)]
    equations = Equations(problem)
    of_fake, of_target = (equations.x0(float64(out), float64(x_t), np.asarray(t)) for out in outputs)
    distance = np.abs(float64(x) - of_target).mean((1, 2, 3), keepdims=True)
    wanted = (of_fake - of_target) / distance
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(g, wanted, rtol=0, atol=1e-6 * largest)
    subtracted = schedule.to_x0_eps(outputs[0], x_t, t)[0] - schedule.to_x0_eps(outputs[1], x_t, t)[0]
    assert np.abs(subtracted / distance - wanted).max() > 1e-4 * largest


def test_a_denominator_of_zero_is_a_skipped_step_and_not_a_silent_zero():
    problem = make_problem(GENERATOR_LOSS, "text", "sample", real_guidance_scale=1.0)
    # A target that puts out zeros, and a generator that does: |x − x̂_θ| = 0.
    zeros = jax.tree.map(jnp.zeros_like, problem.frozen["unet"])
    batch = {**problem.batch, "pooled": jnp.zeros_like(problem.batch["pooled"])}
    modules = problem.config.generator.modules
    inputs = dm.prepare(modules, problem.frozen, batch, problem.key)
    t0 = dm.predict(modules, {"unet": zeros}, jnp.zeros((B, *SHAPE)), jnp.zeros(B, jnp.int32), inputs.cond)
    np.testing.assert_array_equal(t0, 0)  # at t = 0, so compare there
    config = dataclasses.replace(
        problem.config, flags=dataclasses.replace(problem.config.flags, min_step_percent=0.0, max_step_percent=0.0)
    )
    frozen = {**problem.frozen, "unet": zeros}

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x = params["x"] * jnp.zeros((B, *SHAPE))
        g = dm.matching_gradient(problem.state.other, frozen, x, inputs, key, config)
        return jnp.mean((x - jax.lax.stop_gradient(x - g)) ** 2), {}

    state = optim.init_state({"x": jnp.ones(())[None, None, None, None]}, optax.sgd(1.0), jax.random.key(0))
    state, metrics = optim.step(state, loss, batch, optax.sgd(1.0))
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["skipped"]) == 1


# ---- Generators of several steps


def test_the_times_of_a_generator():
    assert disback.DisbackFlags(conditioning_timestep=399).timesteps == (399,)
    assert disback.DisbackFlags(denoising=True, num_denoising_step=4).timesteps == (999, 749, 499, 249)
    assert disback.DisbackFlags(denoising=True, num_denoising_step=3).timesteps == (999, 666, 333)


def test_backward_simulation_starts_from_what_the_generator_made():
    """The sampler's own steps, of any number up to n, and a gradient through the last one alone."""
    problem = make_problem(
        GENERATOR_LOSS, "text", "epsilon", denoising=True, num_denoising_step=3, backward_simulation=True
    )
    equations, generator = Equations(problem), problem.config.generator
    inputs = dm.prepare(generator.modules, problem.frozen, problem.batch, problem.key)
    unet = float64(problem.state.params)["unet"]
    seen = set()
    make = jax.jit(lambda params, key: generator(params, problem.frozen, inputs, key))
    slope = jax.jit(jax.grad(lambda params, key: generator(params, problem.frozen, inputs, key).sum()))
    for seed in range(8):
        key = jax.random.key(seed)
        noise_key, n_key, steps_key = jax.random.split(key, 3)
        n = int(jax.random.randint(n_key, (), 0, 3))
        z = float64(jax.random.normal(noise_key, (B, *SHAPE)))
        x = t = np.zeros(0)
        for i, t in enumerate(np.full(B, time) for time in (999, 666, 333)[: n + 1]):
            x = equations.x0(equations.output(unet, z, t, equations.full), z, t)
            if i < n:
                noise = float64(jax.random.normal(jax.random.fold_in(steps_key, i), x.shape))
                z = equations.add_noise(x, noise, np.full(B, [999, 666, 333][i + 1]))
        np.testing.assert_allclose(make(problem.state.params, key), x, rtol=1e-4, atol=1e-4 * np.abs(x).max())
        seen.add(n)
        gradient = slope(problem.state.params, key)

        def total(a: float) -> float:
            return equations.x0(equations.output({**unet, "c": a * unet["c"]}, z, t, equations.full), z, t).sum()  # noqa: B023

        wanted = (total(1 + 1e-6) - total(1 - 1e-6)) / 2e-6
        ours = float((gradient["unet"]["c"] * problem.state.params["unet"]["c"]).sum())
        np.testing.assert_allclose(ours, wanted, rtol=1e-3)
    assert seen == {0, 1, 2}


def test_without_simulation_it_starts_from_real_latents():
    problem = make_problem(GENERATOR_LOSS, "text", "epsilon", denoising=True, num_denoising_step=2)
    equations, generator = Equations(problem), problem.config.generator
    inputs = dm.prepare(generator.modules, problem.frozen, problem.batch, problem.key)
    z0 = draw_latents(equations.batch, problem.key)
    noise_key, n_key, _ = jax.random.split(problem.key, 3)
    n = np.asarray(jax.random.randint(n_key, (B,), 0, 2))
    assert set(n) == {0, 1}
    noise, t = float64(jax.random.normal(noise_key, z0.shape)), np.asarray([999, 499])[n]
    z = np.where((n == 0)[COLUMN], noise, equations.add_noise(z0, noise, t))
    wanted = equations.x0(equations.output(float64(problem.state.params)["unet"], z, t, equations.full), z, t)
    ours = generator(problem.state.params, problem.frozen, inputs, problem.key)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_time_off_the_schedule_is_refused():
    for flags, name in [
        ({"conditioning_timestep": 1000}, "conditioning_timestep 1000"),
        ({"conditioning_timestep": -1}, "conditioning_timestep -1"),
        ({"denoising": True, "denoising_timestep": 1200}, "denoising_timestep 1200"),
    ]:
        with pytest.raises(ValueError, match=f"--{name} is off the model's schedule, which has the timesteps 0 to 999"):
            generator_schedule(schedule_of("epsilon"), disback.DisbackFlags(**flags))


# ---- Exact scores: mixtures of Gaussians


class MixtureUNet(nn.Module):
    """ε̂ of a mixture of Gaussians in closed form: what a UNet of infinite capacity would learn."""

    alphas_cumprod: tuple[float, ...]
    num_components: int
    dtype: Any = jnp.float32
    config: Any = standins.StandInConfig(2)

    def setup(self) -> None:
        self.means = self.param("means", nn.initializers.normal(1.0), (self.num_components, 2))
        self.log_scales = self.param("log_scales", nn.initializers.zeros, (self.num_components,))

    def check_inputs(self, z, context) -> None: ...

    def embed_time(self, t, timestep_cond, added_cond):
        return t

    def conv_in(self, z):
        return z

    def encode(self, x, temb, context):
        return x, (), {}

    def decode(self, x, skips, taps, temb, context, down_residuals=None, mid_residual=None):
        alpha_bar = jnp.asarray(self.alphas_cumprod)[temb][:, None]
        alpha, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        points = x.reshape(len(x), 1, 2)
        variance = (alpha * jnp.exp(self.log_scales)[None]) ** 2 + sigma**2
        away = points - alpha[:, :, None] * self.means[None]
        weights = nn.softmax(-(away**2).sum(-1) / (2 * variance) - jnp.log(variance))
        score = -(weights[..., None] * away / variance[..., None]).sum(1)
        return (-sigma * score).reshape(x.shape), {}


def mixture_problem(components: int, **flags: Any) -> tuple[dm.Config, NoiseSchedule, dict[str, Any]]:
    schedule = schedule_of("epsilon")
    unet = MixtureUNet(tuple(np.asarray(schedule.alphas_cumprod).tolist()), components)
    modules = Modules(unet, standins.StandInVAE(standins.StandInVAE.Config(1.0, 2)))
    of_method = disback.DisbackFlags(**{"real_guidance_scale": 1.0, **flags})
    return dm.Config(Generator(modules, of_method, (1, 1, 2)), of_method), schedule, {"context": jnp.zeros((512, 1, 1))}


def mixture(means: Any, scale: float) -> dict[str, Any]:
    means = jnp.asarray(means, jnp.float32)
    return {"means": means, "log_scales": jnp.full(len(means), np.log(scale), jnp.float32)}


def log_density(points: np.ndarray, params: Any, alpha: Any, sigma: Any) -> np.ndarray:
    """Of the diffused mixture, in float64; components weigh alike."""
    variance = (alpha * np.exp(float64(params["log_scales"]))) ** 2 + sigma**2
    away = points[:, None] - alpha[..., None] * float64(params["means"])
    return np.log(np.exp(-(away**2).sum(-1) / (2 * variance) - np.log(variance)).sum(1))


def test_the_gradient_is_that_of_exact_scores():
    """g = σ²/α (∇log p_G − ∇log p_target)/mean|x − x̂|, the scores differentiated numerically from the densities."""
    config, schedule, batch = mixture_problem(2)
    target, fake = mixture([[2, 0], [-2, 1]], 0.3), mixture([[0.5, 0], [-0.2, -0.5]], 0.8)
    generator = {"unet": mixture([[1, 1], [0, -1]], 0.5)}
    frozen, key = {"unet": target, "schedule": schedule}, jax.random.key(3)
    gradient = jax.grad(lambda params: dm.generator_loss(params, {"unet": fake}, frozen, batch, key, config)[0])(
        generator
    )

    _, x_key, g_key, _ = jax.random.split(key, 4)
    alphas, sigmas = alpha_sigma(schedule)
    t_key, noise_key = jax.random.split(g_key)
    t = np.asarray(jax.random.randint(t_key, (512,), 20, 981))
    alpha, sigma = alphas[t][:, None], sigmas[t][:, None]
    z = float64(jax.random.normal(jax.random.split(x_key, 3)[0], (512, 1, 1, 2))).reshape(512, 2)

    def score(points: np.ndarray, params: Any, alpha: Any, sigma: Any) -> np.ndarray:
        h = 1e-5 * np.eye(2)
        sides = [[log_density(points + sign * step, params, alpha, sigma) for sign in (1, -1)] for step in h]
        return np.stack([(above - below) / 2e-5 for above, below in sides], 1)

    def denoised(points: np.ndarray, params: Any, alpha: Any, sigma: Any) -> np.ndarray:
        return (points + sigma**2 * score(points, params, alpha, sigma)) / alpha

    def make(params: Any) -> np.ndarray:
        return denoised(z, params, alphas[399] * np.ones((512, 1)), sigmas[399] * np.ones((512, 1)))

    x = make(generator["unet"])
    x_t = alpha * x + sigma * float64(jax.random.normal(noise_key, (512, 1, 1, 2))).reshape(512, 2)
    difference = score(x_t, fake, alpha, sigma) - score(x_t, target, alpha, sigma)
    distance = np.abs(x - denoised(x_t, target, alpha, sigma)).mean(1, keepdims=True)
    g = sigma**2 / alpha * difference / distance
    for i, j in np.ndindex(2, 2):
        h = np.zeros((2, 2))
        h[i, j] = 1e-4
        means = float64(generator["unet"]["means"])
        above, below = (make({**generator["unet"], "means": means + sign * h}) for sign in (1, -1))
        wanted = (g * (above - below) / 2e-4).sum() / x.size
        np.testing.assert_allclose(gradient["unet"]["means"][i, j], wanted, rtol=1e-3)


def record(
    config: dm.Config, schedule: NoiseSchedule, batch: Any, teacher: Any, nodes: int, learning_rate: float
) -> list[Any]:
    """The teacher, and the nodes of stage 1, 25 steps apart."""
    optimizer = optax.adam(learning_rate)
    state = optim.init_state({"unet": teacher}, optimizer, jax.random.key(1))
    frozen = {"unet": teacher, "schedule": schedule}
    step = jax.jit(lambda state: disback.degradation_step(state, frozen, batch, config=config, optimizer=optimizer)[0])
    path = [teacher]
    for _ in range(nodes):
        for _ in range(25):
            state = step(state)
        path.append(state.params["unet"])
    return path


def test_the_path_leads_to_the_generators_distribution():
    """One Gaussian, where that is known: x̂(z) at t* is a linear map of noise."""
    config, schedule, batch = mixture_problem(1)
    path = record(config, schedule, batch, mixture([[2.0, -1.0]], 0.5), nodes=4, learning_rate=0.01)
    alphas, sigmas = alpha_sigma(schedule)
    alpha, sigma = alphas[399], sigmas[399]
    kappa = alpha * 0.5**2 / ((alpha * 0.5) ** 2 + sigma**2)
    end = (1 - kappa * alpha) * np.asarray([2.0, -1.0])

    def distance(node: Any) -> float:
        """The squared 2-Wasserstein distance from the generator's distribution."""
        scale = np.exp(float(node["log_scales"][0]))
        return np.sum((np.asarray(node["means"][0]) - end) ** 2) + 2 * (scale - kappa) ** 2

    distances = [distance(node) for node in path]
    assert all(np.diff(distances) < 0)
    assert distances[-1] < 0.05 * distances[0]


def test_the_nodes_of_a_mixture_leave_the_teacher_for_the_generator():
    """By the denoising loss, which is the distance of the scores and a constant: it falls on samples of G, and rises
    on those of the teacher, from node to node."""
    config, schedule, batch = mixture_problem(2)
    teacher = mixture([[2, 0], [-2, 1]], 0.3)
    path = record(config, schedule, batch, teacher, nodes=4, learning_rate=0.004)
    frozen = {"unet": teacher, "schedule": schedule}
    on_generator = [
        float(dm.fake_loss({"unet": node}, {"unet": teacher}, frozen, batch, jax.random.key(9), config)[0])
        for node in path
    ]
    rng = np.random.default_rng(0)
    real = np.asarray(teacher["means"])[rng.integers(0, 2, 4096)] + 0.3 * rng.standard_normal((4096, 2))
    z0, noise = (jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 2) for x in (real, rng.standard_normal((4096, 2))))
    t = jnp.asarray(rng.integers(0, 1000, 4096))
    condition = dm.Condition(jnp.zeros((4096, 1, 1)))
    z_t = schedule.add_noise(z0, noise, t)
    on_teacher = [
        float(jnp.mean((dm.predict(config.generator.modules, {"unet": node}, z_t, t, condition) - noise) ** 2))
        for node in path
    ]
    assert all(np.diff(on_generator) < 0)
    assert all(np.diff(on_teacher) > 0)
