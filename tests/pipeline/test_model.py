"""The model as a value: what it is asked for by default, what changes it, and which programs it shares."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from folders import FAMILIES, SIZE, make_pipeline
from pairs import (
    PROMPTS,
    Pairs,
    as_in_folder,
    assert_same_picture,
    latents,
    run_both,
    run_ours,
    run_theirs,
    same_tree,
)

from codi_jax import pipeline
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.timesteps import default_sampler, timesteps_for
from codi_jax.models.config import ConfigError, WeightsError
from codi_jax.pipeline import DiffusionPipeline
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.programs import Programs


def test_another_schedule_is_another_program(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    run_ours(pair.ours)
    schedule = pair.ours.schedule.with_config(prediction_type="v_prediction")
    assert_same_picture(*run_both(as_in_folder(pair._replace(ours=pair.ours.replace(schedule=schedule)))))


def test_a_teacher_is_shown_in_no_more_steps_than_it_was_distilled_for(pairs: Pairs) -> None:
    ours, many = pairs("text-to-image").ours, 50
    schedules = {
        50: ours.schedule,
        4: ours.schedule.sampled(SamplingSpec.codi(4)),
        20: ours.schedule.sampled(SamplingSpec.lcm(20)),
        1: ours.schedule.sampled(SamplingSpec.generator([399])),
    }
    for steps, schedule in schedules.items():
        model = ours.replace(schedule=schedule)
        assert model.sampling.most_steps(many) == steps
        assert len(model.times(model.sampling.most_steps(many))) == steps
        assert model.sampling.most_steps(1) == 1
        # What is checked before loading.
        timesteps_for(default_sampler(schedule), schedule, schedule.sampling.most_steps(many))


def test_default_steps_of_a_model(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    assert [len(ours.times(sampler=name)) for name in ("ddim", "dpm-solver++", "pndm", "lcm")] == [50, 50, 51, 4]
    assert len(pairs("lcm").ours.times()) == 4
    ours = pairs("sdxl").ours
    for grid, steps in [(8, 4), (2, 2)]:
        assert len(ours.replace(schedule=ours.schedule.sampled(SamplingSpec.codi(grid))).times()) == steps


# ---- Seeds


@pytest.mark.parametrize("options", [{}, {"sampler": "lcm", "steps": 4}], ids=["ddim", "lcm"])
def test_image_i_is_that_of_seed_plus_i(pairs: Pairs, options: dict[str, Any]) -> None:
    ours = pairs("text-to-image").ours
    prompts = PROMPTS[:1] * 2
    options = {"latents": None, "prompt": prompts, **options}
    first, second = run_ours(ours, seed=5, **options), run_ours(ours, seed=6, **options)
    np.testing.assert_array_equal(first, run_ours(ours, seed=5, **options))
    np.testing.assert_array_equal(first[1], second[0])
    assert np.abs(first[0].astype(int) - first[1]).mean() > 10


def test_the_image_of_a_seed_does_not_depend_on_the_batch(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    both = run_ours(ours, seed=5, latents=None)
    alone = run_ours(ours, prompt=PROMPTS[1], seed=6, latents=None)
    np.testing.assert_allclose(alone[0], both[1], atol=1)


# ---- LoRA


def lora_file(family: str, folder: Path, scratch: Path) -> None:
    """A random LoRA of the UNet and the text encoder, as diffusers' training scripts write it."""
    pipeline = make_pipeline(family, scratch)
    torch.manual_seed(1)
    states, adapted = {}, {}
    for part, targets in {"unet": ["to_q", "to_v", "to_out.0", "conv1"], "text_encoder": ["q_proj", "v_proj"]}.items():
        adapted[part] = getattr(pipeline, part)
        adapted[part].add_adapter(
            peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian")
        )
        for name, weight in adapted[part].named_parameters():
            if "lora_B" in name:  # made zero
                torch.nn.init.normal_(weight, std=0.2)
        states[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(adapted[part])
    FAMILIES[family][0].save_lora_weights(folder, **states, **_collate_lora_metadata(adapted))


def test_a_lora_equals_diffusers(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("text-to-image")
    lora_file("text-to-image", tmp_path / "lora", tmp_path)
    theirs = make_pipeline("text-to-image", tmp_path)
    theirs.load_lora_weights(tmp_path / "lora", adapter_name="lora")
    theirs.set_adapters("lora", 0.5)
    wanted = run_theirs(pair.family, theirs, latents(), num_inference_steps=2, guidance_scale=3.0)
    ours = Model.from_pretrained(pair.folder, lora=tmp_path / "lora", lora_scale=0.5)
    assert_same_picture(run_ours(ours), wanted)
    assert np.abs(wanted.astype(int) - run_ours(pair.ours)).mean() > 3, "the LoRA changes nothing"
    # Several are merged one after the other, and what was merged is what is saved.
    apart = Model.from_pretrained(
        pair.folder, lora=[(tmp_path / "lora", 0.75), (tmp_path / "lora", 0.25)], lora_scale=0.5
    )
    assert all(
        np.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(jax.tree.leaves(apart.params), jax.tree.leaves(ours.params), strict=True)
    )
    twice = Model.from_pretrained(pair.folder, lora=[tmp_path / "lora"] * 2, lora_scale=0.25)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice.params, ours.params)
    assert same_tree(pair.ours.merge_lora(tmp_path / "lora", 0.5).params, ours.params)
    assert pair.ours.params is not ours.params, "merging makes another model"
    ours.save_pretrained(tmp_path / "merged")
    assert same_tree(Model.from_pretrained(tmp_path / "merged").params, ours.params)
    with pytest.raises(WeightsError, match=r"LoRA for another model|does not fit the model"):
        Model.from_pretrained(pairs("sdxl").folder, lora=tmp_path / "lora")


# ---- Programs


def test_a_second_call_compiles_nothing(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    before = jax.tree.map(np.array, ours.params)
    run_ours(ours)
    others = [
        {"guidance_scale": 5.5, "seed": 3, "latents": None},
        {"guidance_scale": 2, "prompt": ["x", "y"]},  # an int is a number too
        {"latents": latents().astype(np.float64), "negative_prompt": "z"},
    ]
    for options in others:
        run_ours(ours, **options)
        assert ours.compile_seconds < 0.1
        assert ours.seconds > 0
    assert same_tree(ours.params, before), "generating must not use up or change the parameters"


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "codi"])
def test_few_steps_are_compiled_once_for_all_their_numbers(pairs: Pairs, sampler: Any) -> None:
    """What they give is compared with diffusers above."""
    ours = pairs("text-to-image").ours
    ours = ours.replace(schedule=ours.schedule.sampled(SamplingSpec.codi(50)), programs=Programs())
    seen = [run_ours(ours, sampler=sampler, steps=steps) for steps in (1, 2, 4, 8)]
    assert len(ours.programs._compiled) == 1
    assert len({images.tobytes() for images in seen}) == 4


def test_steps_are_reported_and_the_pipeline_is_let_go(pairs: Pairs) -> None:
    ours = Model.from_pretrained(pairs("text-to-image").folder)
    first, second = [], []
    run_ours(ours, steps=3, on_step=first.append)
    run_ours(ours, steps=3, on_step=lambda step, pipeline=ours: second.append(step))
    assert first == second == [0, 1, 2]
    assert ours.compile_seconds < 0.1
    # JAX keeps compiled programs for good: they must not hold the parameters.
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None


def test_nan_is_an_error_that_names_the_image(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    bad = latents()
    bad[1, 3, 3, 0] = np.nan
    with pytest.raises(FloatingPointError, match="image 1 has NaN or infinite values: with float16 try bfloat16"):
        run_ours(ours, latents=bad)
    unet = ours.params["unet"]
    broken = {**unet, "conv_out": jax.tree.map(lambda x: x.at[0].set(jnp.nan), unet["conv_out"])}
    with pytest.raises(FloatingPointError, match="image 0 has NaN"):
        run_ours(ours.with_params({"unet": broken}))


@pytest.mark.usefixtures("nothing_runs")
def test_a_scheduler_without_a_sampler_needs_one(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    ours = ours.replace(schedule=ours.schedule.with_config(_class_name="KDPM2DiscreteScheduler"))
    with pytest.raises(ValueError, match="There is no sampler for KDPM2DiscreteScheduler: choose one of ddim"):
        run_ours(ours)


# ---- Immutable


def scaled(tree: Any, factor: float = 1.5) -> Any:
    return jax.tree.map(lambda x: factor * x, tree)


def test_models_that_differ_in_parameters_share_their_programs(pairs: Pairs) -> None:
    """Nothing is compiled again for a trained student, nor after it for the model that it came from."""
    ours = pairs("text-to-image").ours
    before = run_ours(ours)
    compiled = len(ours.programs._compiled)
    changed = ours.with_params({"unet": {**ours.params["unet"], "conv_out": scaled(ours.params["unet"]["conv_out"])}})
    made = run_ours(changed)
    assert len(changed.programs._compiled) == compiled
    assert changed.compile_seconds < 0.1
    assert np.any(made != before)
    np.testing.assert_array_equal(run_ours(ours), before)
    assert len(ours.programs._compiled) == compiled


def test_changes_make_another_model(pairs: Pairs) -> None:
    """The first one keeps its networks, its parameters, its schedule and where it came from."""
    ours, other = pairs("text-to-image").ours, pairs("controlnet").ours
    fields = [field.name for field in dataclasses.fields(ours)]
    before = {name: getattr(ours, name) for name in fields}
    params, sources = dict(ours.params), dict(ours.sources)
    unet, controlnet = scaled(ours.params["unet"]), other.networks.controlnet
    source = {"source": "elsewhere"}

    changed = {
        "params": ours.with_params({"unet": unet}),
        "without": ours.without_params("vae", "text_encoder"),
        "network": ours.with_network("controlnet", controlnet, other.params["controlnet"], source),
        "network alone": ours.with_network("controlnet", controlnet),
        "schedule": ours.replace(schedule=ours.schedule.sampled(SamplingSpec.lcm())),
    }
    assert changed["params"].params["unet"] is unet
    assert changed["params"].params["vae"] is ours.params["vae"]
    assert set(changed["without"].params) == {"unet"}
    assert changed["without"].networks == ours.networks
    assert changed["network"].params["controlnet"] is other.params["controlnet"]
    assert (changed["network"].sources["controlnet"], changed["network"].sources["unet"]) == (source, sources["unet"])
    assert changed["network alone"].networks == changed["network"].networks == other.networks
    assert "controlnet" not in changed["network alone"].params
    assert changed["network"].with_network("controlnet", None).networks == ours.networks
    assert changed["network"].with_network("controlnet", None).params.keys() == params.keys()
    assert (changed["schedule"].sampling.sampler, ours.sampling.sampler) == ("lcm", "ddim")

    assert all(getattr(ours, name) is before[name] for name in fields)
    assert dict(ours.params) == params
    assert dict(ours.sources) == sources
    for name in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(ours, name, None)


def test_a_network_that_does_not_fit_is_refused(pairs: Pairs) -> None:
    with pytest.raises(ConfigError, match="made for this model's family"):
        pairs("text-to-image").ours.with_network("controlnet", pairs("sdxl-controlnet").ours.networks.controlnet)


def test_a_model_without_weights_tells_what_it_is(pairs: Pairs) -> None:
    pair = pairs("sdxl-controlnet")
    opened = Model.open(pair.folder)
    assert opened.params == {}
    assert (opened.networks, opened.task, opened.sampling) == (pair.ours.networks, pair.ours.task, pair.ours.sampling)
    assert opened.networks.is_sdxl
    opened.check(control_image=np.zeros((SIZE, SIZE, 3), np.uint8), steps=4)
    with pytest.raises(ValueError, match="the pipeline has a ControlNet: give it a control_image"):
        opened.check(steps=4)


def test_the_former_name_of_the_model() -> None:
    assert DiffusionPipeline is pipeline.Model is Model
    with pytest.raises(AttributeError, match=r"module 'codi_jax\.pipeline' has no attribute 'Pipeline'"):
        pipeline.Pipeline  # noqa: B018
