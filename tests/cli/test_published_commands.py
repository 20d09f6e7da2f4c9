"""The commands of docs/published.md, with small models under the names of the published ones on a hub of our own."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
from folders import SIZE, XL_UNET, make_pipeline
from oracle import make_torch
from PIL import Image
from published import TINY_UNETS
from safetensors.torch import save_file
from served_hub import serve_hub

from codi_jax import generate
from codi_jax.cli import command_line
from codi_jax.io.lora_files import save_lora
from codi_jax.io.state_dict import to_state_dict
from codi_jax.models.lora import init_lora
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.pipeline.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

KERNEL = ".attn1.to_q.weight"
PAGE = Path(__file__).resolve().parents[2] / "docs/published.md"
ROWS = re.findall(r"^\|.*\| `(--model .*)` \|$", PAGE.read_text(), re.MULTILINE)

MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", diffusers.EulerDiscreteScheduler, {}),
    "stabilityai/sdxl-turbo": ("sdxl", diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "segmind/SSD-1B": ("sdxl", diffusers.EulerDiscreteScheduler, {}),
    "segmind/Segmind-Vega": ("sdxl", diffusers.EulerDiscreteScheduler, {}),
    "segmind/small-sd": ("text-to-image", diffusers.DPMSolverMultistepScheduler, {}),
    "SimianLuo/LCM_Dreamshaper_v7": ("lcm", diffusers.LCMScheduler, {}),
}
LORAS = [
    "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",
    "latent-consistency/lcm-lora-ssd-1b/pytorch_lora_weights.safetensors",
    "segmind/Segmind-VegaRT/pytorch_lora_weights.safetensors",
    "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors",
    "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors",
    "ByteDance/Hyper-SD/Hyper-SDXL-1step-lora.safetensors",
    "wangfuyun/PCM_Weights/sdxl/pcm_sdxl_smallcfg_4step_converted.safetensors",
]
UNETS = [
    "ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors",
    "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors",
    "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin",
    "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin",
]
REPOSITORIES = {"latent-consistency/lcm-sdxl": {**XL_UNET, "time_cond_proj_dim": 32}}  # of UNets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub that has all that the page names."""
    for served in serve_hub(tmp_path, monkeypatch):
        fill(served, tmp_path)
        yield served


def fill(hub: SimpleNamespace, scratch: Path) -> None:
    def place(name: str) -> Path:
        owner, repository, *path = name.split("/")
        path = hub.root.joinpath(owner, repository, "main", *path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    for name, (family, scheduler, changes) in MODELS.items():
        pipeline = make_pipeline(family, scratch)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes)
        variant = "fp16" if re.search(f"{name} --variant fp16", PAGE.read_text()) else None
        if name == "segmind/small-sd":
            pipeline.unet = make_torch("unet", TINY_UNETS["bk-tiny"], 10)  # no block in the middle
        pipeline.save_pretrained(place(name), variant=variant)
    params = UNet2DCondition(UNetConfig.from_dict(XL_UNET)).abstract_params()
    for seed, name in enumerate(LORAS):
        lora = init_lora(jax.random.key(seed), params, rank=2, target_modules=["to_q", "to_v"])
        filled = jax.tree.map(lambda leaf: leaf + 0.1, lora)  # the second factor starts as zeros
        save_lora(scratch / "lora.safetensors", {"unet": filled})
        shutil.copy(scratch / "lora.safetensors", place(name))
    for seed, name in enumerate(UNETS, start=20):
        tensors = make_torch("unet", XL_UNET, seed).half().state_dict()
        torch.save(tensors, place(name)) if name.endswith(".bin") else save_file(tensors, place(name))
    for seed, (name, config) in enumerate(REPOSITORIES.items(), start=30):
        make_torch("unet", config, seed).save_pretrained(place(name), variant="fp16")


def test_every_command_of_the_page(hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds what it names, has weights of its own, and draws a picture that no other does."""
    assert len(ROWS) == 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "keep_compiled_programs", lambda folder: None)
    kernels, pictures = [], []
    load = generate._load

    def keep_a_kernel(args: generate.Args) -> Model:
        model = load(args)
        tensors = dict(to_state_dict(model.params["unet"]))
        kernels.append(next(np.asarray(tensors[name], np.float32) for name in tensors if name.endswith(KERNEL)))
        return model

    monkeypatch.setattr(generate, "_load", keep_a_kernel)
    for number, row in enumerate(ROWS):
        words = [*shlex.split(row), "--prompt", "a fox", "--output", f"{number}.png"]
        for side in ("--height", "--width"):
            words = [*words, side, str(SIZE)] if side not in words else words
            words[words.index(side) + 1] = str(SIZE)
        generate.run(command_line.parse(generate.Args, words))
        pictures.append(np.asarray(Image.open(f"{number}.png")).astype(int))
    for number, picture in enumerate(pictures):
        assert picture.shape == (SIZE, SIZE, 3)
        assert picture.std() > 10
        for other in range(number):
            # The first row has the weights that all models start from.
            same = kernels[number].shape == kernels[other].shape
            assert not same or np.abs(kernels[number] - kernels[other]).mean() > 1e-3, (ROWS[number], ROWS[other])
            assert np.abs(picture - pictures[other]).mean() > 1, (ROWS[number], ROWS[other])
