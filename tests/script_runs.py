"""Runs of the training scripts, as a user runs them, on models of a few channels and data sets of a few pictures."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from folders import SIZE
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPTextModel

from codi_jax.pipeline.model import Model
from codi_jax.training import loop
from codi_jax.training.checkpoint import list_checkpoints
from training_scripts import train_autoencoder_flax as autoencoder
from training_scripts import train_codi_flax as codi

PICTURES = 6


class Inputs(NamedTuple):
    """What runs start from."""

    model: Path
    data: Path


def flags_of(script: Any, inputs: Inputs, output_dir: Path, **flags: Any) -> Any:
    """Arguments of a run of two steps, that validates at its end."""
    sampling = {codi: (1, 2), autoencoder: None}.get(script, 2)
    given = {
        "pretrained_model_name_or_path": str(inputs.model), "train_data_dir": str(inputs.data), "resolution": SIZE,
        "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
        "num_validation_images": 2, "validation_steps": 0, "validation_sampling_steps": sampling,
        "output_dir": str(output_dir), "lr_warmup_steps": 0,
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in {**given, **flags}.items() if name in names or name in flags})


def run(script: Any, inputs: Inputs, output_dir: Path, **flags: Any) -> Path:
    script.main(flags_of(script, inputs, output_dir, **flags))
    return output_dir


def card_of(folder: Path) -> tuple[huggingface_hub.ModelCard, str, list[str]]:
    """A model's card, and with the folder in place of the name the code in it and the words of its command."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    code, command = (
        re.search(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)[1].replace(f'"{folder.name}"', f'"{folder}"')
        for language in ("python", "bash")
    )
    return card, code, [str(folder) if word == folder.name else word for word in shlex.split(command)]


class Prepared(NamedTuple):
    """What a script hands to the training loop."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    loader: Any
    validate: Callable[..., Any]
    export: Callable[..., Any]

    def traced(self) -> tuple[Any, Any]:
        """Shapes and dtypes of a step's results: as good as compiling it, as far as mistakes in programs go."""
        batch = next(self.loader)
        self.loader.close()
        return jax.eval_shape(self.step, self.state, self.frozen, batch)


def prepare(script: Any, inputs: Inputs, output_dir: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Prepared:
    """Runs a script up to its first step."""
    handed: list[Prepared] = []

    def take(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **others: Any) -> None:
        handed.append(Prepared(step, state, frozen, loader, others["validate"], others["export"]))

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", take)
        run(script, inputs, output_dir, **flags)
    return handed[0]


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = weights_of(ours), weights_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)


def assert_frozen(folder: Path, model: Path, *names: str) -> None:
    """Parts of a folder have the very numbers of the model's."""
    for name in names:
        if name == "text_encoder":
            ours, theirs = (CLIPTextModel.from_pretrained(each / name).state_dict() for each in (folder, model))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(value, theirs[key]) for key, value in ours.items())
        else:
            assert_same_weights(folder / name, model / name)


def assert_trained(folder: Path, model: Path, *names: str) -> None:
    for name in names:
        ours, theirs = weights_of(folder / name), weights_of(model / name)
        assert ours.keys() == theirs.keys()
        changed = [key for key, value in ours.items() if not np.array_equal(value, theirs[key])]
        assert len(changed) > 0.9 * len(ours)


def assert_reports(folder: Path, steps: int, picture: str = "samples") -> None:
    """Metrics, arguments and pictures of a run that logs every step and validates at its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    assert list_checkpoints(folder)[-1] == steps
    assert [path.name for path in (folder / "validation").iterdir()] == [f"{picture}-{steps}.png"]
    arguments = (folder / "config.yaml").read_text()
    assert yaml.safe_load(arguments)["output_dir"] == str(folder)
    assert "hub_token" not in arguments


def picture_of(folder: Path) -> np.ndarray:
    (path,) = (folder / "validation").iterdir()
    return np.asarray(Image.open(path))


def condition() -> np.ndarray:
    return np.linspace(0, 255, SIZE * SIZE * 3).astype(np.uint8).reshape(SIZE, SIZE, 3)


def generate(model: Model, **options: Any) -> np.ndarray:
    control = condition() if model.networks.controlnet is not None else None
    return model("a cat", control_image=control, height=SIZE, width=SIZE, steps=2, **options)


def picture_stub(self: Any, program: Any, params: Any, schedule: Any, guidance: Any, inputs: Any) -> Any:
    """In place of `Programs.run`: black pictures, at once."""
    batch, height, width, _ = inputs["z"].shape
    return np.zeros((batch, 4 * height, 4 * width, 3), np.uint8), np.ones(batch, bool)


def cached_in(tmp_path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    return {**flags, "cache_latents_dir": str(tmp_path / "latents")} if flags.get("cache_latents") else flags


def meta(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes every line of a data set's list."""
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_command(args: Any) -> list[str]:
    """The command line of arguments that are not the defaults."""
    command = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or value == field.default:
            continue
        words = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        command += [f"--{field.name}"] if value is True else [f"--{field.name}", *words]
    return command


# Flags and values of the scripts that came before.
SHARED = """
--pretrained_model_name_or_path m --revision r --variant fp16 --tokenizer_name t --from_pt --output_dir o --cache_dir c
--seed 1 --resolution 64 --center_crop --random_flip --train_batch_size 2 --num_train_epochs 3 --max_train_steps 4
--gradient_accumulation_steps 2 --gradient_checkpointing --learning_rate 0.1 --scale_lr
--lr_scheduler constant_with_warmup --lr_warmup_steps 5 --use_8bit_adam --adam_beta1 0.8 --adam_beta2 0.99
--adam_weight_decay 0.1 --adam_epsilon 1e-6 --max_grad_norm 2 --mixed_precision bf16 --allow_tf32
--enable_xformers_memory_efficient_attention --dataset_name d --dataset_config_name x --train_data_dir e
--load_from_disk --streaming --image_column i --caption_column j --conditioning_image_column k --max_train_samples 9
--proportion_empty_prompts 0.5 --dataloader_num_workers 3 --checkpointing_steps 7 --checkpoints_total_limit 2
--resume_from_checkpoint latest --logging_dir l --logging_steps 8 --report_to none --tracker_project_name p
--wandb_entity w --validation_prompt a b --validation_image v --validation_steps 6 --num_validation_images 5
--profile_steps 1 --profile_validation --profile_memory --ccache z --debug --push_to_hub --hub_token h
--hub_model_id me/x --local_rank 0
"""
