"""Plans every method for Stable Diffusion 1.5 and XL on devices that are not there, as one table.

    pip install "jax[tpu]" "jax[cuda12]"       # for their compilers
    python3 benchmarks/plans.py --work runs/plans --families sd-1.5 --targets v5e:2x2 v6e:4x4

Each cell is a real command with ``--plan``: one sample per device of cached latents in bfloat16, parameters split
among all devices, 512 px for SD 1.5 and 1024 px for SDXL, whose activations are recomputed and whose equal blocks are
a loop. Models are folders of configurations without weights. A plan takes minutes on 2 cores; finished ones stay in
--work, and the tables are of all of them. The second one has what a step sends over the network, for plans that differ
only in the size of a slice: weak scaling.

    python3 benchmarks/plans.py --work runs/scaling --methods CoDi --families sd-1.5 --fsdp 1 \
        --targets v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from codi_jax.io.atomic import write_json
from codi_jax.models.published import TEXT_ENCODERS, UNETS, VAE
from codi_jax.planning.report import DOES_NOT_FIT

_HERE = Path(__file__).resolve().parent.parent
_COMMON = (
    "--train_data_dir . --mixed_precision bf16 --train_batch_size 1 --max_train_steps 10000 --output_dir . "
    "--fsdp {fsdp} --resolution {side} {large}"
)
Method = Literal["CoDi", "LCM", "LCM, editor", "BK-SDM", "DisBack"]
Family = Literal["sd-1.5", "sdxl"]
# By method: the script, its flags, and what is appended to the family's name for its teacher.
METHODS: dict[Method, tuple[str, str, str]] = {
    "CoDi": ("train_codi_flax", "--pretrained_model_name_or_path {model} --cache_latents --task canny", ""),
    "LCM": ("train_lcm_flax", "--pretrained_teacher_model {model} --cache_latents", ""),
    "LCM, editor": (
        "train_lcm_distil_instruct_pix2pix_sdxl",
        "--pretrained_teacher_model {model} --cache_latents",
        "-edit",
    ),
    "BK-SDM": (
        "train_bk_sdm_flax",
        "--pretrained_model_name_or_path {model} --cache_latents --distill_level {level}",
        "",
    ),
    "DisBack": ("train_disback_flax", "--pretrained_model_name_or_path {model}", ""),
}
FAMILIES: dict[Family, dict[str, str]] = {
    "sd-1.5": {"side": "512", "level": "bk_small", "large": ""},
    "sdxl": {"side": "1024", "level": "ssd_1b", "large": "--gradient_checkpointing --scan_layers"},
}
TARGETS = ("v5e:2x2", "v5e:4x4", "v5p:2x2x2", "v6e:4x4", "h100", "h200")


@dataclass(frozen=True)
class Args:
    """Plans methods, families and targets."""

    work: Path
    """Folder for configurations and plans."""
    methods: tuple[Method, ...] = tuple(METHODS)
    """The methods to plan."""
    families: tuple[Family, ...] = tuple(FAMILIES)
    """The families of teachers."""
    targets: tuple[str, ...] = TARGETS
    """The devices."""
    fsdp: int | None = None
    """Number of devices to split parameters over. Default: all."""
    minutes: float = 30
    """The time after which a plan is given up."""


def main() -> None:
    args = tyro.cli(Args, use_underscores=True)
    for family in args.families:
        for target in args.targets:
            for method in args.methods:
                plan(args, method, family, target)
    cells = [json.loads(path.read_text()) for path in sorted(args.work.glob("*.json"))]
    print(table(cells))
    print(f"\n{scaling(cells)}")


def plan(args: Args, method: Method, family: Family, target: str) -> None:
    """Plans one cell, unless that has been done."""
    fsdp = args.fsdp or _devices(target)
    name = "-".join(f"{family} {target} {method} fsdp {fsdp}".replace(",", "").replace(":", "-").split())
    done, made = args.work / f"{name}.json", args.work / f"{name}.plan"
    if done.is_file():
        return
    script, flags, kind = METHODS[method]
    model = configurations(args.work / "models", family + kind)
    words = f"{flags} {_COMMON}".format(**FAMILIES[family], fsdp=fsdp, model=model).split()
    command = [sys.executable, f"training_scripts/{script}.py", *words, "--plan", target, "--plan_output", str(made)]
    began = time.perf_counter()
    try:
        ran = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, timeout=60 * args.minutes, check=False)
        said = "" if ran.returncode in (0, DOES_NOT_FIT) else (ran.stderr.strip().splitlines() or ["?"])[-1]
    except subprocess.TimeoutExpired:
        said = f"no plan within {args.minutes:g} minutes"
    found = json.loads(made.read_text()) if made.is_file() else None
    cell = {"method": method, "family": family, "target": target, "fsdp": fsdp, "plan": found, "said": said}
    write_json(done, cell)
    print(f"{name}: {said or 'planned'} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _devices(target: str) -> int:
    """How many devices a target has: ``v5e:4x4`` 16, ``h100`` one."""
    count = 1
    for side in target.partition(":")[2].split("x"):
        count *= int(side or 1)
    return count


def configurations(folder: Path, name: str) -> Path:
    """A model's folder without weights, of a published architecture: ``sd-1.5``, ``sdxl``, or an editor, ``…-edit``."""
    model, family = folder / name, name.removesuffix("-edit")
    unet = {"sd-1.5": "sd-1.5", "sdxl": "sdxl-base", "sd-1.5-edit": "sd-instruct-pix2pix"}.get(
        name, "sdxl-instruct-pix2pix"
    )
    encoders = {"text_encoder": "clip-vit-l (sd-1.x, sdxl)"}
    if family == "sdxl":
        encoders["text_encoder_2"] = "openclip-vit-g (sdxl)"
    configs: dict[str, Mapping[str, Any]] = {
        "unet": {"_class_name": "UNet2DConditionModel", **UNETS[unet]},
        "vae": {"_class_name": "AutoencoderKL", **VAE},
        **{part: {"architectures": ["CLIPTextModel"], **TEXT_ENCODERS[name]} for part, name in encoders.items()},
    }
    index = json.loads((_HERE / "assets/avatars/model_index.json").read_text())
    for part, config in configs.items():
        write_json(model / part / "config.json", config)
    for part in encoders:
        words = part.replace("text_encoder", "tokenizer")
        shutil.copytree(_HERE / "assets/avatars/tokenizer", model / words, dirs_exist_ok=True)
        index |= {part: ["transformers", "CLIPTextModel"], words: ["transformers", "CLIPTokenizer"]}
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    write_json(model / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", **schedule})
    write_json(model / "model_index.json", index)
    return model


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """All plans in Markdown."""
    lines = ["| teacher | method | devices | GiB per device | of | batch per device, about | samples/s | of the peak |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for cell in cells:
        start = f"| {cell['family']} | {cell['method']} | {cell['target']}"
        if cell["plan"] is None:
            lines.append(f"{start} | {cell['said']} | | | | |")
            continue
        found = cell["plan"]
        bytes_, estimate = found["bytes_per_device"], found["estimate"]
        room = found["bytes_usable"] - (bytes_["total"] - bytes_["temporaries"])
        batch = int(room / bytes_["temporaries"] * found["batch_per_device"])
        fits = f"{batch} | {estimate['samples_per_second']:.3g} | {estimate['share_of_peak']:.0%}"
        size = f"{bytes_['total'] / 2**30:.1f} | {found['bytes_usable'] / 2**30:.1f}"
        lines.append(f"{start} | {size} | {fits if found['fits'] else 'does not fit | | '} |")
    return "\n".join(lines)


def scaling(cells: Sequence[Mapping[str, Any]]) -> str:
    """What a step sends, and its time on the smallest slice as a share of the time here, with nothing hidden."""
    head = ("teacher", "method", "devices", "FSDP", "sent per device, GB", "network, ms", "the rest, ms", "efficiency")
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    smallest: dict[tuple[str, ...], float] = {}
    for cell in sorted(
        cells, key=lambda cell: (cell["family"], cell["method"], cell["target"][:3], _devices(cell["target"]))
    ):
        census = (cell["plan"] or {}).get("program", {}).get("census")
        if census is None or cell["plan"]["devices"] == 1:
            continue
        causes = cell["plan"]["estimate"]["seconds_by_cause"]
        sent = sum(each["bytes"] for each in census["collectives"].values())
        network = causes.get("network", 0.0)
        other = max(seconds for cause, seconds in causes.items() if cause != "network")
        kind = (cell["family"], cell["method"], cell["target"].partition(":")[0], str(cell["fsdp"] == 1))
        first = smallest.setdefault(kind, other + network)
        lines.append(
            f"| {cell['family']} | {cell['method']} | {cell['target']} | {cell['fsdp']} | {sent / 1e9:.2f} | "
            f"{network * 1e3:.0f} | {other * 1e3:.0f} | {first / (other + network):.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
