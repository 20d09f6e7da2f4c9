import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from served_hub import serve_hub
from stand_in import Loader, run

from codi_jax.training import loop
from codi_jax.training.publish import HubFlags, create_repository, model_files, upload

MODEL = [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json", "unet_target/config.json", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/merges.txt",
    "tokenizer/vocab.json", "scheduler/scheduler_config.json", "controlnet/config.json",
]  # fmt: skip
LEFTOVERS = [
    "config.yaml", "metrics.jsonl", ".lock", "checkpoint-10/state/d/x", "checkpoint-8.damaged/checksums.json",
    "degradation/checkpoint-3/checksums.json", "degradation/config.yaml", "path/path.json",
    "path/node_00/diffusion_pytorch_model.safetensors", "step-10/unet/config.json", "logs/events.out.tfevents.1",
    "wandb/run-1/files/wandb-metadata.json", ".unet.partial-1234/diffusion_pytorch_model.safetensors",
    "unet/.config.json.swp", "validation/samples-10.png", "memory_final.prof", "notes.txt", ".env",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from serve_hub(tmp_path, monkeypatch)


def write_run(folder: Path) -> None:
    for name in (*MODEL, *LEFTOVERS):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def uploaded(hub: SimpleNamespace, name: str) -> list[str]:
    branch = hub.root / "your-username" / name / "main"
    return sorted(str(path.relative_to(branch)) for path in branch.rglob("*") if path.is_file())


def test_only_the_model_is_uploaded(tmp_path, hub):
    write_run(tmp_path / "run")
    assert sorted(model_files(tmp_path / "run")) == sorted(MODEL)
    flags = HubFlags(push_to_hub=True, hub_token="hf_write", hub_model_id="your-username/student")
    create_repository(flags, tmp_path / "run")
    upload(flags, tmp_path / "run")
    assert uploaded(hub, "student") == sorted([*MODEL, ".gitattributes"])


def test_a_lora_is_uploaded_with_its_scheduler(tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert model_files(tmp_path) == ["pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("where", ["environment", "login"])
def test_the_token_need_not_be_on_the_command_line(tmp_path, hub, where, monkeypatch):
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_write")
    else:
        hub.token_file.write_text("hf_write")
    flags = HubFlags(push_to_hub=True)
    create_repository(flags, tmp_path / "student")
    assert (hub.root / "your-username" / "student").is_dir()


def test_a_token_without_the_right_to_write_is_refused_before_training(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(ValueError, match=r"--push_to_hub cannot write to student: .*`hf auth login` or HF_TOKEN\."):
        create_repository(HubFlags(push_to_hub=True), tmp_path / "student")


def test_a_training_uploads_its_model_without_what_else_it_writes(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")

    def export(_, folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")

    run(tmp_path / "student", push_to_hub=True, hub_model_id="your-username/student", export=export)
    assert uploaded(hub, "student") == [".gitattributes", "unet/config.json"]


def test_a_network_that_is_lost_at_the_end_leaves_the_model_and_says_how_to_upload_it(tmp_path, hub, monkeypatch):
    folder = tmp_path / "my run"
    write_run(folder)
    flags = HubFlags(push_to_hub=True, hub_token="hf_write", hub_model_id="your-username/student")
    create_repository(flags, folder)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    message = f"the trained model is in {folder}, but uploading it to your-username/student failed .*hf upload"
    with pytest.raises(OSError, match=message) as error:
        upload(flags, folder)
    assert "hf_write" not in str(error.value)
    # What it says works.
    command = str(error.value).partition("Upload it later with: hf ")[2]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "HF_HUB_OFFLINE": "0"}
    program = Path(sys.executable).with_name("hf")
    done = subprocess.run(
        [program, *shlex.split(command)],
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(MODEL) <= set(uploaded(hub, "student"))
    assert not (set(LEFTOVERS) - {"unet/.config.json.swp"}) & set(uploaded(hub, "student"))


def test_a_hub_that_refuses_is_noticed_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loader = Loader(8)
    with pytest.raises(ValueError, match=r"--push_to_hub cannot write to .*check --hub_model_id, and `hf auth"):
        run(tmp_path, push_to_hub=True, loader=loader)
    assert loader.given == 0


def test_the_repository_is_made_before_training_and_filled_after_the_export(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop.publish, "create_repository", lambda flags, folder: calls.append(("create", folder)))
    monkeypatch.setattr(loop.publish, "upload", lambda flags, folder: calls.append(("upload", folder)))
    loader = Loader(8, lambda number: calls.append("batch") if number == 1 else None)
    run(tmp_path, push_to_hub=True, loader=loader, export=lambda *_: calls.append("export"))
    assert calls == [("create", tmp_path), "batch", "export", ("upload", tmp_path)]
