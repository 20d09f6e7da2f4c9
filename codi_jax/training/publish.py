"""Uploads trained models to the Hugging Face Hub."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi

from codi_jax.cli.flags import Flags, Operational, Secret, Topic
from codi_jax.cli.messages import first_line

_INDEX = "model_index.json"
# The contents of a model folder, by diffusers' names. Nothing else in a run's folder is uploaded.
_TOP = (_INDEX, "README.md", "scheduler_config.json", "pytorch_lora_weights.safetensors")
_PARTS = (
    "unet", "unet_target", "vae", "controlnet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    "scheduler", "feature_extractor", "image_encoder", "safety_checker",
)  # fmt: skip
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class HubFlags(Flags):
    """Flags about uploading the trained model."""

    topic: ClassVar[Topic] = Topic.HUB

    push_to_hub: Operational[bool] = False
    """Upload the trained model to the Hugging Face Hub."""
    hub_token: Secret[str | None] = None
    """Token for the upload. Better: `hf auth login`, or the environment variable HF_TOKEN, because others on the
    machine can read command lines."""
    hub_model_id: Operational[str | None] = None
    """Repository for the upload, owner/name. Default: the name of --output_dir."""


def model_files(folder: Path) -> list[str]:
    """The files in ``folder`` that belong to its model, as paths relative to it."""
    return sorted(_top_files(folder)) + sorted(_part_files(folder))


def create_repository(flags: HubFlags, folder: Path) -> None:
    """Creates the repository that `upload` needs, so that missing permissions show up before training.

    Raises:
      ValueError: if the hub refuses, or cannot be reached.
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
    """Uploads the model in ``folder``, and nothing else in it.

    Raises:
      OSError: if the upload fails, with the command for uploading later.
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
    """Command-line patterns that match these files and nothing else in a run's folder."""
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
