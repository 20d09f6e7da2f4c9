"""Measures what loading a model takes: seconds, and the peak of memory above that of a process that only imports.

    python3 benchmarks/loading.py --work /tmp/loading                     # SD 1.5: folders, single files, .ckpt
    python3 benchmarks/loading.py --work /tmp/loading --family sdxl-base  # 14 GB of files

A model of the published architecture with random weights is written once in every format. Each is loaded in a process
of its own, after its files have been read once, so that disks do not count. The .ckpt needs PyTorch.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from codi_jax import Model
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.published import TEXT_ENCODERS, UNETS, VAE
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.networks import Networks
from codi_jax.training.monitor import peak_memory

_HERE = Path(__file__).resolve().parent.parent
_ENCODERS = {
    "sd-1.5": ("clip-vit-l (sd-1.x, sdxl)",),
    "sdxl-base": ("clip-vit-l (sd-1.x, sdxl)", "openclip-vit-g (sdxl)"),
}


@dataclass(frozen=True)
class Args:
    """Measures loading."""

    work: Path
    """Folder for the models; they are kept for the next time."""
    family: Literal["sd-1.5", "sdxl-base"] = "sd-1.5"
    """The published architecture."""
    runs: int = 3
    """How often each is loaded."""
    load: str | None = None
    """Load this, and print what it took; used by the benchmark itself."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision to load in, with --load."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    if args.load is not None:
        print(json.dumps(load(args.load, args.work / args.family / "folder-float16", args.dtype)))
        return
    folder = args.work / args.family
    write(folder, args.family)
    print("| read from | as | weights, GB | peak / weights | seconds |\n| --- | --- | ---: | ---: | ---: |")
    for source in sorted(path for path in folder.iterdir() if "unfinished" not in path.name):
        for dtype in ("float32", "bfloat16"):
            _read(source)
            words = ["--work", str(args.work), "--family", args.family, "--load", str(source), "--dtype", dtype]
            made = [json.loads(_run(words)) for _ in range(args.runs)]
            seconds, peak = (statistics.median(each[key] for each in made) for key in ("seconds", "peak"))
            size = made[0]["size"]
            print(f"| {source.name} | {dtype} | {size / 1e9:.2f} | {peak / size:.2f} | {seconds:.1f} |", flush=True)


def _run(words: list[str]) -> str:
    command = [sys.executable, __file__, *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def _read(source: Path) -> None:
    """Reads the files once, so that they are in memory."""
    for path in source.rglob("*") if source.is_dir() else [source]:
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**26):
                    pass


def load(source: str, config: Path, dtype: str) -> dict[str, float]:
    """Loads a model; its seconds, its bytes, and the bytes of memory that this took at most."""
    before = peak_memory()
    began = time.perf_counter()
    given: dict[str, Any] = {} if Path(source).is_dir() else {"config": config}
    model = Model.from_pretrained(source, dtype=dtype, **given)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"seconds": seconds, "size": size, "peak": peak_memory() - before}


def write(folder: Path, family: str) -> None:
    """The model in every format."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    model = random_model(family)
    for dtype in ("float32", "float16"):
        model.save_pretrained(unfinished / f"folder-{dtype}", dtype=dtype)
        model.save_single_file(unfinished / f"file-{dtype}.safetensors", dtype=dtype)
    for path in unfinished.glob("file-float16.safetensors"):
        _write_pickle(path)
    unfinished.rename(folder)


def _write_pickle(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(path), "global_step": 1}, path.with_suffix(".ckpt"))


def random_model(family: str) -> Model:
    """A model of a published architecture, with the avatars' words and noise, and random weights."""
    encoders = [CLIPTextModel(CLIPTextConfig.from_dict(TEXT_ENCODERS[name])) for name in _ENCODERS[family]]
    named = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
    unet = UNet2DCondition(UNetConfig.from_dict(UNETS[family]))
    networks = Networks(unet, AutoencoderKL(VAEConfig.from_dict(VAE)), **named)
    model = Model.open(_HERE / "assets/avatars")
    words = {name.replace("text_encoder", "tokenizer"): model.tokenizers["tokenizer"] for name in named}
    files = dict.fromkeys(words, model.tokenizer_files["tokenizer"])
    params = {name: _random(network.abstract_params()) for name, network in networks.by_name().items()}
    return model.replace(networks=networks, params=params, tokenizers=words, tokenizer_files=files)


def _random(shapes: Any) -> Any:
    """Arrays of these shapes, quickly: all are cut from one sequence."""
    noise = np.random.default_rng(0).normal(scale=0.02, size=2**20).astype(np.float32)
    return jax.tree.map(lambda leaf: np.resize(noise, leaf.shape), shapes)


if __name__ == "__main__":
    main()
