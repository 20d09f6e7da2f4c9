"""BK-SDM against its equations in NumPy, in float64, on the features that PyTorch's networks compute."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numerics import COLUMN, alpha_sigma, draw_latents, x_and_eps
from oracle import make_pair, nchw, nhwc, prune_sd
from standins import CHANNELS, MODULES, SCHEDULER, SMALL_SD, float64, make_batch

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import bk_sdm, denoising
from codi_jax.models.pruning import LEVELS, Surgery, whole
from codi_jax.training import optim

B = 2
# bk_small for two resolutions.
SURGERY = Surgery.from_dict("small", {"resolutions": LEVELS["bk_small"]["resolutions"][:2], "mid": "drop"})
TEACHER = {
    **SMALL_SD,
    "layers_per_block": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "cross_attention_dim": 5,
}
TAPS = ["down_blocks_0", "down_blocks_1", "up_blocks_0", "up_blocks_1"]
VARIANTS: dict[str, dict[str, Any]] = {
    "of the paper": {},
    "normalized": {"feature_normalize": True, "output_weight": 0.5, "feature_weight": 0.25, "noise_offset": 0.2},
    "another type": {"student": "epsilon", "snr_gamma": 0.3, "input_perturbation": 0.3},
}


@dataclasses.dataclass
class Problem:
    """All that the loss depends on, and the teacher in PyTorch."""

    config: bk_sdm.Config
    params: Any
    frozen: dict[str, Any]
    torch_teacher: torch.nn.Module

    def loss(self, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.jit(bk_sdm.loss, static_argnums=4)(self.params, self.frozen, batch(), key, self.config)


def batch() -> dict[str, Any]:
    return {name: value for name, value in make_batch(B).items() if name in ("moments", "context")}


def make(surgery: Surgery = SURGERY, student: str = "v_prediction", **options: Any) -> Problem:
    torch_teacher, unet, params = make_pair("unet", TEACHER)
    module, student_params, features = bk_sdm.make_student(unet, params, surgery)
    modules = dataclasses.replace(MODULES, unet=module, controlnet=None)
    schedules = {
        name: NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type})
        for name, prediction_type in (("schedule", student), ("teacher_schedule", "v_prediction"))
    }
    config = bk_sdm.Config(modules, teacher_unet=unet, features=features, **options)
    return Problem(config, {"unet": student_params}, {"teacher": params, **schedules}, torch_teacher.double())


def run_torch(model: torch.nn.Module, z: np.ndarray, t: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, dict]:
    """The output in float64, and those of the blocks."""
    seen = {}

    def record(name: str) -> Any:
        return lambda _, args, out: seen.__setitem__(name, nhwc(out[0] if isinstance(out, tuple) else out))

    blocks = {f"{kind}_{i}": x for kind in ("down_blocks", "up_blocks") for i, x in enumerate(getattr(model, kind))}
    hooks = [block.register_forward_hook(record(name)) for name, block in blocks.items()]
    out = nhwc(model(nchw(z), torch.tensor(t), torch.tensor(context)).sample)
    for hook in hooks:
        hook.remove()
    return out, seen


def numpy_terms(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """The terms, drawn with the same keys."""
    config, schedule, data = problem.config, problem.frozen["schedule"], float64(batch())
    keys = jax.random.split(key, 5)
    z0 = draw_latents(data, keys[0])
    t = np.asarray(jax.random.randint(keys[1], (B,), 0, 1000))
    noise = float64(jax.random.normal(keys[2], z0.shape))
    noise = noise + config.noise_offset * float64(jax.random.normal(keys[3], (B, 1, 1, CHANNELS)))
    perturbed = noise + config.input_perturbation * float64(jax.random.normal(keys[4], z0.shape))
    α, σ = (values[t][COLUMN] for values in alpha_sigma(schedule))
    z_t = α * z0 + σ * perturbed
    is_eps = schedule.prediction_type == "epsilon"
    snr = (α / σ).ravel() ** 2
    weights = 1.0 if config.snr_gamma is None else np.minimum(snr, config.snr_gamma) / (snr if is_eps else snr + 1)
    teacher, of_teacher = run_torch(problem.torch_teacher, z_t, t, data["context"])
    student, of_student = run_torch(prune_sd(problem.torch_teacher, "bk_small"), z_t, t, data["context"])
    if is_eps:
        teacher = x_and_eps("v_prediction", teacher, z_t, α, σ)[1]

    def of_sample(difference: np.ndarray) -> np.ndarray:
        return (difference**2).mean((1, 2, 3))

    terms = {
        "task": np.mean(weights * of_sample(student - (noise if is_eps else α * noise - σ * z0))),
        "output": np.mean(of_sample(student - teacher)),
    }
    for tap in TAPS:
        scale = of_sample(of_teacher[tap]) if config.feature_normalize else 1.0
        terms[f"features/{tap}"] = np.mean(of_sample(of_student[tap] - of_teacher[tap]) / scale)
    return terms | {"features": sum(terms[f"features/{tap}"] for tap in TAPS)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_equal_the_equations(variant: str) -> None:
    problem, key = make(**VARIANTS[variant]), jax.random.key(7)
    value, terms = problem.loss(key)
    wanted = numpy_terms(problem, key)
    assert terms.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(terms[name], wanted[name], rtol=1e-5, err_msg=name)
    λ_out, λ_feat = problem.config.output_weight, problem.config.feature_weight
    total = wanted["task"] + λ_out * wanted["output"] + λ_feat * wanted["features"]
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_a_student_that_lacks_nothing_starts_as_its_teacher() -> None:
    teacher = make_pair("unet", TEACHER)[1]
    _, terms = make(whole(teacher.config)).loss(jax.random.key(0))
    assert float(terms["output"]) == float(terms["features"]) == 0
    assert {f"features/{tap}" for tap in [*TAPS, "mid_block"]} <= terms.keys()
    assert terms["task"] > 0


def test_without_its_weights_the_teacher_is_not_computed_and_it_is_plain_training() -> None:
    problem, key = make(output_weight=0, feature_weight=0, snr_gamma=5), jax.random.key(1)
    del problem.frozen["teacher"]
    value, terms = problem.loss(key)
    plain = denoising.Config(problem.config.modules, snr_gamma=5)
    wanted, _ = jax.jit(denoising.loss, static_argnums=4)(problem.params, problem.frozen, batch(), key, plain)
    assert terms.keys() == {"task"}
    np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_an_update_moves_student_and_average_and_nothing_else() -> None:
    """The average is one of the student, and not of the whole UNet."""
    problem, optimizer = make(ema_decay=0.9), optax.sgd(0.1)
    state = optim.init_state(problem.params, optimizer, jax.random.key(0), ema=True)
    step = jax.jit(bk_sdm.train_step, static_argnames=("config", "optimizer"))
    new, metrics = step(state, problem.frozen, batch(), config=problem.config, optimizer=optimizer)
    assert jax.tree.structure(new.ema) == jax.tree.structure(problem.params)
    for before, after, average in zip(*map(jax.tree.leaves, (state.params, new.params, new.ema)), strict=True):
        assert np.abs(after - before).max() > 0
        np.testing.assert_allclose(average, 0.9 * before + 0.1 * after, rtol=1e-5, atol=1e-7)
    assert {"loss", "task", "output", "features"} <= metrics.keys()


def distances(taps: dict[str, jax.Array], of_teacher: dict[str, jax.Array], **options: Any) -> dict[str, Any]:
    config = dataclasses.replace(make(**options).config, features=(("a", "b"),))
    return bk_sdm._feature_distances(config, taps, of_teacher)


def test_large_features_in_half_precision_are_finite() -> None:
    """The square of 300 is not a float16."""
    a, b = ({name: jnp.full((2, 3, 3, 4), value, jnp.float16)} for name, value in (("a", -300), ("b", 300)))
    assert float(distances(a, b)["features/a"]) == 600**2
    assert float(distances(a, b, feature_normalize=True)["features/a"]) == 4


def test_the_scale_of_features_decides_nothing_when_they_are_normalized() -> None:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((2, 3, 3, 4)), jnp.float32) for _ in range(2))
    small, large = (
        {
            scale: float(distances({"a": scale * a}, {"b": scale * b}, feature_normalize=normalize)["features/a"])
            for scale in (1, 1000)
        }
        for normalize in (True, False)
    )
    assert small[1000] == pytest.approx(small[1], rel=1e-5)
    assert large[1000] == pytest.approx(1e6 * large[1], rel=1e-5)


def test_features_of_two_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a of the student, \(2, 3, 3, 4\), and b of the teacher, \(2, 1, 1, 4\)"):
        distances({"a": jnp.ones((2, 3, 3, 4))}, {"b": jnp.ones((2, 1, 1, 4))})


def test_a_teacher_that_takes_its_guidance_as_an_input_is_refused() -> None:
    unet = make_pair("unet", {**TEACHER, "time_cond_proj_dim": 16})[1]
    with pytest.raises(ValueError, match="takes its guidance as an input"):
        bk_sdm.make_student(unet, unet.abstract_params(), SURGERY)
