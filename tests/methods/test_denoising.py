"""Plain training against its equations in NumPy, in float64, and against diffusers' scheduler."""

import dataclasses
import itertools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
import torch
from numerics import draw_latents
from published import TINY_VAE
from standins import (
    CONTROLNET,
    DISTILLED,
    EDITING,
    INPAINTING,
    SCHEDULER,
    SMALL_SD,
    TEXT_TO_IMAGE,
    float64,
    make_batch,
    null_text,
    numpy_predict,
    small_unet,
)

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods import denoising
from codi_jax.methods.denoising import DenoisingFlags, EditFlags, TextToImageFlags
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.conditions import Frozen, drop_conditions, prepare
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim

B = standins.CHANNELS
TRAINED = {"unet": ("unet",), "controlnet": ("controlnet",), "both": ("unet", "controlnet")}
OPTIONS = [{}, {"snr_gamma": 0.3}, {"noise_offset": 0.2, "input_perturbation": 0.3}]


def numpy_loss(params, frozen, batch, key, flags):
    """L, drawn with the same keys; noise and target by diffusers' scheduler in float64."""
    scheduler = diffusers.DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"})
    schedule, batch = frozen.schedule, float64(batch)
    scheduler.register_to_config(prediction_type=schedule.prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    keys = jax.random.split(key, 5)
    z0 = draw_latents(batch, keys[0])
    t = np.asarray(jax.random.randint(keys[1], (B,), 0, 1000))
    noise = float64(jax.random.normal(keys[2], z0.shape))
    noise = noise + flags.noise_offset * float64(jax.random.normal(keys[3], (B, 1, 1, B)))
    perturbed = noise + flags.input_perturbation * float64(jax.random.normal(keys[4], z0.shape))
    tensors = {name: torch.tensor(x) for name, x in {"z0": z0, "noise": noise, "perturbed": perturbed, "t": t}.items()}
    z_t = scheduler.add_noise(tensors["z0"], tensors["perturbed"], tensors["t"]).numpy()
    velocity = scheduler.get_velocity(tensors["z0"], tensors["noise"], tensors["t"]).numpy()
    target = {"epsilon": noise, "v_prediction": velocity, "sample": z0}[schedule.prediction_type]
    alphas_cumprod = scheduler.alphas_cumprod.numpy()[t]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    of_type = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones(B)}[schedule.prediction_type]
    weights = np.ones(B) if flags.snr_gamma is None else np.minimum(snr, flags.snr_gamma) / of_type
    networks = float64({**frozen.params, **params})
    control = batch["conditioning"] / 255 if "controlnet" in networks else None
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
    frozen, batch, key, flags = (
        Frozen(networks, schedule),
        make_batch(B),
        jax.random.key(7),
        TextToImageFlags(**options),
    )
    setup = denoising.configure(CONTROLNET, flags, trained=TRAINED[trained])
    state = optim.init_state(params, optax.identity(), key)
    value, gradient = jax.value_and_grad(lambda p: denoising.loss(p, state, frozen, batch, key, setup)[0])(params)
    np.testing.assert_allclose(value, numpy_loss(params, frozen, batch, key, flags), rtol=1e-5)
    for name in TRAINED[trained]:
        for leaf in jax.tree.leaves(gradient[name]):
            assert np.abs(leaf).max() > 0


def controlnet_problem(optimizer: Any, **options: Any) -> tuple[Any, Any, Frozen]:
    setup = denoising.CONTROLNET.configure(CONTROLNET, DenoisingFlags(**options))
    load = {"controlnet": standins.controlnet_params(2)}.__getitem__
    state = denoising.init(setup, load, optimizer, jax.random.key(0))
    return setup, state, Frozen({"unet": standins.unet_params(1)}, NoiseSchedule.from_config(SCHEDULER))


def test_only_what_is_trained_changes_and_the_average_follows():
    optimizer = optax.sgd(0.1)
    setup, state, frozen = controlnet_problem(optimizer, use_ema=True, ema_decay=0.9)
    step = jax.jit(denoising.CONTROLNET.step(setup, optimizer))
    new, metrics = step(state, frozen, make_batch(B))
    assert new.params.keys() == {"controlnet"}
    for before, after, average in zip(*map(jax.tree.leaves, (state.params, new.params, new.ema)), strict=True):
        assert np.abs(after - before).max() > 0
        np.testing.assert_allclose(average, 0.9 * before + 0.1 * after, rtol=1e-6)
    assert int(new.step) == 1
    assert np.isfinite(metrics["loss"])


def test_steps_draw_anew_and_a_step_is_reproducible():
    optimizer = optax.sgd(0.0)
    setup, state, frozen = controlnet_problem(optimizer)
    step, batch = denoising.CONTROLNET.step(setup, optimizer), make_batch(B)
    second, first_metrics = step(state, frozen, batch)
    _, again = step(state, frozen, batch)
    _, second_metrics = step(second, frozen, batch)
    assert first_metrics["loss"] == again["loss"]
    assert first_metrics["loss"] != second_metrics["loss"]


def test_a_text_encoder_is_trained_through_its_prompts():
    """Its parameters are among those that are trained, so the gradient must reach them."""

    config = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "eos_token_id": 3}
    encoder = CLIPTextModel(CLIPTextConfig(**config, num_attention_heads=2, max_position_embeddings=2))
    networks = dataclasses.replace(TEXT_TO_IMAGE, text_encoder=encoder)
    setup = denoising.TEXT_TO_IMAGE.configure(networks, TextToImageFlags(train_text_encoder=True))
    assert {*setup.trained} == {"unet", "text_encoder"}
    assert setup.frozen == ("vae",)
    batch = {k: v for k, v in make_batch(B).items() if k == "moments"}
    batch["input_ids"] = {"text_encoder": jnp.arange(B)[:, None] % 4}
    params = {"unet": standins.unet_params(1), "text_encoder": encoder.random_params(jax.random.key(0))}
    # The stand-in for the UNet takes the mean of the text, which is zero behind a layer norm that is new.
    params["text_encoder"]["text_model"]["final_layer_norm"]["scale"] = jnp.arange(8.0)
    state = denoising.init(setup, params.__getitem__, optax.identity(), jax.random.key(0))
    frozen = Frozen({}, NoiseSchedule.from_config(SCHEDULER))
    gradient = jax.grad(lambda p: denoising.loss(p, state, frozen, batch, jax.random.key(0), setup)[0])(state.params)
    table = gradient["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    used = np.abs(table).max(1)
    assert (used[:B] > 1e-5).all()
    assert used[B] == 0


def test_an_editor_is_trained_on_what_is_left_of_its_conditions():
    """With the source image beside the noisy latents, and the null text or no image for some of the samples."""
    flags, batch, key = EditFlags(conditioning_dropout_prob=0.3), make_batch(B), jax.random.key(8)
    setup = denoising.INSTRUCT_PIX2PIX.configure(EDITING, flags)
    assert setup.needs_null_text
    params = {"unet": standins.unet_params(1, edits=True)}
    schedule = NoiseSchedule.from_config(SCHEDULER)
    state, frozen = optim.init_state(params, optax.identity(), key), Frozen({}, schedule, null_text=null_text())
    value, _ = denoising.loss(params, state, frozen, batch, key, setup)
    keys = jax.random.split(key, 5)
    inputs = prepare(EDITING, {}, batch, keys[0], frozen.null_text)
    full = float64(drop_conditions(inputs, jax.random.fold_in(key, 5), 0.3).conditions.full)
    assert np.any(full.context != float64(batch["context"]))
    assert np.any(np.all(full.image == 0, axis=(1, 2, 3)))
    t = np.asarray(jax.random.randint(keys[1], (B,), 0, 1000))
    noise, z0 = float64(jax.random.normal(keys[2], inputs.z0.shape)), draw_latents(float64(batch), keys[0])
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)[t][:, None, None, None]
    z_t = np.sqrt(alphas_cumprod) * z0 + np.sqrt(1 - alphas_cumprod) * noise
    text = full.context, full.added_cond["text_embeds"], full.added_cond["time_ids"]
    out = numpy_predict(float64(params), z_t, t, *text, None, full.image)
    np.testing.assert_allclose(value, np.mean((out - noise) ** 2), rtol=1e-5)


# ---- What is trained, and where it starts


def test_a_given_network_starts_as_it_is_and_a_new_one_from_the_unet():
    """A UNet gets input channels that see nothing yet, and a ControlNet the UNet's encoder."""
    given = {"unet": standins.unet_params(1), "controlnet": standins.controlnet_params(2)}
    for method, networks, name in (
        (denoising.TEXT_TO_IMAGE, TEXT_TO_IMAGE, "unet"),
        (denoising.INSTRUCT_PIX2PIX, EDITING, "unet"),
        (denoising.CONTROLNET, CONTROLNET, "controlnet"),
    ):
        setup = method.configure(networks, method.flags(), remat=True)
        assert setup.trained == (name,)
        assert {*setup.frozen} == networks.by_name().keys() - {name}
        assert setup.student.by_name()[name].remat
        state = method.init(setup, given.__getitem__, optax.identity(), jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, state.params, {name: given[name]})
        assert state.ema is None

    unet, params = small_unet(SMALL_SD)
    networks, load = Networks(unet, AutoencoderKL(VAEConfig.from_dict(TINY_VAE))), {"unet": params}.__getitem__
    setup = denoising.INSTRUCT_PIX2PIX.configure(networks, EditFlags(use_ema=True))
    assert (setup.student.unet.config.in_channels, setup.student.task) == (8, "edit")
    state = denoising.init(setup, load, optax.identity(), jax.random.key(0))
    kernel = np.asarray(state.params["unet"]["conv_in"]["kernel"])
    np.testing.assert_array_equal(kernel, np.concatenate([params["conv_in"]["kernel"], np.zeros((3, 3, 4, 16))], 2))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)

    setup = denoising.CONTROLNET.configure(networks, DenoisingFlags())
    state = denoising.init(setup, load, optax.identity(), jax.random.key(0))
    assert jax.tree.structure(state.params["controlnet"]) == jax.tree.structure(
        setup.student.controlnet.abstract_params()
    )
    for name in ("conv_in", "time_embedding", "down_blocks_1", "mid_block"):
        jax.tree.map(np.testing.assert_array_equal, state.params["controlnet"][name], params[name])
    assert not np.any(state.params["controlnet"]["controlnet_mid_block"]["kernel"])


def test_what_is_shown_and_exported_is_the_average_where_one_is_kept():
    for options in ({}, {"use_ema": True}):
        setup, state, _ = controlnet_problem(optax.identity(), **options)
        wanted = state.ema if options else state.params
        assert denoising.CONTROLNET.result(state, setup, {}.__getitem__) is wanted
        export = denoising.CONTROLNET.export(state, setup, {}.__getitem__)
        assert export.networks == {"controlnet": (setup.student.controlnet, wanted["controlnet"])}
        assert export.is_whole


def test_models_that_cannot_be_trained_are_named():
    for method in (denoising.TEXT_TO_IMAGE, denoising.CONTROLNET):
        networks = dataclasses.replace(DISTILLED, controlnet=CONTROLNET.controlnet)
        message = r"takes its guidance as an input \(time_cond_proj_dim\), which plain training does not give it"
        with pytest.raises(ValueError, match=message):
            method.configure(networks, method.flags())
    message = r"--pretrained_model_name_or_path: its UNet has 7 input channels, but an .* model's has 6: train one"
    with pytest.raises(ValueError, match=message):
        denoising.INSTRUCT_PIX2PIX.configure(INPAINTING, EditFlags())


# ---- How it is sampled


def test_a_trained_unet_takes_many_steps_and_a_controlnet_changes_nothing():
    """The few steps of a student are lost when it is trained at all times."""
    teacher = NoiseSchedule.from_config(SCHEDULER)
    student = teacher.sampled(SamplingSpec.lcm())
    assert denoising.CONTROLNET.sampling(student, DenoisingFlags()) == student
    for method in (denoising.TEXT_TO_IMAGE, denoising.INSTRUCT_PIX2PIX):
        assert method.sampling(teacher, method.flags()) is teacher
        assert method.sampling(student, method.flags()).sampling == SamplingSpec.many_steps()
    of_v = denoising.TEXT_TO_IMAGE.sampling(student, TextToImageFlags(prediction_type="v_prediction"))
    assert (of_v.prediction_type, of_v.sampling.sampler) == ("v_prediction", "ddim")
