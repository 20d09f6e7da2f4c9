"""Distribution matching against its equations in NumPy, in float64; exact scores of mixtures; the reference's traps."""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
from matching import SHAPE, B, Equations, fake_loss, generator_loss, make_problem, schedule_of
from numerics import COLUMN, alpha_sigma, assert_equals, draw_latents
from standins import float64

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import disback, dmd
from codi_jax.pipeline.conditions import Condition, Conditions, Frozen, prepare
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim

COMBINATIONS = list(itertools.product(["text", "edit", "controlnet"], ["epsilon", "v_prediction", "sample"]))


@pytest.mark.parametrize("fake_scale", [1.0, 2.0])
@pytest.mark.parametrize(("task", "prediction_type"), COMBINATIONS)
def test_the_generators_loss_and_gradient_equal_the_equations(task: str, prediction_type: str, fake_scale: float):
    problem = make_problem(generator_loss, task, prediction_type, fake_guidance_scale=fake_scale, dm_loss_weight=2.0)
    equations = Equations(problem)
    _, x_key, g_key, _ = jax.random.split(problem.key, 4)
    fake = float64(problem.state.other)["unet"]
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    wanted_x = x - equations.gradient(x, fake, equations.target, g_key)  # no gradient through this

    def loss(theta: Any) -> Any:
        return 2.0 * 0.5 * np.mean((equations.generate(theta["unet"], x_key) - wanted_x) ** 2)

    assert_equals(problem, loss)


@pytest.mark.parametrize(
    ("task", "scales"), [("text", (0.0, 1.5)), ("edit", (0.5, 1.5)), ("edit", (1.0, 1.5)), ("edit", (3.0, 0.5))]
)
def test_low_scales_are_no_guidance_of_the_target_either(task: str, scales: tuple[float, float]):
    text, image = scales
    plain, problem = (
        make_problem(generator_loss, task, "epsilon", real_guidance_scale=s_T, real_image_guidance_scale=s_I)
        for s_T, s_I in ((1.0, 1.0), (text, image))
    )
    equations = Equations(problem)
    _, x_key, g_key, _ = jax.random.split(problem.key, 4)
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    g = equations.gradient(x, float64(problem.state.other)["unet"], equations.target, g_key)
    np.testing.assert_allclose(problem.loss()[0], 0.5 * np.mean(g**2), rtol=1e-4)
    assert problem.loss()[0] == plain.loss()[0]


@pytest.mark.parametrize(("task", "prediction_type"), COMBINATIONS)
def test_the_fake_scores_loss_and_gradient_equal_the_equations(task: str, prediction_type: str):
    problem = make_problem(fake_loss, task, prediction_type)
    equations, schedule = Equations(problem), problem.frozen.schedule
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
    monkeypatch.setattr(dmd.DmdSetup, "head", property(lambda _: StandInHead()))


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
    problem = make_problem(generator_loss, "text", "epsilon", **flags)
    problem.state.other["head"] = HEAD
    equations = Equations(problem)
    _, x_key, g_key, logits_key = jax.random.split(problem.key, 4)
    fake = float64(problem.state.other)
    x = equations.generate(float64(problem.state.params)["unet"], x_key)
    wanted_x = x - equations.gradient(x, fake["unet"], equations.target, g_key)

    def loss(theta: Any) -> Any:
        x = equations.generate(theta["unet"], x_key)
        matching = 0 if gan_alone else 0.5 * np.mean((x - wanted_x) ** 2)
        return matching + 0.7 * np.mean(softplus(-numpy_logits(equations, fake, x, logits_key)))

    assert_equals(problem, loss)


@pytest.mark.usefixtures("stand_in_head")
@pytest.mark.parametrize("mid_block", ["UNetMidBlock2DCrossAttn", None], ids=["mid block", "none"])
@pytest.mark.parametrize("diffusion_gan", [False, True])
def test_the_heads_loss_equals_the_equations(diffusion_gan: bool, mid_block: str | None):
    """Beside denoising; real latents and generated ones are noised apart."""
    flags = {**GAN, "diffusion_gan": diffusion_gan, "guidance_cls_loss_weight": 0.7}
    unet = standins.StandInUNet(config=standins.StandInConfig(mid_block_type=mid_block))
    problem = make_problem(fake_loss, "text", "epsilon", unet=unet, **flags)
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
    problem = make_problem(generator_loss, "text", "epsilon")
    with_images = problem.loss()[0]
    problem.batch = {name: array for name, array in problem.batch.items() if name in ("context", "pooled", "time_ids")}
    assert problem.loss()[0] == with_images


def test_float32_is_enough_at_noisy_times():
    """Two scores that are nearly the same, where x̂ = (z − σε̂)/α is large: the reference needs float64 here.

    From the networks' outputs as they are, in float32; subtracting the x̂ would be off by a hundred times as much.
    """
    problem = make_problem(generator_loss, "text", "epsilon", min_step_percent=0.98, real_guidance_scale=1.0)
    networks, schedule = problem.setup.networks, problem.frozen.schedule
    target = problem.frozen.target
    nearly = jax.tree.map(lambda x: x * (1 + 1e-3), target)
    x = jax.random.normal(jax.random.key(0), (B, *SHAPE))
    inputs = prepare(networks, problem.frozen.params, problem.batch, problem.key, problem.frozen.null_text)
    g = dmd.matching_gradient({"unet": nearly}, problem.frozen, x, inputs, problem.key, problem.setup)
    t_key, noise_key = jax.random.split(problem.key)
    t = jax.random.randint(t_key, (B,), 980, 981)
    x_t = schedule.add_noise(x, jax.random.normal(noise_key, x.shape), t)
    outputs = [predict(networks, {"unet": unet}, x_t, t, inputs.conditions) for unet in (nearly, target)]
    equations = Equations(problem)
    of_fake, of_target = (equations.x0(float64(out), float64(x_t), np.asarray(t)) for out in outputs)
    distance = np.abs(float64(x) - of_target).mean((1, 2, 3), keepdims=True)
    wanted = (of_fake - of_target) / distance
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(g, wanted, rtol=0, atol=1e-6 * largest)
    subtracted = schedule.to_x0_eps(outputs[0], x_t, t)[0] - schedule.to_x0_eps(outputs[1], x_t, t)[0]
    assert np.abs(subtracted / distance - wanted).max() > 1e-4 * largest


def test_a_denominator_of_zero_is_a_skipped_step_and_not_a_silent_zero():
    problem = make_problem(generator_loss, "text", "sample", real_guidance_scale=1.0)
    # A target that puts out zeros, and a generator that does: |x − x̂_θ| = 0.
    zeros = jax.tree.map(jnp.zeros_like, problem.frozen.target)
    batch = {**problem.batch, "pooled": jnp.zeros_like(problem.batch["pooled"])}
    networks, frozen = problem.setup.networks, dataclasses.replace(problem.frozen, target=zeros)
    inputs = prepare(networks, frozen.params, batch, problem.key, frozen.null_text)
    t0 = predict(networks, {"unet": zeros}, jnp.zeros((B, *SHAPE)), jnp.zeros(B, jnp.int32), inputs.conditions)
    np.testing.assert_array_equal(t0, 0)  # at t = 0, so compare there
    flags = dataclasses.replace(problem.setup.flags, min_step_percent=0.0, max_step_percent=0.0)
    setup = dataclasses.replace(problem.setup, flags=flags)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x = params["x"] * jnp.zeros((B, *SHAPE))
        g = dmd.matching_gradient(problem.state.other, frozen, x, inputs, key, setup)
        return jnp.mean((x - jax.lax.stop_gradient(x - g)) ** 2), {}

    state = optim.init_state({"x": jnp.ones(())[None, None, None, None]}, optax.sgd(1.0), jax.random.key(0))
    state, metrics = optim.step(state, loss, batch, optax.sgd(1.0))
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["skipped"]) == 1


# ---- Exact scores: mixtures of Gaussians


class MixtureUNet(nn.Module):
    """ε̂ of a mixture of Gaussians in closed form: what a UNet of infinite capacity would learn."""

    alphas_cumprod: tuple[float, ...]
    num_components: int
    dtype: Any = jnp.float32
    config: Any = standins.StandInConfig(2)
    remat: bool = False

    def setup(self) -> None:
        self.means = self.param("means", nn.initializers.normal(1.0), (self.num_components, 2))
        self.log_scales = self.param("log_scales", nn.initializers.zeros, (self.num_components,))

    def __call__(self, x, t, context, timestep_cond=None, added_cond=None, down_residuals=None, mid_residual=None):
        alpha_bar = jnp.asarray(self.alphas_cumprod)[t][:, None]
        alpha, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        points = x.reshape(len(x), 1, 2)
        variance = (alpha * jnp.exp(self.log_scales)[None]) ** 2 + sigma**2
        away = points - alpha[:, :, None] * self.means[None]
        weights = nn.softmax(-(away**2).sum(-1) / (2 * variance) - jnp.log(variance))
        score = -(weights[..., None] * away / variance[..., None]).sum(1)
        return (-sigma * score).reshape(x.shape), {}


def mixture_problem(components: int, **flags: Any) -> tuple[dmd.DmdSetup, NoiseSchedule, dict[str, Any]]:
    schedule = schedule_of("epsilon")
    unet = MixtureUNet(tuple(np.asarray(schedule.alphas_cumprod).tolist()), components)
    networks = Networks(unet, standins.StandInVAE(standins.StandInVAE.Config(1.0, 2)))
    of_method = disback.DisbackFlags(**{"real_guidance_scale": 1.0, **flags})
    setup = disback.configure(networks, of_method, side=1)
    assert setup.generator.latent_shape == (1, 1, 2)
    return setup, schedule, {"context": jnp.zeros((512, 1, 1))}


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
    setup, schedule, batch = mixture_problem(2)
    target, fake = mixture([[2, 0], [-2, 1]], 0.3), mixture([[0.5, 0], [-0.2, -0.5]], 0.8)
    generator = {"unet": mixture([[1, 1], [0, -1]], 0.5)}
    frozen, key = Frozen({}, schedule, target=target), jax.random.key(3)
    gradient = jax.grad(lambda params: dmd.generator_loss(params, {"unet": fake}, frozen, batch, key, setup)[0])(
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
    setup: dmd.DmdSetup, schedule: NoiseSchedule, batch: Any, teacher: Any, nodes: int, learning_rate: float
) -> list[Any]:
    """The teacher, and the nodes of stage 1, 25 steps apart."""
    method, optimizer = disback.degradation(side=1), optax.adam(learning_rate)
    state = method.init(setup, {"unet": teacher}.__getitem__, optimizer, jax.random.key(1))
    step, frozen = jax.jit(method.step(setup, optimizer)), Frozen({"unet": teacher}, schedule)
    path = [teacher]
    for _ in range(nodes):
        for _ in range(25):
            state, _ = step(state, frozen, batch)
        path.append(state.params["unet"])
    return path


def test_the_path_leads_to_the_generators_distribution():
    """One Gaussian, where that is known: x̂(z) at t* is a linear map of noise."""
    setup, schedule, batch = mixture_problem(1)
    path = record(setup, schedule, batch, mixture([[2.0, -1.0]], 0.5), nodes=4, learning_rate=0.01)
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
    setup, schedule, batch = mixture_problem(2)
    teacher = mixture([[2, 0], [-2, 1]], 0.3)
    path = record(setup, schedule, batch, teacher, nodes=4, learning_rate=0.004)
    frozen = Frozen({}, schedule)
    on_generator = [
        float(dmd.fake_loss({"unet": node}, {"unet": teacher}, frozen, batch, jax.random.key(9), setup)[0])
        for node in path
    ]
    rng = np.random.default_rng(0)
    real = np.asarray(teacher["means"])[rng.integers(0, 2, 4096)] + 0.3 * rng.standard_normal((4096, 2))
    z0, noise = (jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 2) for x in (real, rng.standard_normal((4096, 2))))
    t = jnp.asarray(rng.integers(0, 1000, 4096))
    conditions = Conditions(Condition(jnp.zeros((4096, 1, 1))))
    z_t = schedule.add_noise(z0, noise, t)
    on_teacher = [
        float(jnp.mean((predict(setup.networks, {"unet": node}, z_t, t, conditions) - noise) ** 2)) for node in path
    ]
    assert all(np.diff(on_generator) < 0)
    assert all(np.diff(on_teacher) > 0)
