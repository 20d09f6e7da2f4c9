"""Plain training against its equations in NumPy, in float64, and against diffusers' scheduler."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
import torch
from numerics import draw_latents
from standins import MODULES, SCHEDULER, float64, make_batch, numpy_predict

from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import denoising
from codi_jax.methods.denoising import Config
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.training import optim

B = standins.CHANNELS
TRAINED = {"unet": ("unet",), "controlnet": ("controlnet",), "both": ("unet", "controlnet")}
OPTIONS = [{}, {"snr_gamma": 0.3}, {"noise_offset": 0.2, "input_perturbation": 0.3}]


def numpy_loss(params, frozen, batch, key, config):
    """L, drawn with the same keys; noise and target by diffusers' scheduler in float64."""
    scheduler = diffusers.DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"})
    schedule, batch = frozen["schedule"], float64(batch)
    scheduler.register_to_config(prediction_type=schedule.prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    keys = jax.random.split(key, 5)
    z0 = draw_latents(batch, keys[0])
    t = np.asarray(jax.random.randint(keys[1], (B,), 0, 1000))
    noise = float64(jax.random.normal(keys[2], z0.shape))
    noise = noise + config.noise_offset * float64(jax.random.normal(keys[3], (B, 1, 1, B)))
    perturbed = noise + config.input_perturbation * float64(jax.random.normal(keys[4], z0.shape))
    tensors = {name: torch.tensor(x) for name, x in {"z0": z0, "noise": noise, "perturbed": perturbed, "t": t}.items()}
    z_t = scheduler.add_noise(tensors["z0"], tensors["perturbed"], tensors["t"]).numpy()
    velocity = scheduler.get_velocity(tensors["z0"], tensors["noise"], tensors["t"]).numpy()
    target = {"epsilon": noise, "v_prediction": velocity, "sample": z0}[schedule.prediction_type]
    alphas_cumprod = scheduler.alphas_cumprod.numpy()[t]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    of_type = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones(B)}[schedule.prediction_type]
    weights = np.ones(B) if config.snr_gamma is None else np.minimum(snr, config.snr_gamma) / of_type
    control = batch["conditioning"] / 255 if "controlnet" in {**frozen, **params} else None
    networks = float64({**{k: v for k, v in frozen.items() if k != "schedule"}, **params})
    out = numpy_predict(networks, z_t, t, batch["context"], batch["pooled"], batch["time_ids"], control)
    return np.mean(weights * ((out - target) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("trained", "options"), list(itertools.product(TRAINED, OPTIONS)))
def test_loss_equals_the_equations(prediction_type, trained, options):
    networks = {"unet": standins.unet_params(1)}
    if "controlnet" in TRAINED[trained]:
        networks["controlnet"] = standins.controlnet_params(2)
    params = {name: networks.pop(name) for name in TRAINED[trained]}
    schedule = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction_type})
    frozen, batch, key = {**networks, "schedule": schedule}, make_batch(B), jax.random.key(7)
    config = Config(MODULES, **options)
    value, gradient = jax.value_and_grad(lambda p: denoising.loss(p, frozen, batch, key, config)[0])(params)
    np.testing.assert_allclose(value, numpy_loss(params, frozen, batch, key, config), rtol=1e-5)
    for name in TRAINED[trained]:
        for leaf in jax.tree.leaves(gradient[name]):
            assert np.abs(leaf).max() > 0


def test_only_what_is_trained_changes_and_the_average_follows():
    optimizer, schedule = optax.sgd(0.1), NoiseSchedule.from_config(SCHEDULER)
    params = {"controlnet": standins.controlnet_params(2)}
    frozen = {"unet": standins.unet_params(1), "schedule": schedule}
    state = optim.init_state(params, optimizer, jax.random.key(0), ema=True)
    config = Config(MODULES, ema_decay=0.9)
    step = jax.jit(denoising.train_step, static_argnames=("config", "optimizer"))
    new, metrics = step(state, frozen, make_batch(B), config=config, optimizer=optimizer)
    assert new.params.keys() == {"controlnet"}
    for before, after, average in zip(*map(jax.tree.leaves, (state.params, new.params, new.ema)), strict=True):
        assert np.abs(after - before).max() > 0
        np.testing.assert_allclose(average, 0.9 * before + 0.1 * after, rtol=1e-6)
    assert int(new.step) == 1
    assert np.isfinite(metrics["loss"])


def test_steps_draw_anew_and_a_step_is_reproducible():
    optimizer = optax.sgd(0.0)
    frozen = {"unet": standins.unet_params(1), "schedule": NoiseSchedule.from_config(SCHEDULER)}
    state = optim.init_state({"controlnet": standins.controlnet_params(2)}, optimizer, jax.random.key(0))
    config, batch = Config(MODULES), make_batch(B)
    second, first_metrics = denoising.train_step(state, frozen, batch, config=config, optimizer=optimizer)
    _, again = denoising.train_step(state, frozen, batch, config=config, optimizer=optimizer)
    _, second_metrics = denoising.train_step(second, frozen, batch, config=config, optimizer=optimizer)
    assert first_metrics["loss"] == again["loss"]
    assert first_metrics["loss"] != second_metrics["loss"]


def test_a_text_encoder_is_trained_through_its_prompts():
    """Its parameters are among those that are trained, so the gradient must reach them."""

    config = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "eos_token_id": 3}
    encoder = CLIPTextModel(CLIPTextConfig(**config, num_attention_heads=2, max_position_embeddings=2))
    modules = denoising.Modules(unet=MODULES.unet, vae=MODULES.vae, text_encoder=encoder)
    batch = {k: v for k, v in make_batch(B).items() if k == "moments"}
    batch["input_ids"] = {"text_encoder": jnp.arange(B)[:, None] % 4}
    params = {"unet": standins.unet_params(1), "text_encoder": encoder.random_params(jax.random.key(0))}
    # The stand-in for the UNet takes the mean of the text, which is zero behind a layer norm that is new.
    params["text_encoder"]["text_model"]["final_layer_norm"]["scale"] = jnp.arange(8.0)
    frozen = {"schedule": NoiseSchedule.from_config(SCHEDULER)}
    gradient = jax.grad(lambda p: denoising.loss(p, frozen, batch, jax.random.key(0), Config(modules))[0])(params)
    table = gradient["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    used = np.abs(table).max(1)
    assert (used[:B] > 1e-5).all()
    assert used[B] == 0
