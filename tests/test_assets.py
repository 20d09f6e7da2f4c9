"""The models in assets/: whole, small, good enough for what stands on them, and the same in diffusers."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from codi_jax.data.avatars.captions import caption
from codi_jax.data.avatars.looks import draw, random_look
from codi_jax.evaluation.attributes import Reader, shown_shares
from codi_jax.evaluation.metrics import edge_f1, psnr
from codi_jax.io.images import canny
from codi_jax.io.weights import load_model
from codi_jax.methods.autoencoder import reconstruct
from codi_jax.pipeline.model import Model

ASSETS = Path(__file__).resolve().parent.parent / "assets"
AVATARS = ASSETS / "avatars"
MODEL, CONTROLNET, EDITOR = ASSETS / "emoji", ASSETS / "emoji-controlnet", ASSETS / "emoji-edit"
RECIPE = ASSETS / "recipes" / "emoji"
NETWORKS = ("unet", "vae", "text_encoder")
SIZE = 64
COLORS = {"red": 0, "green": 1, "blue": 2}


def shapes() -> np.ndarray:
    """Four drawings that are no emoji: a disc, a square, a triangle, a ring."""
    drawn = []
    for i in range(4):
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        pen = ImageDraw.Draw(picture)
        match i:
            case 0:
                pen.ellipse((10, 10, 53, 53), fill="#d03030")
            case 1:
                pen.rectangle((14, 14, 49, 49), fill="#3060c0")
            case 2:
                pen.polygon(((32, 8), (56, 54), (8, 54)), fill="#e0a020")
            case _:
                pen.ellipse((8, 8, 55, 55), outline="#208040", width=8)
        drawn.append(np.asarray(picture))
    return np.stack(drawn)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def with_controlnet() -> Model:
    return Model.from_pretrained(MODEL, CONTROLNET)


@pytest.fixture(scope="module")
def editor() -> Model:
    return Model.from_pretrained(EDITOR)


def test_the_reader_reads_attributes() -> None:
    """Of renders that it was not trained on, and of blurred ones; of none where there is only noise."""
    looks = [random_look(np.random.default_rng(2 * 10**6 + number)) for number in range(200)]
    pictures = np.stack([draw(look, SIZE) for look in looks])
    reader = Reader()
    assert shown_shares(reader.read(pictures), looks).mean() > 0.995
    blurred = np.stack([np.asarray(Image.fromarray(each).resize((40, 40)).resize((SIZE, SIZE))) for each in pictures])
    assert shown_shares(reader.read(blurred), looks).mean() > 0.98
    others = [*looks[1:], looks[0]]
    assert shown_shares(reader.read(pictures), others).mean() < 0.4


def test_attributes_survive_the_avatars_autoencoder() -> None:
    looks = [random_look(np.random.default_rng(3 * 10**6 + number)) for number in range(100)]
    pictures = np.stack([draw(look, SIZE) for look in looks])
    vae, params = load_model(ASSETS / "avatars" / "vae")
    decoded, latents = jax.jit(lambda pixels: reconstruct(vae, params, pixels))(pictures)
    assert shown_shares(Reader().read(np.asarray(decoded)), looks).mean() > 0.98
    assert psnr(np.asarray(decoded), pictures).mean() > 32
    assert float(jnp.std(latents)) * vae.config.scaling_factor == pytest.approx(1, abs=0.05)


def test_the_avatars_are_as_the_captions_say() -> None:
    """Of combinations that training never showed, in 20 steps."""
    rngs = [np.random.default_rng(4 * 10**6 + number) for number in range(64)]
    looks = [random_look(rng, "validation") for rng in rngs]
    model = Model.from_pretrained(AVATARS)
    prompts = [caption(look, rng) for look, rng in zip(looks, rngs, strict=True)]
    pictures = model(prompts, steps=20, guidance_scale=3.0)
    assert shown_shares(Reader().read(pictures), looks).mean() > 0.85
    others = [*looks[1:], looks[0]]
    assert shown_shares(Reader().read(pictures), others).mean() < 0.4


def assert_diffusers_draws_the_same(folder: Path, model: Model, prompts: list[str], channels: int) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((2, SIZE // 8, SIZE // 8, channels), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    wanted = theirs(prompts, num_inference_steps=8, guidance_scale=3.0, latents=latents, output_type="np").images
    ours = model(prompts, steps=8, guidance_scale=3.0, latents=noise)
    assert np.abs(ours.astype(float) - 255 * wanted).max() <= 2.5


def test_the_avatars_follow_edges() -> None:
    """And what edges do not say, the text does: colors."""
    rngs = [np.random.default_rng(5 * 10**6 + number) for number in range(32)]
    looks = [random_look(rng, "validation") for rng in rngs]
    pictures = np.stack([draw(look, SIZE) for look in looks])
    edges = np.stack([canny(picture) for picture in pictures]) > 0
    control = np.repeat(255 * edges[..., None].astype(np.uint8), 3, axis=-1)
    prompts = [caption(look, rng) for look, rng in zip(looks, rngs, strict=True)]
    model = Model.from_pretrained(AVATARS, ASSETS / "avatars-controlnet")
    made = model(prompts, control_image=control, steps=4, guidance_scale=1.0)
    followed = edge_f1(np.stack([canny(picture) for picture in made]) > 0, edges).mean()
    assert followed > 0.9
    assert shown_shares(Reader().read(made), looks).mean() > 0.9
    assert psnr(made, pictures).mean() > 26


def test_diffusers_draws_the_same_avatars() -> None:
    prompts = ["a blue monster with three eyes", "a yellow planet with a ring"]
    assert_diffusers_draws_the_same(AVATARS, Model.from_pretrained(AVATARS), prompts, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recipe_makes_the_avatars_networks(name: str) -> None:
    recipe, here = (
        json.loads((folder / name / "config.json").read_text()) for folder in (ASSETS / "recipes" / "avatars", AVATARS)
    )
    assert {key: here[key] for key in recipe if key != "scaling_factor"} == {
        key: value for key, value in recipe.items() if key != "scaling_factor"
    }


def test_they_are_small() -> None:
    # The editor shares all but its UNet with the model that it comes from: links, which git keeps.
    files = [path for path in ASSETS.rglob("*") if path.is_file() and path.resolve() == path]
    assert sum(path.stat().st_size for path in files) < 70e6
    assert max(path.stat().st_size for path in files) < 13e6


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recipe_makes_the_networks_that_are_here(name: str) -> None:
    recipe, here = (json.loads((folder / name / "config.json").read_text()) for folder in (RECIPE, MODEL))
    assert {key: here[key] for key in recipe} == recipe


def test_the_recipe_has_the_vocabulary_that_is_here() -> None:
    for file in ("vocab.json", "merges.txt"):
        assert (MODEL / "tokenizer" / file).read_text() == (RECIPE / "tokenizer" / file).read_text()


def test_diffusers_makes_the_same_pictures(model: Model) -> None:
    assert_diffusers_draws_the_same(MODEL, model, ["a red apple", "the flag of France"], 8)


def test_the_autoencoder_keeps_what_is_drawn(model: Model) -> None:
    pictures = shapes()
    vae, params = model.networks.vae, {"params": model.params["vae"]}
    latents = vae.apply(params, jnp.asarray(pictures, jnp.float32) / 127.5 - 1, method="encode").mode()
    decoded = np.asarray(vae.apply(params, latents, method="decode"))
    again = np.clip(127.5 * decoded + 127.5, 0, 255).round().astype(np.uint8)
    assert psnr(again, pictures).min() > 20


@pytest.mark.parametrize("color", COLORS)
def test_the_text_decides_the_color(model: Model, color: str) -> None:
    pictures = model([f"{color} heart"] * 4, steps=10, guidance_scale=3.0).astype(float)
    inner = pictures[:, 24:40, 24:40].mean(axis=(0, 1, 2))
    others = np.delete(inner, COLORS[color])
    assert inner[COLORS[color]] > others.max() + 30


def test_the_controlnet_follows_edges_it_has_never_seen(model: Model, with_controlnet: Model) -> None:
    edges = np.stack([canny(picture) for picture in shapes()]) > 0
    control = np.repeat(255 * edges[..., None].astype(np.uint8), 3, axis=-1)
    prompts = ["red circle", "blue square", "yellow triangle", "green ring"]

    def agreement(pictures: np.ndarray) -> float:
        return float(edge_f1(np.stack([canny(picture) for picture in pictures]) > 0, edges).mean())

    followed = agreement(with_controlnet(prompts, control_image=control, steps=10, guidance_scale=1.0))
    by_chance = agreement(model(prompts, steps=10, guidance_scale=1.0))
    assert followed > 0.6
    assert followed > 2 * by_chance


def test_diffusers_makes_the_same_edits(editor: Model) -> None:
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(EDITOR, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, SIZE // 8, SIZE // 8, 8), np.float32)
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    wanted = theirs(
        "make it blue",
        image=Image.fromarray(shapes()[0]),
        num_inference_steps=4,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        **scales,
    ).images
    ours = editor(["make it blue"], image=shapes()[:1], steps=4, latents=noise, **scales)
    assert np.abs(ours.astype(float) - 255 * wanted).max() <= 2.5


def test_the_instruction_decides_the_skin_tone_and_the_image_the_rest(editor: Model) -> None:
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 51, 51), fill="#ffdc5d")
    tones = ["light", "medium", "dark"]
    prompts = [f"make the skin tone {tone}" for tone in tones]
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    edited = editor(prompts, image=np.stack([np.asarray(picture)] * 3), steps=20, **scales).astype(float)
    light, medium, dark = edited[:, 24:40, 24:40].mean(axis=(1, 2, 3))
    assert light > medium + 10 > dark + 20
    corners = edited[:, [2, 2, 61, 61], [2, 61, 2, 61]]
    assert corners.min() > 230
