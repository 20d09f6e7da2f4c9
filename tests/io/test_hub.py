"""Models on the hub, in its cache and out of reach."""

import shutil
from pathlib import Path

import huggingface_hub.errors
import pytest
from weight_folders import assert_same, rewrite, state_dict

from codi_jax.io import hub
from codi_jax.io.hub import ModelFolder
from codi_jax.io.state_dict import to_state_dict
from codi_jax.io.weights import load_model
from codi_jax.models.config import WeightsError


@pytest.fixture
def cache(pipeline: Path, tmp_path: Path) -> Path:
    """A cache as huggingface_hub would have left it, with a UNet's safetensors and a VAE's .bin."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--artist--style"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(pipeline / "unet", snapshot / "unet")
    shutil.copytree(pipeline / "vae", snapshot / "vae")
    rewrite(snapshot, "vae", lambda tensors: tensors, "bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "cache"


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("local_files_only", [True, False])  # HF_HUB_OFFLINE is set for all tests
def test_hub_cache(oracles: dict, cache: Path, part: str, local_files_only: bool):
    _, params = load_model("artist/style", part, cache_dir=cache, local_files_only=local_files_only)
    assert_same(dict(to_state_dict(params)), state_dict(oracles[part]))


@pytest.mark.parametrize("local_files_only", [True, False])
def test_hub_out_of_reach(cache: Path, local_files_only: bool):
    with pytest.raises(
        WeightsError, match=r"no config\.json in artist/style/controlnet: it is not a folder .* the local cache"
    ):
        load_model("artist/style", "controlnet", cache_dir=cache, local_files_only=local_files_only)
    for path in cache.rglob("diffusion_pytorch_model.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match=r"artist/style/unet has no weights of variant 'fp16'.* was not reached"):
        load_model("artist/style", "unet", variant="fp16", cache_dir=cache, local_files_only=local_files_only)


def test_hub_asks_for_one_commit_and_only_what_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repo: str, name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return huggingface_hub.hf_hub_download(repo, name, **options)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    load_model("artist/style", "unet", cache_dir=cache, revision="main")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert asked == [
        ("config.json", "main"),
        ("config.json", commit),  # found in the cache without asking the hub
        ("diffusion_pytorch_model.safetensors", commit),
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "artist/style is neither a folder on this machine nor a public repository"),
        ("GatedRepoError", "artist/style is gated: accept its license at https://huggingface.co/artist/style"),
        ("RevisionNotFoundError", "artist/style has no revision 'v2'"),
        ("XetDownloadError", r"Downloading config\.json of artist/style/unet failed: server on fire"),
        ("EntryNotFoundError", r"no config\.json in artist/style/unet: it holds unet\.txt\."),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: str, message: str):
    def download(*_: object, **__: object) -> str:
        # Without __init__, which wants the response of whichever HTTP client this version of the library has.
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind, "server on fire")

    def names(*_: object, **__: object) -> list[str]:
        return ["README.md", "unet/unet.txt"]

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", names)
    with pytest.raises(WeightsError, match=message) as raised:
        load_model("artist/style", "unet", revision="v2")
    assert "\n" not in str(raised.value)
    if error == "EntryNotFoundError":
        with pytest.raises(WeightsError, match=r"in artist/style/unt: artist/style holds README\.md, unet/unet\.txt\."):
            load_model("artist/style", "unt")


def test_names_on_the_hub_with_shards(cache: Path, oracles: dict):
    snapshot = next((cache / "models--artist--style" / "snapshots").iterdir())
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    oracles["unet"].save_pretrained(snapshot / "unet", max_shard_size="20KB")
    _, params = load_model("artist/style", "unet", cache_dir=cache)
    assert_same(dict(to_state_dict(params)), state_dict(oracles["unet"]))
    next((snapshot / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match="no diffusion_pytorch_model-00002-of-"):
        load_model("artist/style", "unet", cache_dir=cache)


def test_model_folder_reads_other_files(copy: Path):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert ModelFolder(str(copy)).read_json("model_index.json") == {"_class_name": "StableDiffusionPipeline"}
    assert ModelFolder(str(copy)).find("nothing.json") is None
    assert ModelFolder(str(copy), "vae").names() == ["config.json", "diffusion_pytorch_model.safetensors"]
