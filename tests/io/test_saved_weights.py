"""Models into folders, which diffusers and transformers load; sharded ones; peak memory."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
import transformers
from weight_folders import CLASSES, ROOT, assert_same, state_dict

from codi_jax.io import weights
from codi_jax.io.state_dict import to_state_dict
from codi_jax.io.weights import copy_model, load_model, save_model
from codi_jax.models.config import WeightsError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saves_shards_that_the_oracle_loads(oracles: dict, pipeline: Path, tmp_path: Path):
    for part in ("unet", "text_encoder"):
        save_model(tmp_path, part, *load_model(pipeline, part), max_shard_size="20KB")
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
        model, info = CLASSES[part][1].from_pretrained(tmp_path / part, output_loading_info=True)
        assert not any(info.values()), info
        assert_same(state_dict(model), state_dict(oracles[part]))
        assert_same(dict(to_state_dict(load_model(tmp_path, part)[1])), state_dict(oracles[part]))


def test_saves_over_an_earlier_save(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "vae")
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "notes.txt").write_text("mine")
    for tree, size in ((params, 10**9), (other, 20_000), (params, 50_000), (other, 10**9)):
        save_model(tmp_path, "vae", module, tree, max_shard_size=size)
        assert_same(dict(to_state_dict(load_model(tmp_path, "vae")[1])), dict(to_state_dict(tree)))
        model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        assert_same(state_dict(model), dict(to_state_dict(tree)))
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "notes.txt",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_saves_into_the_folder_itself(oracles: dict, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, params = load_model(pipeline, "controlnet")
    monkeypatch.chdir(tmp_path)
    save_model(".", None, module, params)
    save_model("new/one", None, module, params)
    for folder in (".", "new/one"):
        assert_same(dict(to_state_dict(load_model(folder)[1])), state_dict(oracles["controlnet"]))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_is_left(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing, interrupt
):
    module, params = load_model(pipeline, "vae")
    if existing:
        save_model(tmp_path / "out", "vae", module, params)
    before = contents(tmp_path)
    real = weights.write_safetensors
    calls = []

    def fails_at_the_second(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)
        if len(calls) == 2:
            raise interrupt

    monkeypatch.setattr(weights, "write_safetensors", fails_at_the_second)
    expected = WeightsError if isinstance(interrupt, OSError) else interrupt
    with pytest.raises(expected, match="out/vae: No space left on device" if expected is WeightsError else None):
        save_model(tmp_path / "out", "vae", module, params, max_shard_size="20KB")
    assert contents(tmp_path) == before
    assert (tmp_path / "out").exists() == existing
    if existing:
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["vae"]


def test_a_file_system_that_refuses(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "vae")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"Could not save .*vae: File too large"):
            save_model(tmp_path / "out", "vae", module, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"Could not save .*file/vae: Not a directory"):
        save_model(tmp_path / "file", "vae", module, params)


def test_parameters_of_another_model_are_not_saved(pipeline: Path, tmp_path: Path):
    module, params = load_model(pipeline, "unet")
    del params["conv_in"]["bias"]
    params["conv_out"]["bias"] = jnp.zeros(7)
    with pytest.raises(
        WeightsError, match=r"(?s)1 missing: conv_in\.bias \[8\].*conv_out\.bias is \[7\] instead of \[4\]"
    ):
        save_model(tmp_path / "out", "unet", module, params)
    assert not (tmp_path / "out").exists()


def run_python(code: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from codi_jax.io.weights import load_model, save_model
mesh = jax.make_mesh((8,), ("fsdp",))
def place(path, array):
    axis = next((i for i, size in enumerate(array.shape) if size % 8 == 0), None)
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
    return jax.device_put(array, NamedSharding(mesh, spec))
module, params = load_model(sys.argv[1], "unet", place=place)
assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params)) > 20
save_model(sys.argv[2], "unet", module, params)
assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params)), "host copies were kept"
"""


def test_sharded_parameters(oracles: dict, pipeline: Path, tmp_path: Path):
    run_python(SHARDED, pipeline, tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert_same(dict(to_state_dict(load_model(tmp_path, "unet")[1])), state_dict(oracles["unet"]))


@pytest.mark.parametrize("part", ["unet", "controlnet", "vae", "text_encoder"])
def test_a_network_is_copied(oracles: dict, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    """From file to file, without being loaded, in the precision of the file or in another one."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the whole network was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "load_model", refuse)
        copy_model(tmp_path / "same", part, {"source": str(pipeline), "subfolder": part, "variant": None})
        copy_model(tmp_path / "half", part, {"source": str(pipeline), "subfolder": part}, dtype="float16")
        copy_model(tmp_path / "again", part, {"source": str(tmp_path / "half"), "subfolder": part})
    model, info = CLASSES[part][1].from_pretrained(tmp_path / "same" / part, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(state_dict(model), state_dict(oracles[part]))
    _, half = load_model(tmp_path / "again", part, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float16")}
    expected = {name: array.astype("float16") for name, array in state_dict(oracles[part]).items()}
    assert_same(dict(to_state_dict(half)), expected)


PEAK = """
import sys, jax
from codi_jax.io.weights import load_model
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
# Tracing the module costs tens of MB whatever the size of the weights: done once before, it is not in the difference.
config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
CLIPTextModel(config).abstract_params()
before = status("VmRSS")
module, params = load_model(sys.argv[1])
assert module.config == config
jax.block_until_ready(params)
print((status("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory(tmp_path: Path, kind: str):
    """SD 1.5's text encoder, 492 MB, a third of it in one tensor: the hardest case there is for a loader."""
    config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.CLIPTextModel(config)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert float(run_python(PEAK, tmp_path)) <= 1.2
