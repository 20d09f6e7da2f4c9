"""Trained models on the Hugging Face Hub."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from codi_jax.cli.flags import Flags, Operational, Secret
from codi_jax.cli.messages import first_line

_INDEX = "model_index.json"
# What a model folder consists of, by diffusers' names. Whatever else a run leaves in its folder is nobody's business.
_TOP = (_INDEX, "README.md", "scheduler_config.json", "pytorch_lora_weights.safetensors")
_PARTS = (
    "unet", "unet_target", "vae", "controlnet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    "scheduler", "feature_extractor", "image_encoder", "safety_checker",
)  # fmt: skip
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class HubFlags(Flags):
    """Flags about uploading the trained model."""

    push_to_hub: Operational[bool] = False
    """Upload the trained model to the Hugging Face Hub."""
    hub_token: Secret[str | None] = None
    """Token for that. Better: `hf auth login`, or the environment variable HF_TOKEN, since a command line can be read
    by others on the machine."""
    hub_model_id: Operational[str | None] = None
    """Repository for that, owner/name; if left out: the name of --output_dir."""


def model_files(folder: Path) -> list[str]:
    """The files in ``folder`` that belong to the model in it, as paths relative to it."""
    return sorted(_top_files(folder)) + sorted(_part_files(folder))


def create_repository(flags: HubFlags, folder: Path) -> None:
    """Makes the repository that `upload` needs: without the right to, better to know before training.

    Raises:
      ValueError: if the hub refuses, or is not reached.
    """
    name = _repository(flags, folder)
    try:
        HfApi(token=flags.hub_token).create_repo(name, exist_ok=True)
    except Exception as error:
        raise ValueError(
            f"--push_to_hub cannot write to {name}: {first_line(error)}; check --hub_model_id, and `hf auth login` or "
            "HF_TOKEN."
        ) from error


def upload(flags: HubFlags, folder: Path) -> None:
    """Uploads the model in ``folder``, and nothing else of what lies there.

    Raises:
      OSError: if the upload fails, with the command that does it later.
    """
    name, files = _repository(flags, folder), model_files(folder)
    try:
        HfApi(token=flags.hub_token).upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
    except Exception as error:
        includes = " ".join(f"--include {shlex.quote(pattern)}" for pattern in _patterns(files))
        raise OSError(
            f"the trained model is in {folder}, but uploading it to {name} failed ({first_line(error)}). Upload it "
            f"later with: hf upload {name} {shlex.quote(str(folder))} . {includes}"
        ) from error


def _patterns(files: list[str]) -> list[str]:
    """Patterns for a command line that match these files and nothing else of a run."""
    return list(dict.fromkeys(f"{file.partition('/')[0]}/*" if "/" in file else file for file in files))


def _top_files(folder: Path) -> Iterator[str]:
    yield from (name for name in _TOP if (folder / name).is_file())


def _part_files(folder: Path) -> Iterator[str]:
    for part in _PARTS:
        for file in (folder / part).glob("*"):
            if file.is_file() and file.suffix in _ENDINGS and not file.name.startswith("."):
                yield f"{part}/{file.name}"


def _repository(flags: HubFlags, folder: Path) -> str:
    return flags.hub_model_id or folder.name
