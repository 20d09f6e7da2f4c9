"""BK-SDM against its equations in NumPy, in float64, on the features that PyTorch's networks compute."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numerics import COLUMN, alpha_sigma, draw_latents, x_and_eps
from oracle import make_pair, nchw, nhwc, prune_sd
from standins import CHANNELS, CONTROLNET, EDITING, INPAINTING, SCHEDULER, SMALL_SD, TEXT_TO_IMAGE, float64, make_batch

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import bk_sdm, denoising
from codi_jax.methods.bk_sdm import BkSdmFlags, BkSdmSetup
from codi_jax.models.config import ConfigError
from codi_jax.models.pruning import LEVELS, KeptBlocks, prune, whole
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training.optim import TrainState

B = 2
# bk_small for two resolutions.
KEPT_BLOCKS = KeptBlocks.from_dict("small", {"resolutions": LEVELS["bk_small"]["resolutions"][:2], "mid": "drop"})
TEACHER = {
    **SMALL_SD,
    "layers_per_block": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "cross_attention_dim": 5,
}
BLOCKS = ["down_blocks_0", "down_blocks_1", "up_blocks_0", "up_blocks_1"]
VARIANTS: dict[str, dict[str, Any]] = {
    "of the paper": {},
    "normalized": {"feature_normalize": True, "output_weight": 0.5, "feature_weight": 0.25, "noise_offset": 0.2},
    "another type": {"student": "epsilon", "snr_gamma": 0.3, "input_perturbation": 0.3},
}


@dataclasses.dataclass
class Problem:
    """All that the loss depends on, and the teacher in PyTorch."""

    setup: BkSdmSetup
    state: TrainState
    frozen: Frozen
    torch_teacher: torch.nn.Module

    def loss(self, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = jax.jit(bk_sdm.loss, static_argnums=5)
        return loss(self.state.params, self.state, self.frozen, batch(), key, self.setup)


def batch() -> dict[str, Any]:
    return {name: value for name, value in make_batch(B).items() if name in ("moments", "context")}


def networks_of(unet: Any) -> Networks:
    return dataclasses.replace(TEXT_TO_IMAGE, unet=unet)


def make(kept_blocks: KeptBlocks | None = KEPT_BLOCKS, student: str = "v_prediction", **options: Any) -> Problem:
    torch_teacher, unet, params = make_pair("unet", TEACHER)
    method = bk_sdm.method(kept_blocks)
    setup = method.configure(networks_of(unet), BkSdmFlags(**options))
    assert {*setup.frozen} == {"unet", "vae"}
    schedule, teacher = (
        NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type})
        for prediction_type in (student, "v_prediction")
    )
    state = method.init(setup, {"unet": params}.__getitem__, optax.sgd(0.1), jax.random.key(0))
    return Problem(setup, state, Frozen({"unet": params}, schedule, teacher), torch_teacher.double())


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
    flags, schedule, data = problem.setup.flags, problem.frozen.schedule, float64(batch())
    keys = jax.random.split(key, 5)
    z0 = draw_latents(data, keys[0])
    t = np.asarray(jax.random.randint(keys[1], (B,), 0, 1000))
    noise = float64(jax.random.normal(keys[2], z0.shape))
    noise = noise + flags.noise_offset * float64(jax.random.normal(keys[3], (B, 1, 1, CHANNELS)))
    perturbed = noise + flags.input_perturbation * float64(jax.random.normal(keys[4], z0.shape))
    α, σ = (values[t][COLUMN] for values in alpha_sigma(schedule))
    z_t = α * z0 + σ * perturbed
    is_eps = schedule.prediction_type == "epsilon"
    snr = (α / σ).ravel() ** 2
    weights = 1.0 if flags.snr_gamma is None else np.minimum(snr, flags.snr_gamma) / (snr if is_eps else snr + 1)
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
    for block in BLOCKS:
        scale = of_sample(of_teacher[block]) if flags.feature_normalize else 1.0
        terms[f"features/{block}"] = np.mean(of_sample(of_student[block] - of_teacher[block]) / scale)
    return terms | {"features": sum(terms[f"features/{block}"] for block in BLOCKS)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_equal_the_equations(variant: str) -> None:
    problem, key = make(**VARIANTS[variant]), jax.random.key(7)
    value, terms = problem.loss(key)
    wanted = numpy_terms(problem, key)
    assert terms.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(terms[name], wanted[name], rtol=1e-5, err_msg=name)
    λ_out, λ_feat = problem.setup.flags.output_weight, problem.setup.flags.feature_weight
    total = wanted["task"] + λ_out * wanted["output"] + λ_feat * wanted["features"]
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_a_student_that_lacks_nothing_starts_as_its_teacher() -> None:
    teacher = make_pair("unet", TEACHER)[1]
    problem = make(whole(teacher.config))
    assert problem.setup == bk_sdm.configure(problem.setup.networks, problem.setup.flags)
    assert hash(problem.setup) == hash(dataclasses.replace(problem.setup))
    _, terms = problem.loss(jax.random.key(0))
    assert float(terms["output"]) == float(terms["features"]) == 0
    assert {f"features/{block}" for block in [*BLOCKS, "mid_block"]} <= terms.keys()
    assert terms["task"] > 0


def test_without_its_weights_the_teacher_is_not_computed_and_it_is_plain_training() -> None:
    problem, key = make(output_weight=0.0, feature_weight=0.0, snr_gamma=5.0), jax.random.key(1)
    problem.frozen = dataclasses.replace(problem.frozen, params={})
    value, terms = problem.loss(key)
    plain = denoising.configure(problem.setup.student, denoising.NoiseFlags(snr_gamma=5.0))
    state = problem.state
    wanted, _ = jax.jit(denoising.loss, static_argnums=5)(state.params, state, problem.frozen, batch(), key, plain)
    assert terms.keys() == {"task"}
    np.testing.assert_allclose(value, wanted, rtol=1e-6)


@pytest.mark.slow
def test_an_update_moves_student_and_average_and_nothing_else() -> None:
    """The average is one of the student, and not of the whole UNet."""
    problem, method = make(use_ema=True, ema_decay=0.9), bk_sdm.method(KEPT_BLOCKS)
    state = problem.state
    new, metrics = jax.jit(method.step(problem.setup, optax.sgd(0.1)))(state, problem.frozen, batch())
    assert jax.tree.structure(new.ema) == jax.tree.structure(state.params)
    for before, after, average in zip(*map(jax.tree.leaves, (state.params, new.params, new.ema)), strict=True):
        assert np.abs(after - before).max() > 0
        np.testing.assert_allclose(average, 0.9 * before + 0.1 * after, rtol=1e-5, atol=1e-7)
    assert {"loss", "task", "output", "features"} <= metrics.keys()
    export = method.export(new, problem.setup, {}.__getitem__)
    assert export.networks == {"unet": (problem.setup.student.unet, new.ema["unet"])}
    assert export.is_whole


def test_the_student_is_what_stays_of_the_teacher() -> None:
    """It alone is trained, has an average and recomputes."""
    _, unet, params = make_pair("unet", TEACHER)
    networks, method = networks_of(unet), bk_sdm.method(KEPT_BLOCKS)
    setup = method.configure(networks, BkSdmFlags(), remat=True)
    wanted_unet, wanted = prune(unet, params, KEPT_BLOCKS)
    assert setup.student.unet == dataclasses.replace(wanted_unet, remat=True)
    assert (setup.networks, setup.trained, setup.ema_decay) == (networks, ("unet",), None)
    state = method.init(setup, {"unet": params}.__getitem__, optax.identity(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, {"unet": wanted})
    assert state.ema is None


@functools.cache
def setup_of_teacher() -> BkSdmSetup:
    return bk_sdm.configure(networks_of(make_pair("unet", TEACHER)[1]), BkSdmFlags())


def distances(features: dict[str, jax.Array], of_teacher: dict[str, jax.Array], **options: Any) -> dict[str, Any]:
    setup = dataclasses.replace(setup_of_teacher(), flags=BkSdmFlags(**options), features=(("a", "b"),))
    return bk_sdm._feature_distances(setup, features, of_teacher)


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
    message = r"takes its guidance as an input \(time_cond_proj_dim\), which plain training does not give it: take"
    with pytest.raises(ValueError, match=message):
        bk_sdm.method(KEPT_BLOCKS).configure(networks_of(unet), BkSdmFlags())


@pytest.mark.parametrize("networks", [CONTROLNET, EDITING, INPAINTING], ids=["controlnet", "edit", "inpaint"])
def test_a_teacher_with_other_conditions_than_text_is_refused(networks: Networks) -> None:
    """It could be pruned, and what is left of it would not be the model that its folder says."""
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path: take a text-to-image model without a"):
        bk_sdm.method(KEPT_BLOCKS).configure(networks, BkSdmFlags())


def test_blocks_of_another_architecture_are_refused_before_weights_are_read() -> None:
    unet = make_pair("unet", TEACHER)[1]
    kept_blocks = KeptBlocks.from_dict("bk_base", LEVELS["bk_base"])
    with pytest.raises(ConfigError, match="bk_base"):
        bk_sdm.method(kept_blocks).configure(networks_of(unet), BkSdmFlags())
