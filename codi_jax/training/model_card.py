"""The ``README.md`` of a trained model, which the Hugging Face Hub shows: what it is, its use, its making."""

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from codi_jax.cli.flags import Scope
from codi_jax.io.hub import ModelFolder
from codi_jax.models.config import WeightsError
from codi_jax.pipeline.model import Model
from codi_jax.training.flags import RunFlags

NAME = "README.md"
_TAG = "codi_jax"
_PIPELINE_TAGS = {"text-to-image": "text-to-image", "edit": "image-to-image", "inpaint": "image-to-image"}


def write_card(folder: Path, args: RunFlags, student: Model) -> None:
    """Writes the card of a finished run, unless the folder has one that somebody else wrote.

    Args:
      folder: the run's folder, with the trained model.
      args: the run's arguments.
      student: what was trained.

    Raises:
      OSError: if it cannot be written.
    """
    path = folder / NAME
    if path.exists() and _TAG not in (ModelCard.load(path).data.tags or []):
        return
    base = str(student.sources["unet"]["source"]) if "unet" in student.sources else None
    is_published = base is not None and not Path(base).expanduser().exists()
    # Where things are on the machine is nobody else's business.
    shown = base if is_published or base is None else Path(base).name
    data = ModelCardData(
        base_model=base if is_published else None,
        library_name="diffusers",
        license=_license_of(base),
        pipeline_tag=_PIPELINE_TAGS.get(student.task or ""),
        tags=[_TAG, "diffusers", "stable-diffusion", *(["controlnet"] if (folder / "controlnet").is_dir() else [])],
    )
    name = args.hub_model_id or folder.resolve().name
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _origin(args, shown),
        *_usage(folder, args, student, name, shown),
        "## Training",
        _training(folder, args),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _license_of(base: str | None) -> str | None:
    """That of the model which training began with, if its card says so."""
    if base is None:
        return None
    with contextlib.suppress(WeightsError, OSError, ValueError):
        found = ModelFolder(base, local_files_only=True).find(NAME)
        return None if found is None else ModelCard.load(found).data.license
    return None


def _origin(args: RunFlags, base: str | None) -> str:
    does = (type(args).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    from_base = f" It began as `{base}`, whose license applies." if base else ""
    version = importlib.metadata.version("codi_jax")
    return f"Made by `{Path(sys.argv[0]).name}` of codi_jax {version}, which does this: {does.lower()}.{from_base}"


def _usage(folder: Path, args: RunFlags, student: Model, name: str, base: str | None) -> list[str]:
    """How to make images with it, in diffusers and here."""
    if student.schedule is None or student.schedule.sampling.sampler is None:
        return []
    is_whole, is_lora = (folder / "model_index.json").exists(), (folder / "pytorch_lora_weights.safetensors").exists()
    steps = len(student.times())
    kinds = ("guidance_scale", "image_guidance_scale") if student.task == "edit" else ("guidance_scale",)
    scales = {key: value for key, value in args.shown.scales.items() if key in kinds}
    call = {"num_inference_steps": steps, **scales}
    flags = [f"--steps {steps}", *(f"--{key} {value:g}" for key, value in scales.items())]
    given = {"edit": ["image"], "inpaint": ["image", "mask_image"]}.get(student.task or "", [])
    if (times := student.schedule.sampling.timesteps) is not None:
        call |= {"timesteps": [*times[:steps]], "guidance_scale": 0.0}
    if student.networks.controlnet is not None:
        call["image"], flags = "control_image", [*flags, "--control_image control.png"]
    call |= {argument: argument for argument in given}
    flags += [f"--{argument} {argument}.png" for argument in given]
    if is_whole:
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{name}")',
        ]
        source = f"--model {name}"
    elif is_lora:
        scheduler = student.sampling.scheduler
        lines = [
            f"from diffusers import DiffusionPipeline, {scheduler}", "",
            f'pipeline = DiffusionPipeline.from_pretrained("{base}")',
            f'pipeline.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")',
            f'pipeline.load_lora_weights("{name}")',
        ]  # fmt: skip
        source = f"--model {base} --lora {name} --sampler {student.sampling.sampler}"
    else:
        return []
    arguments = ", ".join(f"{key}={value}" for key, value in call.items())
    code = "\n".join([*lines, f'image = pipeline("a prompt", {arguments}).images[0]'])
    command = f'python3 -m codi_jax.generate {source} --prompt "a prompt" {" ".join(flags)}'
    return ["## Use", f"In diffusers:\n\n```python\n{code}\n```", f"In codi_jax:\n\n```bash\n{command}\n```"]


def _training(folder: Path, args: RunFlags) -> str:
    """The flags that were given, and what the last step measured."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    told = {
        name: value
        for name, value in args.values_within(Scope.RESUME).items()
        if name != "output_dir" and value != json.loads(json.dumps(defaults[name], default=str))
    }
    lines = [f"- `--{name} {_shown(value)}`" for name, value in told.items()]
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and (logged := metrics.read_text(encoding="utf-8").splitlines()):
        last = json.loads(logged[-1])
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, int | float))
        lines.append(f"\nThe last step that was logged: {numbers}.")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    is_path = isinstance(value, str) and "/" in value and Path(value).expanduser().exists()
    return Path(value).name if is_path else str(value)
