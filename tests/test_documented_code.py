"""The commands and the Python of the documentation run as written, on small models under the names that they use.

What is appended to a command makes it small: sizes and steps. Left out is what needs other machines, or installs.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clip_folders import write_clip
from documented import README, ROOT, blocks, commands_of, module_of
from folders import SD_UNET, SIZE, XL_UNET, make_controlnet, make_pipeline
from object_store import serve_store
from oracle import make_torch
from picture_folders import numbered, write_edits, write_folder
from published import TINY_UNETS
from records import read, weights_of
from served_hub import environment_of, folder_of_model, serve_addresses, serve_data_set, serve_hub_and_web

import codi_jax
from codi_jax.io.lora_files import save_lora
from codi_jax.models.lora import init_lora
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
PAGES = (
    README,
    *(DOCS / f"{name}.md" for name in ("app", "checkpoints", "data", "evaluation", "exporting", "generating")),
    *(DOCS / f"{name}.md" for name in ("installation", "networks", "planning", "preparing-data", "training")),
    *sorted((DOCS / "methods").glob("*.md")),
)
PICTURES = 4
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL = "stabilityai/stable-diffusion-xl-base-1.0"

SMALL_RUN = {
    "resolution": SIZE, "max_train_steps": 1, "train_batch_size": 2, "gradient_accumulation_steps": 1,
    "num_validation_images": 1, "dataloader_num_workers": 0, "report_to": "none",
}  # fmt: skip
SMALL = {
    "codi_jax.generate": {"height": SIZE, "width": SIZE},
    "codi_jax.evaluate": {"max_samples": 2, "batch_size": 2},
    "codi_jax.app": {"warm_up": False},
    "training_scripts.adapt_instruct_pix2pix": {},
    "training_scripts.train_disback_flax": SMALL_RUN | {"num_nodes": 1, "degradation_interval": 1, "interval": 1},
    "dataset_tools.avatars": {"max_train_samples": PICTURES, "num_proc": 1},
    "dataset_tools.cache_latents": {"resolution": SIZE},
    "dataset_tools.coyo_1m_dataset_preprocess": {
        "max_train_samples": PICTURES, "num_proc": 1, "resolution": SIZE, "allow_private_addresses": True,
    },
    "dataset_tools.emoji": {},
    "dataset_tools.laion_subset": {
        "max_train_samples": PICTURES, "num_proc": 1, "resolution": SIZE, "allow_private_addresses": True,
    },
    "dataset_tools.make_edit_dataset": {"num_proc": 1, "resolution": SIZE},
    "dataset_tools.train_tokenizer": {"vocab_size": 520},
}  # fmt: skip
# Pairs that a model draws: the least that can be done, and no filter.
DRAWN = {
    "steps": 2, "samples_per_prompt": 1, "pairs_at_a_time": 1, "min_image_similarity": -1,
    "min_direction_similarity": -1, "min_caption_similarity": -1,
}  # fmt: skip
# What the pages' MODEL, TEACHER and DATA are for some scripts: an editor and edits, or a model with blocks to remove.
EDITING = {"MODEL": "EDITOR", "TEACHER": "EDITOR", "DATA": "EDITS"}
MEANT = {
    "training_scripts.train_lcm_distil_instruct_pix2pix_sdxl": EDITING,
    "training_scripts.train_tcd_instruct_pix2pix_flax": EDITING,
    "training_scripts.adapt_instruct_pix2pix": EDITING,
    "training_scripts.train_bk_sdm_flax": {"MODEL": "FOUR-BLOCKS", SD: "FOUR-BLOCKS"},
}
NOT_HERE = ("import os, socket, subprocess\nimport ray",)  # starts workers on other machines


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A hub with the models and data sets that the pages name, and a web with their pictures."""
    yield from serve_hub_and_web(tmp_path_factory.mktemp("hub"), fill)


def fill(hub: SimpleNamespace, scratch: Path) -> None:
    for name, family in {
        SD: "text-to-image",
        "timbrooks/instruct-pix2pix": "instruct-pix2pix",
        "stable-diffusion-v1-5/stable-diffusion-inpainting": "inpainting",
        "diffusers/sdxl-instructpix2pix-768": "sdxl-instruct-pix2pix",
        XL: "sdxl",
    }.items():
        make_pipeline(family, scratch).save_pretrained(folder_of_model(hub, name))
    make_pipeline("sdxl", scratch).save_pretrained(folder_of_model(hub, XL), variant="fp16")
    make_torch("unet", XL_UNET, 8).save_pretrained(folder_of_model(hub, "latent-consistency/lcm-sdxl"))
    make_controlnet(is_sdxl=False).save_pretrained(folder_of_model(hub, "lllyasviel/sd-controlnet-canny"))
    for name, config in {"lcm-lora-sdxl": XL_UNET, "lcm-lora-sdv1-5": SD_UNET}.items():
        (folder := folder_of_model(hub, f"latent-consistency/{name}")).mkdir(parents=True)
        write_lora(folder, config)
    write_clip(folder_of_model(hub, "openai/clip-vit-large-patch14"))
    pictures = [numbered(10 * i, (SIZE, SIZE)) for i in range(PICTURES)]
    texts = [f"picture {i}" for i in range(PICTURES)]
    befores = {"timbrooks/instructpix2pix-clip-filtered": "original_image", "your/edits": "input_image"}
    for name, before in befores.items():
        serve_data_set(hub, name, {before: pictures, "edit_prompt": texts, "edited_image": pictures})
    for name in ("kakaobrain/coyo-700m", "recastai/LAION-art-EN-improved-captions"):
        serve_addresses(hub, name, texts)


def write_lora(folder: Path, config: dict) -> None:
    params = UNet2DCondition(UNetConfig.from_dict(config)).abstract_params()
    lora = init_lora(jax.random.key(0), params, rank=2, target_modules=["to_q", "to_v"])
    save_lora(folder, {"unet": lora})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, hub: SimpleNamespace) -> Path:
    """A folder with all that the pages take for granted: models, data and results of other pages."""
    folder = tmp_path_factory.mktemp("user")
    sd = folder_of_model(hub, SD)
    for name in ("MODEL", "TEACHER", "my-model", "runs/small", "runs/small-lcm"):
        shutil.copytree(sd, folder / name)
    large = make_pipeline("text-to-image", folder / "made")
    large.register_modules(unet=make_torch("unet", TINY_UNETS["four-blocks"], 3))
    large.save_pretrained(folder / "FOUR-BLOCKS")
    shutil.copytree(folder_of_model(hub, "timbrooks/instruct-pix2pix"), folder / "EDITOR")
    shutil.copytree(folder_of_model(hub, "lllyasviel/sd-controlnet-canny"), folder / "CONTROLNET")
    make_pipeline("controlnet", folder / "made").save_pretrained(folder / "runs/codi")
    make_pipeline("lcm", folder / "made").save_pretrained(folder / "runs/lcm")
    (folder / "runs/lcm-lora").mkdir()
    write_lora(folder / "runs/lcm-lora", SD_UNET)
    (folder / "assets").symlink_to(ROOT / "assets")
    shutil.copytree(sd / "vae", folder / "vae")
    codi_jax.Model.from_pretrained(sd).save_single_file(folder / "dreamshaper.safetensors")
    for name in ("DATA", "data/mine", "data/edges", "data/coyo", "data/avatars/train"):
        write_folder(folder / name, PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    write_edits(folder / "EDITS", PICTURES, (SIZE, SIZE))
    for name in ("edges", "in", "sketch", "mask"):
        numbered(100, (SIZE, SIZE)).save(folder / f"{name}.png")
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(PICTURES)))
    write_pairs(folder)
    annotations = [{"image_id": i, "id": i, "caption": f"picture {i}"} for i in range(PICTURES)]
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    shapes = read("inception")["shapes"]
    tensors = {name: torch.from_numpy(array) for name, array in weights_of(shapes).items()}
    torch.save(tensors, folder / "pt_inception-2015-12-05-6726825d.pth")
    rng = np.random.default_rng(0)
    np.savez(folder / "coco-val2014.npz", mu=rng.standard_normal(2048), sigma=np.eye(2048))
    return folder


def write_pairs(folder: Path) -> None:
    for name in ("photos", "drawings"):
        (folder / name).mkdir()
        for i in range(PICTURES):
            numbered(10 * i, (SIZE, SIZE)).save(folder / name / f"{i}.png")
    files = {column: [f"photos/{i}.png" for i in range(PICTURES)] for column in ("before", "after")}
    pq.write_table(pa.table({**files, "season": ["winter"] * PICTURES}), folder / "pairs.parquet")
    captions = {"input": "a cat", "edit": "make it a dog", "output": "a dog"}
    (folder / "prompts.jsonl").write_text(f"{json.dumps(captions)}\n")


def small(words: list[str]) -> tuple[str, list[str]]:
    """A command's module and arguments, with what makes it small."""
    behind = words.index("--") if "--" in words else len(words)
    module, arguments = module_of(words[:behind])
    if module == "codi_jax.plan":  # compilers for other devices are not installed
        inner, flags = small(["python3", *words[behind + 1 :]])
        return module, ["cpu", "cpu:2", "--", f"{inner.replace('.', '/')}.py", *flags]
    arguments = [MEANT.get(module, {}).get(word, word) for word in arguments]
    changes = SMALL.get(module, SMALL_RUN)
    if "--teacher" in arguments:
        changes = changes | DRAWN
    if "--plan" in arguments:
        changes = changes | {"plan": "cpu"}
    for flag, value in changes.items():
        if isinstance(value, bool):
            arguments = [*arguments, f"--{flag}" if value else f"--no_{flag}"]
        else:
            arguments = [*arguments, f"--{flag}", str(value)]
    return module, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, prepared: Path, hub: SimpleNamespace, tmp_path: Path) -> None:
    code = [
        *(small(words) for text in blocks(page, "bash") for words in commands_of(text)),
        *(text for text in blocks(page, "python") if not text.startswith(NOT_HERE)),
    ]
    assert code
    folder = tmp_path / "user"
    shutil.copytree(prepared, folder, symlinks=True)
    if page.stem in ("installation", "preparing-data"):
        shutil.rmtree(folder / "data")  # they make what others take for granted
    elif page.stem == "training":  # it begins with the flags of another run
        flags = {"pretrained_teacher_model": "MODEL", "train_data_dir": "data/mine", **SMALL_RUN}
        (folder / "runs/lcm/config.yaml").write_text("".join(f"{flag}: {value}\n" for flag, value in flags.items()))
    (tmp_path / "code.json").write_text(json.dumps(code))
    runner = ROOT / "tests/documented_code.py"
    with serve_store() if page.stem == "checkpoints" else contextlib.nullcontext():
        environment = environment_of(hub, tmp_path / "huggingface") | {"HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, runner, tmp_path / "code.json"],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_no_page_is_forgotten() -> None:
    """Others have only what installs, or is for other machines."""
    with_code = {page for page in sorted(DOCS.rglob("*.md")) if [*blocks(page, "bash"), *blocks(page, "python")]}
    others = {page.stem for page in with_code - set(PAGES)}
    assert others == {"launching", "scaling", "troubleshooting"}
