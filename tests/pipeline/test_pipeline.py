"""Whole pipelines against those of diffusers: the same folder, the same noise, the same picture."""

import dataclasses
import functools
import gc
import itertools
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from folders import FAMILIES, SD_UNET, SIZE, make_pipeline
from oracle import make_torch
from PIL import Image

from codi_jax.diffusion.sampling import default_sampler, most_steps, timesteps_for
from codi_jax.models.config import ConfigError, WeightsError
from codi_jax.pipeline.generation import choose_guidance
from codi_jax.pipeline.model import DiffusionPipeline, _padded

PROMPTS = ["a red cat", "two dogs"]


class Pair(NamedTuple):
    """A diffusers pipeline, and ours, loaded from the folder that it saved."""

    family: str
    theirs: Any
    ours: DiffusionPipeline
    folder: Path


Pairs = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    @functools.cache
    def load(family: str) -> Pair:
        scratch = tmp_path_factory.mktemp(family)
        theirs = make_pipeline(family, scratch)
        theirs.save_pretrained(scratch / "model")
        return Pair(family, theirs, DiffusionPipeline.from_pretrained(scratch / "model"), scratch / "model")

    return load


def picture(seed: int) -> Image.Image:
    """A smooth picture: what a VAE sees of noise depends on the last bit."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def images_for(family: str) -> dict[str, Any]:
    """The image arguments of a family, with our names."""
    if "controlnet" in family:
        return {"control_image": [picture(0), picture(1)]}
    if "pix2pix" in family:
        return {"image": [picture(0), picture(1)]}
    if family == "inpainting":
        mask = np.zeros((SIZE, SIZE, 3), np.uint8)
        mask[8:20, 12:] = 255
        return {"image": [picture(0), picture(1)], "mask_image": [Image.fromarray(mask)] * 2}
    return {}


def run_theirs(family: str, pipeline: Any, latents: np.ndarray, **options: Any) -> np.ndarray:
    given = images_for(family)
    if "control_image" in given:
        given["image"] = given.pop("control_image")
    if family == "inpainting":
        given.update(height=SIZE, width=SIZE)
    latents = torch.from_numpy(latents).permute(0, 3, 1, 2)
    out = pipeline(**{"prompt": PROMPTS, "latents": latents, "output_type": "np", **given, **options})
    return (out.images * 255).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def _mode_of_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """To inpaint, diffusers samples the latents of the masked image; we take their mode."""
    distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mean)


def latents(height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, height, width, 4), dtype=np.float32)


def inject(monkeypatch: pytest.MonkeyPatch, noise: np.ndarray) -> None:
    """Makes diffusers' LCM scheduler draw our noise."""
    draws = itertools.cycle(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(draws))


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 10, "a flat picture proves nothing"
    difference = np.abs(ours.astype(int) - theirs.astype(int)).max()
    assert difference <= 2, f"largest difference {difference} of 255"


# ---- Pictures

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, "ddim"),
    "dpm-solver++": (diffusers.DPMSolverMultistepScheduler, "dpm-solver++"),
    "lcm": (diffusers.LCMScheduler, "lcm"),
}
# Every program has to be compiled: here is what no test below covers, and the others are slow.
QUICK = {
    ("text-to-image", "dpm-solver++", 20),
    ("text-to-image", "lcm", 4),
    ("instruct-pix2pix", "ddim", 4),
    ("inpainting", "lcm", 4),
    ("lcm", "lcm", 4),
    ("sdxl-controlnet", "lcm", 4),
    ("sdxl-instruct-pix2pix", "ddim", 4),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(FAMILIES, SCHEDULERS, (4, 20))
    if case[0] != "lcm" or case[1] == "lcm"  # diffusers' pipeline for LCM takes no other scheduler
]


@pytest.mark.parametrize(("family", "sampler", "steps"), CASES)
def test_pictures_equal_diffusers(
    pairs: Pairs, family: str, sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs, ours, _ = pairs(family)
    scheduler_class, name = SCHEDULERS[sampler]
    theirs.scheduler = scheduler_class.from_config(ours.schedule.to_config())
    noise = np.random.default_rng(8).standard_normal((steps - 1, 2, 8, 8, 4), dtype=np.float32)
    inject(monkeypatch, noise)
    scales = {"guidance_scale": 3.0}
    if "pix2pix" in family:
        scales["image_guidance_scale"] = 1.5
    wanted = run_theirs(family, theirs, latents(), num_inference_steps=steps, **scales)
    made = ours(PROMPTS, **images_for(family), sampler=name, steps=steps, latents=latents(), noise=noise, **scales)
    assert_same_picture(made, wanted)


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow)


# The smallest run: most tests below share this one program, two images in two steps with guidance.
RUN = {"steps": 2, "guidance_scale": 3.0}


def run_ours(ours: DiffusionPipeline, **options: Any) -> np.ndarray:
    return ours(**{"prompt": PROMPTS, "latents": latents(), **RUN, **options})


def as_in_folder(pair: Pair) -> Any:
    """Their pipeline with the scheduler that is in the folder, whatever the tests before did."""
    pair.theirs.scheduler = diffusers.DDIMScheduler.from_config(pair.ours.schedule.to_config())
    return pair.theirs


def run_both(pair: Pair, ours: dict[str, Any] | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our picture and theirs; ``ours`` are arguments with another name or value in our call."""
    theirs = {"latents": latents(), "num_inference_steps": 2, "guidance_scale": 3.0, **options}
    wanted = run_theirs(pair.family, as_in_folder(pair), **theirs)
    return run_ours(pair.ours, **{**images_for(pair.family), **options, **(ours or {})}), wanted


@pytest.mark.parametrize("negative", ["a blue dog", ""])
def test_negative_prompts_equal_diffusers(pairs: Pairs, negative: str) -> None:
    pair = pairs("text-to-image")
    made, wanted = run_both(pair, {"negative_prompt": negative}, negative_prompt=[negative] * 2)
    assert_same_picture(made, wanted)
    assert np.array_equal(made, run_ours(pair.ours)) == (not negative), "the empty text is the null text"


@pytest.mark.parametrize("negative", ["a blue dog", ""])
def test_negative_prompts_and_sizes_of_sdxl_equal_diffusers(pairs: Pairs, negative: str) -> None:
    """SDXL's null text is zeros, which the empty text is not. Its networks are told the size."""
    options = {"latents": latents(10, 6), "height": 40, "width": 24}
    assert_same_picture(
        *run_both(pairs("sdxl"), {"negative_prompt": negative}, negative_prompt=[negative] * 2, **options)
    )


def test_a_control_image_is_resized_as_diffusers_does(pairs: Pairs) -> None:
    rng = np.random.default_rng(0)
    control = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in PROMPTS]
    options = {"latents": latents(10, 6), "height": 40, "width": 24}
    assert_same_picture(
        *run_both(pairs("controlnet"), {"control_image": control, "image": None}, image=control, **options)
    )


@pytest.mark.parametrize("scale", [1, 0.5, 0, -1])
@pytest.mark.parametrize(
    "family", ["text-to-image", "controlnet", *map(slow, ("inpainting", "sdxl", "sdxl-controlnet"))]
)
def test_without_guidance_equals_diffusers(pairs: Pairs, family: str, scale: float) -> None:
    """A scale of 0 is "no guidance" to users of few-step models, and not the unconditional picture."""
    assert_same_picture(*run_both(pairs(family), guidance_scale=scale))


@pytest.mark.parametrize(
    "scales", [(0, 1.5), (1, 1.5), (0.5, 1), (3, 0.5), (3, 0), (0, 0)], ids=lambda scales: "-".join(map(str, scales))
)
@pytest.mark.parametrize("family", ["instruct-pix2pix", slow("sdxl-instruct-pix2pix")])
def test_editors_without_guidance_equal_diffusers(pairs: Pairs, family: str, scales: tuple[float, float]) -> None:
    """Where either scale is too low there is none at all, of the image neither."""
    text, image = scales
    assert_same_picture(*run_both(pairs(family), guidance_scale=text, image_guidance_scale=image))


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3])
def test_a_guidance_embedding_is_that_of_the_scale_minus_one(pairs: Pairs, scale: float) -> None:
    """At low scales, too: nothing else says how much guidance there is."""
    pair = pairs("lcm")
    pair.theirs.scheduler = diffusers.LCMScheduler.from_config(pair.ours.schedule.to_config())
    options = {"num_inference_steps": 1, "guidance_scale": scale}
    wanted = run_theirs(pair.family, pair.theirs, latents(), **options)
    assert_same_picture(run_ours(pair.ours, steps=1, guidance_scale=scale), wanted)
    assert np.any(run_ours(pair.ours, steps=1, guidance_scale=scale + 1) != wanted)


def test_image_guidance_one_needs_two_passes_and_equals_diffusers(pairs: Pairs) -> None:
    """diffusers always makes three."""
    assert_same_picture(*run_both(pairs("instruct-pix2pix"), image_guidance_scale=1))


@pytest.mark.parametrize(
    ("scales", "model", "guidance"),
    [
        ((7.5, 1.5), {}, "classifier_free"),
        ((1, 1.5), {}, "none"),
        ((7.5, 1.5), {"edits": True}, "instruct_pix2pix"),
        ((0, 1.5), {}, "none"),
        ((7.5, 0), {}, "classifier_free"),
        ((1, 1.5), {"edits": True}, "none"),
        ((7.5, 1), {"edits": True}, "image"),
        ((7.5, 0.9), {"edits": True}, "none"),
        ((1, 1), {"edits": True}, "none"),
        ((7.5, 1.5), {"embeds_guidance": True}, "embedded"),
        ((1, 1), {"embeds_guidance": True}, "embedded"),
        ((0, 0), {"embeds_guidance": True}, "embedded"),
    ],
)
def test_guidance_takes_the_fewest_passes(scales: tuple[float, float], model: dict[str, bool], guidance: str) -> None:
    assert choose_guidance(*scales, **{"edits": False, "embeds_guidance": False, **model}) == guidance


@pytest.mark.slow
def test_inpainting_with_a_controlnet_equals_diffusers(pairs: Pairs) -> None:
    inpainting, controlnet = pairs("inpainting"), pairs("controlnet")
    parts = {**as_in_folder(inpainting).components, "controlnet": controlnet.theirs.controlnet}
    theirs = diffusers.StableDiffusionControlNetInpaintPipeline(**parts, requires_safety_checker=False)
    scales = {"guidance_scale": 3.0, "controlnet_conditioning_scale": 0.7}
    options = {"control_image": images_for("controlnet")["control_image"], **scales}
    wanted = run_theirs("inpainting", theirs, latents(), num_inference_steps=2, **options)
    ours = DiffusionPipeline.from_pretrained(inpainting.folder, controlnet.folder)
    assert_same_picture(run_ours(ours, **images_for("inpainting"), **options), wanted)


def test_timesteps_of_ones_own_equal_diffusers(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    pair.theirs.scheduler = diffusers.LCMScheduler.from_config(pair.ours.schedule.to_config())
    wanted = run_theirs(pair.family, pair.theirs, latents(), timesteps=[399], guidance_scale=3.0)
    assert_same_picture(run_ours(pair.ours, steps=None, timesteps=[399], sampler="lcm"), wanted)


def test_another_schedule_is_another_program(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    run_ours(pair.ours)
    before = pair.ours.schedule
    pair.ours.schedule = before.with_config(prediction_type="v_prediction")
    try:
        assert_same_picture(*run_both(pair))
    finally:
        pair.ours.schedule = before


def test_a_teacher_is_shown_in_no_more_steps_than_it_was_distilled_for(pairs: Pairs) -> None:
    ours, many = pairs("text-to-image").ours, 50
    schedules = {
        50: ours.schedule,
        4: ours.schedule.with_distillation_grid(4),
        20: ours.schedule.with_consistency_grid(20),
        1: ours.schedule.with_generator_timesteps([399]),
    }
    for steps, schedule in schedules.items():
        pipeline = dataclasses.replace(ours, schedule=schedule)
        assert most_steps(schedule, many) == steps
        assert len(pipeline.times(most_steps(schedule, many))) == steps
        assert most_steps(schedule, 1) == 1
        timesteps_for(default_sampler(schedule), schedule, most_steps(schedule, many))  # what is checked before loading


def test_default_steps(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    assert [len(ours.times(sampler=name)) for name in ("ddim", "dpm-solver++", "pndm", "lcm")] == [50, 50, 51, 4]
    assert len(pairs("lcm").ours.times()) == 4
    ours = pairs("sdxl").ours
    before = ours.schedule
    try:
        for grid, steps in [(8, 4), (2, 2)]:
            ours.schedule = before.with_distillation_grid(grid)
            assert len(ours.times()) == steps
    finally:
        ours.schedule = before


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


# ---- Folders


def same_tree(left: Any, right: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_is_saved(pairs: Pairs, family: str, tmp_path: Path) -> None:
    pair = pairs(family)
    pair.ours.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FAMILIES[family][0]
    for name in pair.ours.modules:
        theirs = getattr(pair.theirs, name).state_dict()
        assert theirs.keys() == (state := getattr(loaded, name).state_dict()).keys()
        assert all(torch.equal(state[key], theirs[key]) for key in theirs)
    if family in ("text-to-image", "sdxl"):
        loaded.set_progress_bar_config(disable=True)
        wanted = run_theirs(family, loaded, latents(), num_inference_steps=2, guidance_scale=3.0)
        assert_same_picture(run_ours(pair.ours), wanted)


# diffusers has no InstructPix2Pix with a ControlNet, and loads the rest.
@pytest.mark.parametrize(
    ("family", "loaded_class"),
    [
        ("instruct-pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline),
        ("inpainting", diffusers.StableDiffusionControlNetInpaintPipeline),
    ],
)
def test_a_controlnet_goes_with_every_task(pairs: Pairs, family: str, loaded_class: type, tmp_path: Path) -> None:
    ours = DiffusionPipeline.from_pretrained(pairs(family).folder, pairs("controlnet").folder)
    ours.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is loaded_class
    assert same_tree(DiffusionPipeline.from_pretrained(tmp_path).params, ours.params)


def test_a_controlnet_alone_or_in_a_run_folder(pairs: Pairs, tmp_path: Path) -> None:
    model, whole = pairs("text-to-image").folder, pairs("controlnet")
    whole.theirs.controlnet.save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "run" / "controlnet")
    for source in ("alone", "run"):
        ours = DiffusionPipeline.from_pretrained(model, tmp_path / source)
        assert same_tree(ours.params, whole.ours.params)
    ours.save_pretrained(tmp_path / "saved")
    assert same_tree(DiffusionPipeline.from_pretrained(tmp_path / "saved").params, whole.ours.params)


def test_saving_again_and_over_itself(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("controlnet")
    pair.ours.save_pretrained(tmp_path)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pair.ours.save_pretrained(tmp_path)
    DiffusionPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_a_folder_that_cannot_be_written(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"Could not save .*file"):
        pairs("text-to-image").ours.save_pretrained(tmp_path / "file" / "model")


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
    ours = DiffusionPipeline.from_pretrained(pair.folder, lora=tmp_path / "lora", lora_scale=0.5)
    assert_same_picture(run_ours(ours), wanted)
    assert np.abs(wanted.astype(int) - run_ours(pair.ours)).mean() > 3, "the LoRA changes nothing"
    # Several are merged one after the other, and what was merged is what is saved.
    twice = DiffusionPipeline.from_pretrained(pair.folder, lora=[tmp_path / "lora"] * 2, lora_scale=0.25)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice.params, ours.params)
    ours.save_pretrained(tmp_path / "merged")
    assert same_tree(DiffusionPipeline.from_pretrained(tmp_path / "merged").params, ours.params)
    with pytest.raises(WeightsError, match=r"LoRA for another model|does not fit the model"):
        DiffusionPipeline.from_pretrained(pairs("sdxl").folder, lora=tmp_path / "lora")


# ---- Precision


def test_bfloat16_stays_near_float32(pairs: Pairs) -> None:
    pair = pairs("text-to-image")
    half = DiffusionPipeline.from_pretrained(pair.folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    difference = np.abs(run_ours(half).astype(int) - run_ours(pair.ours)).mean()
    assert 0 < difference < 4, f"mean difference {difference} of 255"


def test_a_variant_is_that_of_the_parts_that_have_it(pairs: Pairs, tmp_path: Path) -> None:
    """A ControlNet's own folder included; parts without it have their plain files read."""
    pair = pairs("controlnet")
    shutil.copytree(pair.folder, tmp_path / "model")
    shutil.move(tmp_path / "model" / "controlnet", tmp_path / "controlnet")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    del index["controlnet"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    kinds = {"model/unet": diffusers.UNet2DConditionModel, "controlnet": diffusers.ControlNetModel}
    for name, kind in kinds.items():
        half = kind.from_pretrained(tmp_path / name, torch_dtype=torch.float16)
        for plain in (tmp_path / name).glob("*.safetensors"):
            plain.unlink()
        half.save_pretrained(tmp_path / name, variant="fp16")
    with pytest.warns(UserWarning, match=r"model/vae has no weights of variant 'fp16'"):
        ours = DiffusionPipeline.from_pretrained(tmp_path / "model", tmp_path / "controlnet", variant="fp16")
    assert ours.sources["controlnet"]["variant"] == "fp16"
    for name, params in ours.params.items():
        halved = name in ("unet", "controlnet")
        wanted = jax.tree.map(lambda x: x.astype(np.float16).astype(x.dtype) if halved else x, pair.ours.params[name])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, params, wanted)


def test_float16_on_a_cpu_stays_near_float32(pairs: Pairs) -> None:
    pair = pairs("sdxl")
    half = DiffusionPipeline.from_pretrained(pair.folder, dtype=jnp.float16)
    made, wanted = run_ours(half), run_ours(pair.ours)
    assert np.abs(made.astype(int) - wanted).max() <= 8


def test_float16_leaves_a_vae_that_would_overflow_in_float32(pairs: Pairs, tmp_path: Path) -> None:
    shutil.copytree(pairs("text-to-image").folder, tmp_path, dirs_exist_ok=True)
    wanted = {"force_upcast": jnp.float32, "no force_upcast": jnp.float16}
    for case, dtype in wanted.items():
        edit_json(tmp_path / "vae" / "config.json", force_upcast=case == "force_upcast")
        half = DiffusionPipeline.from_pretrained(tmp_path, dtype=jnp.float16)
        assert half.modules["vae"].dtype == dtype
        for name, params in half.params.items():
            stored = {leaf.dtype for leaf in jax.tree.leaves(params)}
            assert stored == {jnp.dtype(dtype if name == "vae" else jnp.float16)}


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; ``None`` removes one."""
    contents = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in contents.items() if value is not None}))


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
    ours = dataclasses.replace(pairs("text-to-image").ours)
    ours.schedule = ours.schedule.with_distillation_grid(50)
    seen = [run_ours(ours, sampler=sampler, steps=steps) for steps in (1, 2, 4, 8)]
    assert len(ours._compiled) == 1
    assert len({images.tobytes() for images in seen}) == 4


def test_steps_beyond_the_room_are_compiled_by_themselves() -> None:
    for steps, room in ((1, 8), (8, 8), (9, 64), (64, 64), (65, 65)):
        noise = np.ones((steps - 1, 1, 2, 2, 4), np.float32)
        padded = _padded({"timesteps": np.arange(steps)[::-1].astype(np.int32), "noise": jnp.asarray(noise)})
        assert padded["timesteps"].shape == (room,)
        assert padded["noise"].shape[0] == room - 1
        assert padded["num_steps"] == steps


def test_steps_are_reported_and_the_pipeline_is_let_go(pairs: Pairs) -> None:
    ours = DiffusionPipeline.from_pretrained(pairs("text-to-image").folder)
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
    before = ours.params["unet"]
    ours.params["unet"] = {**before, "conv_out": jax.tree.map(lambda x: x.at[0].set(jnp.nan), before["conv_out"])}
    try:
        with pytest.raises(FloatingPointError, match="image 0 has NaN"):
            run_ours(ours)
    finally:
        ours.params["unet"] = before


# ---- Bad input: a sentence, before anything is compiled

TINY = np.zeros((SIZE, SIZE, 3), np.uint8)
BAD_CALLS = {
    "no-prompt": ("text-to-image", {"prompt": []}, "there is no prompt"),
    "height": ("text-to-image", {"height": 30}, "height = 30, width = 32: .* multiples of 4 pixels"),
    "width-0": ("text-to-image", {"width": 0}, "height = 32, width = 0: .* multiples of 4"),
    "steps-0": ("text-to-image", {"steps": 0}, "steps = 0: choose 1 to 1000"),
    "steps-1001": ("text-to-image", {"steps": 1001}, "steps = 1001: choose 1 to 1000"),
    "steps-lcm": ("lcm", {"steps": 51}, r"steps = 51: choose 1 to 50 \(original_inference_steps"),
    "codi": ("text-to-image", {"sampler": "codi"}, "The codi sampler needs the grid that the student was distilled on"),
    "ascending": ("lcm", {"timesteps": [1, 399], "steps": None}, r"timesteps = \[1, 399\]: they must descend"),
    "beyond-T": ("lcm", {"timesteps": [1000], "steps": None}, "lie in 0 to 999"),
    "no-times": ("lcm", {"timesteps": [], "steps": None}, "they must descend"),
    "uneven": ("text-to-image", {"timesteps": [999, 9]}, "the sampler ddim takes even steps only"),
    "two-counts": ("lcm", {"timesteps": [399], "steps": 2}, "steps = 2, but timesteps has 1 times: leave out one"),
    "image": ("text-to-image", {"image": TINY}, "this model has 4 input channels and takes no image: use an Instruct"),
    "image-missing": ("instruct-pix2pix", {}, "this model is for the task 'edit': give it an image"),
    "image-count": ("instruct-pix2pix", {"image": [TINY] * 3}, "image has 3 images for 2 prompts"),
    "image-shape": ("instruct-pix2pix", {"image": TINY[..., :1]}, r"must be \[height, width, 3\]"),
    "mask-missing": ("inpainting", {"image": TINY}, "an inpainting model needs mask_image"),
    "mask": ("instruct-pix2pix", {"image": TINY, "mask_image": TINY}, "mask_image is for inpainting models"),
    "control": ("text-to-image", {"control_image": TINY}, "control_image needs a ControlNet: load one"),
    "control-missing": ("controlnet", {}, "the pipeline has a ControlNet: give it a control_image"),
    "control-count": ("controlnet", {"control_image": [TINY] * 3}, "control_image has 3 images for 2 prompts"),
    "latents": ("text-to-image", {"latents": latents()[:1]}, r"latents have shape \[1, 8, 8, 4\], but \[2, 8, 8, 4\]"),
    "latents-nchw": ("lcm", {"latents": latents().transpose(0, 3, 1, 2)}, r"latents have shape \[2, 4, 8, 8\]"),
    "noise": ("lcm", {"noise": latents()[None].repeat(3, 0)}, r"noise has shape \[3, 2, 8, .*, but \[1, 2, 8, 8, 4\]"),
}  # fmt: skip


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("this should have been refused before it is compiled")

    monkeypatch.setattr(DiffusionPipeline, "_run", fail)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("family", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(pairs: Pairs, family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run_ours(pairs(family).ours, **options)
    assert "\n" not in str(caught.value)


def save_unet_with_five_channels(folder: Path) -> None:
    make_torch("unet", {**SD_UNET, "in_channels": 5}).save_pretrained(folder / "unet")


def write_nan(folder: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.conv_in.bias.data[3] = float("nan")
    pipeline.unet.save_pretrained(folder / "unet")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "There is no folder .*model"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), r"There is no model_index\.json in .*model: it holds"),
    "broken-index": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not valid JSON"),
    "no-unet": (lambda f: shutil.rmtree(f / "unet"), r"There is no config\.json in .*model/unet: .*model holds "),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), r"There is no config\.json in .*model/vae"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"There is no vocab\.json with merges\.txt"),
    "no-scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"There is no scheduler_config\.json"),
    "no-weights": (
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "model/unet has no weights",
    ),
    "flux": (
        lambda f: (f / "model_index.json").write_text(
            '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
        ),
        "describes a FluxPipeline without unet and vae and text_encoder and tokenizer: it is no Stable Diffusion .*; "
        "supported are text-to-image, InstructPix2Pix, inpainting and ControlNet pipelines of Stable Diffusion",
    ),
    "kolors": (
        lambda f: edit_json(
            f / "model_index.json", _class_name="KolorsPipeline", text_encoder=["kolors", "ChatGLMModel"]
        ),
        "describes a KolorsPipeline whose text_encoder is ChatGLMModel, not CLIPTextModel or .*; supported are",
    ),
    "refiner": (
        lambda f: edit_json(f / "model_index.json", text_encoder=[None, None], tokenizer=[None, None]),
        "without text_encoder and tokenizer",
    ),
    "scheduler": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        r"scheduler_config\.json.*FlowMatchEulerDiscreteScheduler",
    ),
    "five-channels": (save_unet_with_five_channels, "in_channels = 5; with this VAE codi_jax can sample models with 4"),
    "nan": (write_nan, "conv_in.bias holds NaN or infinity"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(pairs: Pairs, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    shutil.copytree(pairs("text-to-image").folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("nothing_runs")
def test_a_scheduler_without_a_sampler_needs_one(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    before = ours.schedule
    ours.schedule = before.with_config(_class_name="HeunDiscreteScheduler")
    try:
        with pytest.raises(ValueError, match="There is no sampler for HeunDiscreteScheduler: choose one of ddim"):
            run_ours(ours)
    finally:
        ours.schedule = before


def test_bad_controlnets(pairs: Pairs, tmp_path: Path) -> None:
    model = pairs("text-to-image").folder
    with pytest.raises(WeightsError, match="unet is a UNet2DCondition, not a ControlNet"):
        DiffusionPipeline.from_pretrained(model, model / "unet")
    with pytest.raises(WeightsError, match=r"There is no config\.json in .*model/controlnet: .*model holds"):
        DiffusionPipeline.from_pretrained(model, model)
    with pytest.raises(WeightsError, match=r"There is no folder .*nowhere"):
        DiffusionPipeline.from_pretrained(model, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"the ControlNet has block_out_channels = .* made for this model's family"):
        DiffusionPipeline.from_pretrained(model, pairs("sdxl-controlnet").folder)
