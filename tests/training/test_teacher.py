"""The model that a run starts from: refused before its weights are read, and read as precisely as it is needed."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE, make_pipeline, make_tokenizer, refuse_weights

from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models import sharding
from codi_jax.models.network import Network
from codi_jax.pipeline import programs
from codi_jax.pipeline.model import Model
from codi_jax.training import batches, teacher
from codi_jax.training.configured import null_text_of
from codi_jax.training.flags import Replacement, Shown, TrainingFlags
from codi_jax.training.teacher import load_missing, load_on_host, load_teacher, loader_of, open_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(TrainingFlags):
    controlnet_folder: str | None = None
    controlnet_revision: str | None = None
    steps: tuple[int | None, ...] = (None,)
    shows_teacher: bool = False
    other_vae: str | None = None
    random: tuple[str, ...] = ()

    @property
    def starts_random(self) -> tuple[str, ...]:
        return self.random

    @property
    def controlnet(self) -> str | None:
        return self.controlnet_folder

    @property
    def controlnet_revision_on_hub(self) -> str | None:
        return self.controlnet_revision

    @property
    def shown(self) -> Shown:
        return Shown(self.steps, teacher_scales={} if self.shows_teacher else None)

    @property
    def replacements(self) -> dict[str, Replacement]:
        return {} if self.other_vae is None else {"vae": Replacement("--other_vae", self.other_vae, dtype="float32")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_pipeline("controlnet", folder).save_pretrained(folder / "model")
    return folder / "model"


def flags_of(model: Path, **flags: Any) -> Flags:
    return Flags(pretrained_model_name_or_path=str(model), **{"resolution": SIZE, **flags})


def load(model: Path, **flags: Any) -> Model:
    given = flags_of(model, **flags)
    return load_teacher(open_teacher(given), given, sharding.make_mesh())


def dtypes(tree: Any) -> set[Any]:
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), ours, theirs)


@pytest.fixture(scope="module")
def exact(model: Path) -> Model:
    return Model.from_pretrained(model)


def test_training_in_half_precision_starts_from_the_whole_numbers(model: Path, exact: Model) -> None:
    """The student starts from the file's float32, not from the teacher's bfloat16."""
    half = load(model, mixed_precision="bf16")
    assert dtypes(half.params["unet"]) == {jnp.dtype(jnp.bfloat16)}
    assert_same(loader_of(half, sharding.make_mesh())("unet"), exact.params["unet"])
    assert_same(load_on_host(half, "unet", None), exact.params["unet"])
    assert_same(load_on_host(half, "unet"), exact.params["unet"])
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(load_on_host(half, "unet", jnp.bfloat16)))


def test_in_full_precision_nothing_is_read_twice(model: Path) -> None:
    whole = load(model)
    assert loader_of(whole, sharding.make_mesh())("unet") is whole.params["unet"]


def test_what_a_model_lacks_is_read_again_in_the_precision_of_its_computation(model: Path) -> None:
    half = load(model, mixed_precision="bf16")
    again = load_missing(half.without_params("unet"), sharding.make_mesh())
    assert_same(again.params["unet"], half.params["unet"])
    assert all(again.params[name] is half.params[name] for name in ("vae", "text_encoder", "controlnet"))


def test_trees_of_other_names_are_read_by_those_who_give_them(model: Path) -> None:
    load_tree = loader_of(load(model), sharding.make_mesh(), {"path_end": lambda: {"kernel": np.ones(3, "f4")}})
    (leaf,) = jax.tree.leaves(load_tree("path_end"))
    assert isinstance(leaf, jax.Array)
    np.testing.assert_array_equal(leaf, np.ones(3))


def test_weights_are_loaded_to_the_devices_that_keep_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight from the file: one device alone may not have the memory for all."""
    placed: list[np.ndarray] = []
    monkeypatch.setattr(sharding, "place", lambda mesh: lambda _, array: [placed.append(array), jnp.array(array)][1])
    half = load(model, mixed_precision="bf16")
    everything = [half.params, loader_of(half, sharding.make_mesh())("unet")]
    assert len(placed) == len(jax.tree.leaves(everything))
    assert not any(isinstance(array, jax.Array) for array in placed)


def test_networks_that_start_random_differ(model: Path, exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a key of its own, which follows from the seed; the others are read from the folder."""

    def keys(seed: int) -> dict[str, bytes]:
        loaded = load(model, random=("unet", "text_encoder"), seed=seed)
        assert_same(loaded.params["vae"], exact.params["vae"])
        return {name: np.asarray(loaded.params[name]["key"]).tobytes() for name in ("unet", "text_encoder")}

    monkeypatch.setattr(Network, "random_params", lambda self, key: {"key": jax.random.key_data(key)})
    for network in {type(network) for network in exact.networks.by_name().values()}:
        monkeypatch.setattr(network, "random_params", Network.random_params)
    first, other = keys(0), keys(1)
    assert len({*first.values(), *other.values()}) == 4
    assert keys(0) == first


def test_what_is_read_again_is_of_the_same_revision(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ControlNet's is its own, not the model's."""
    flags = {"mixed_precision": "bf16", "revision": "one", "controlnet_revision": "two"}
    half = load(model, controlnet_folder=str(model), **flags)
    asked: list[Any] = []
    real = teacher.load_model
    monkeypatch.setattr(teacher, "load_model", lambda **given: [asked.append(given["revision"]), real(**given)][1])
    for name in ("unet", "controlnet"):
        assert dtypes(loader_of(half, sharding.make_mesh())(name)) == {jnp.dtype(jnp.float32)}
    assert asked == ["one", "two"]


def test_a_network_from_elsewhere_takes_the_place_of_the_models_own(model: Path, exact: Model, tmp_path: Path) -> None:
    """And is read again from there, in the precision that was asked for."""
    changed = jax.tree.map(lambda leaf: leaf + 1, exact.params["vae"])
    exact.with_params({"vae": changed}).save_pretrained(tmp_path)
    loaded = load(model, other_vae=str(tmp_path / "vae"), mixed_precision="bf16")
    assert jnp.dtype(loaded.networks.vae.dtype) == jnp.float32
    assert_same(loaded.params["vae"], changed)
    assert_same(load_on_host(loaded, "vae", None), changed)
    assert dtypes(loaded.params["unet"]) == {jnp.dtype(jnp.bfloat16)}
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "latent_channels": 3}))
    with pytest.raises(ValueError, match=r"--other_vae: its latents have 3 channels .*the teacher's 4 and 4"):
        open_teacher(flags_of(model, other_vae=str(tmp_path / "vae")))


@pytest.mark.parametrize("program", ["generate", "encode"])
def test_programs_are_traced_on_the_mesh_of_their_parameters(
    model: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """Or a kernel that XLA cannot split would not know among which devices to split itself."""
    loaded = load(model)
    traced: list[Any] = []

    def trace(*_: Any, **__: Any) -> Any:
        traced.append(jax.sharding.get_abstract_mesh().axis_names)
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "_jitted_generate", SimpleNamespace(lower=trace))
    monkeypatch.setattr(batches, "posterior", trace)
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: loaded(["a house"], control_image=picture, steps=1),
        "encode": lambda: batches.encoders_of(loaded, conditions_too=False).images(picture[None]),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[program]()
    assert traced == [("data", "fsdp")]


def test_resolutions_that_the_networks_take(model: Path) -> None:
    """Latents of 9 pixels cannot be halved, though the VAE could make them."""
    with pytest.raises(ValueError, match=r"--resolution 36 is not possible: .* takes multiples of 8"):
        open_teacher(flags_of(model, resolution=36))


def test_pictures_that_cannot_be_made_are_found_before_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at the first validation, after hours of training."""
    refuse_weights(monkeypatch)
    folder = shutil.copytree(model, tmp_path / "model")

    def refused(**shown: Any) -> str:
        with pytest.raises(ValueError, match="sampl") as caught:
            load(folder, **shown)
        return str(caught.value)

    assert refused(steps=(1001,)).startswith("--validation_sampling_steps 1001: steps = 1001: choose 1 to 1000")
    path = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(path.read_text())
    # A teacher that is a student itself is shown in as many steps as it takes, and not refused for not taking 50.
    for schedule, steps in (
        (NoiseSchedule.from_config(plain), 50),
        (NoiseSchedule.from_config(plain).sampled(SamplingSpec.codi(4)), 4),
        (NoiseSchedule.from_config(plain).sampled(SamplingSpec.generator([399])), 1),
    ):
        path.write_text(json.dumps(schedule.to_config()))
        assert schedule.sampling.most_steps(teacher.STEPS) == steps
        with pytest.raises(AssertionError):  # nothing was refused before weights are read
            load(folder, steps=(1, 2), shows_teacher=True)
    path.write_text(json.dumps({**plain, "_class_name": "KDPM2DiscreteScheduler"}))
    message = refused(steps=(1, 2), shows_teacher=True)
    assert message.startswith("validation pictures of the teacher: There is no sampler for KDPM2DiscreteScheduler")
    with pytest.raises(AssertionError):  # where no pictures are made, it is of no matter
        Model.from_pretrained(folder)


@pytest.mark.parametrize("read", [lambda folder: open_teacher(flags_of(folder)), Model.open, Model.from_pretrained])
def test_a_model_of_another_pipeline_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """Not the parts that it lacks, which its own scripts do not need."""
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    with pytest.raises(ValueError, match=r"describes a FluxPipeline without unet .*; supported are text-to-image"):
        read(tmp_path)


def test_another_tokenizer(model: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other")
    loaded = load(model, tokenizer_name=str(tmp_path / "other"))
    assert loaded.tokenizer_files["tokenizer"][0].parent == tmp_path / "other"
    config = loaded.networks.text_encoder.config
    ids = loaded.tokenize(["a", ""])["text_encoder"]
    assert ids.shape == (2, config.max_position_embeddings)
    assert null_text_of(loaded).context.shape == (1, config.max_position_embeddings, config.hidden_size)
