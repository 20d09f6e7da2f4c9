"""The models in assets/: whole, small, good enough for what stands on them, and the same in diffusers."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from codi_jax.data.avatars.captions import Edit, caption, random_edit
from codi_jax.data.avatars.looks import draw, random_look
from codi_jax.evaluation.attributes import Reader, shown_shares, shows
from codi_jax.evaluation.metrics import edge_f1, psnr
from codi_jax.io.images import canny
from codi_jax.io.weights import load_model
from codi_jax.methods.autoencoder import reconstruct
from codi_jax.pipeline.model import Model

ASSETS = Path(__file__).resolve().parent.parent / "assets"
AVATARS = ASSETS / "avatars"
CONTROLNET, EDITOR = ASSETS / "avatars-controlnet", ASSETS / "avatars-edit"
RECIPE = ASSETS / "recipes" / "avatars"
NETWORKS = ("unet", "vae", "text_encoder")
SIZE = 64


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
    vae, params = load_model(AVATARS / "vae")
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
    model = Model.from_pretrained(AVATARS, CONTROLNET)
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
    recipe, here = (json.loads((folder / name / "config.json").read_text()) for folder in (RECIPE, AVATARS))
    assert {key: here[key] for key in recipe if key != "scaling_factor"} == {
        key: value for key, value in recipe.items() if key != "scaling_factor"
    }


def test_they_are_small() -> None:
    # The editor shares all but its UNet with the model that it comes from: links, which git keeps.
    files = [path for path in ASSETS.rglob("*") if path.is_file() and path.resolve() == path]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert max(path.stat().st_size for path in files) < 13e6


def test_the_recipe_has_the_vocabulary_that_is_here() -> None:
    for file in ("vocab.json", "merges.txt"):
        assert (AVATARS / "tokenizer" / file).read_text() == (RECIPE / "tokenizer" / file).read_text()


def edits(count: int) -> tuple[np.ndarray, list[Edit]]:
    """Pictures that training never showed, and edits of them."""
    changes = [random_edit(np.random.default_rng(6 * 10**6 + number), "validation") for number in range(count)]
    return np.stack([draw(change.before, SIZE) for change in changes]), changes


SCALES = {"guidance_scale": 3.0, "image_guidance_scale": 2.5}


def test_the_instruction_decides_what_changes_and_the_image_the_rest() -> None:
    pictures, changes = edits(48)
    made = Model.from_pretrained(EDITOR)([each.instruction for each in changes], pictures, steps=4, **SCALES)
    seen = Reader().read(made)
    shown = [shows(look, each.after) for look, each in zip(seen, changes, strict=True)]
    asked = [[name for name, value in each.after.items() if each.before.get(name) != value] for each in changes]
    assert np.mean([all(found[name] for name in names) for found, names in zip(shown, asked, strict=True)]) > 0.85
    assert np.mean([all(found.values()) for found in shown]) > 0.55
    assert shown_shares(seen, [each.after for each in changes]).mean() > 0.9
    wanted = np.stack([draw(each.after, SIZE) for each in changes])
    assert psnr(made, wanted).mean() > 26


def test_diffusers_makes_the_same_edits() -> None:
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(EDITOR, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    pictures, (change,) = edits(1)
    noise = np.random.default_rng(0).standard_normal((1, SIZE // 8, SIZE // 8, 16), np.float32)
    wanted = theirs(
        change.instruction,
        image=Image.fromarray(pictures[0]),
        num_inference_steps=4,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        **SCALES,
    ).images
    ours = Model.from_pretrained(EDITOR)([change.instruction], pictures, steps=4, latents=noise, **SCALES)
    assert np.abs(ours.astype(float) - 255 * wanted).max() <= 2.5


def test_the_editor_is_the_avatars_but_for_its_unet() -> None:
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert (EDITOR / name).is_symlink()
        assert (EDITOR / name).resolve() == AVATARS / name
