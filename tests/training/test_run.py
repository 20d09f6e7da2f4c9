"""The runner, with methods that are not among those of the project: it knows none, so it treats these as any other."""

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import SIZE, make_pipeline, saved_pipeline
from picture_folders import write_folder

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.programs import Programs
from codi_jax.training import batches, loop, optim, teacher
from codi_jax.training import run as runner
from codi_jax.training.checkpoint import CheckpointError
from codi_jax.training.flags import Shown, TrainingFlags
from codi_jax.training.method import Export, Method, Setup
from codi_jax.training.run import Hooks, run
from codi_jax.training.teacher import load_teacher


@dataclasses.dataclass(frozen=True)
class PullFlags(Flags):
    """Of a method that pulls the last bias of the UNet to a number."""

    goal: float = 1.0
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(PullFlags, TrainingFlags):
    steps: tuple[int | None, ...] = (2,)
    teacher_scale: float | None = 3.0

    @property
    def shown(self) -> Shown:
        guided = None if self.teacher_scale is None else {"guidance_scale": self.teacher_scale}
        return Shown(self.steps, {"guidance_scale": 1.0}, guided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PullSetup(Setup):
    flags: PullFlags


def configure(networks: Any, flags: PullFlags, *, remat: bool = False) -> PullSetup:
    networks = networks.recomputing("unet", remat=remat)
    return PullSetup(networks=networks, student=networks, trained=("unet",), frozen=("vae",), flags=flags)


def init(setup: Any, load: Any, optimizer: Any, key: Any, *, mixed_precision: Any = "no") -> Any:
    return optim.init_state({"unet": load("unet")}, optimizer, key, mixed_precision=mixed_precision)


def loss(params: Any, state: Any, frozen: Frozen, batch: Any, key: Any, setup: PullSetup) -> Any:
    assert frozen.params.keys() == {"vae"}
    return jnp.mean((params["unet"]["conv_out"]["bias"] - setup.flags.goal) ** 2), {"extra": jnp.float32(5)}


PULL = Method(flags=PullFlags, configure=configure, init=init, loss=loss)


def with_bias(bias: Any, load: Any) -> dict[str, Params]:
    unet = load("unet")
    return {"unet": {**unet, "conv_out": {**unet["conv_out"], "bias": bias}}}


def export_bias(bias: Any, setup: Any, load: Any) -> Export:
    return Export({"unet": (setup.student.unet, with_bias(bias, load)["unet"])})


def init_last(setup: Any, load: Any, optimizer: Any, key: Any, *, mixed_precision: Any = "no") -> Any:
    last = {"unet": {"conv_out": load("unet")["conv_out"]}}
    return optim.init_state(last, optimizer, key, mixed_precision=mixed_precision)


def bias_of(state: Any) -> Any:
    return state.params["unet"]["conv_out"]["bias"]


PULL_LAST = dataclasses.replace(
    PULL,
    init=init_last,
    result=lambda state, setup, load: with_bias(bias_of(state), load),
    export=lambda state, setup, load: export_bias(bias_of(state), setup, load),
)
"""The same, with a state of one layer, which is soon compiled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """A state as far from the usual one as can be."""

    step: Any
    bias: Any


def set_bias(state: Plain, frozen: Any, batch: Any, *, setup: Any, optimizer: float, accumulation: int = 1) -> Any:
    return Plain(state.step + 1, jnp.full_like(state.bias, optimizer)), {"loss": jnp.float32(0)}


SET = Method(
    flags=PullFlags,
    configure=configure,
    optimizer=lambda flags, make, num_steps: flags.goal,
    init=lambda setup, load, optimizer, key, *, mixed_precision="no": Plain(
        jnp.int32(0), jnp.copy(load("unet")["conv_out"]["bias"])
    ),
    train_step=set_bias,
    result=lambda state, setup, load: with_bias(state.bias, load),
    export=lambda state, setup, load: export_bias(state.bias, setup, load),
)
"""It has no loss and no optimizer, and its state holds a single vector."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("inputs")
    saved_pipeline("text-to-image", scratch)
    write_folder(scratch / "data", 6, size=(SIZE, SIZE))
    return scratch


def args_of(folder: Path, output_dir: Path, **flags: Any) -> Args:
    given = {
        "pretrained_model_name_or_path": str(folder / "text-to-image"), "train_data_dir": str(folder / "data"),
        "output_dir": str(output_dir), "resolution": SIZE, "train_batch_size": 2, "max_train_steps": 2,
        "logging_steps": 1, "report_to": "none", "num_validation_images": 2, "validation_steps": 0,
        "lr_warmup_steps": 0, "learning_rate": 0.01, "checkpointing_steps": 0,
    }  # fmt: skip
    return Args(**{**given, **flags})


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Notes what pictures are made with, which are black."""
    calls: list[tuple[Any, ...]] = []

    def make(self: Programs, program: Any, params: Any, schedule: Any, guidance: Any, inputs: Any) -> Any:
        calls.append((program, params, schedule, guidance, inputs))
        return np.zeros((len(inputs["z"]), SIZE, SIZE, 3), np.uint8), np.ones(len(inputs["z"]), bool)

    monkeypatch.setattr(Programs, "run", make)
    return calls


def handed_over(monkeypatch: pytest.MonkeyPatch, look: Callable[..., Any] = lambda: None) -> list[dict[str, Any]]:
    """Fills with what the loop would be handed; ``look`` is called in its place."""
    handed: list[dict[str, Any]] = []

    def take(step: Any, state: Any, frozen: Any, loader: Any, args: Any, **others: Any) -> None:
        loader.close()
        handed.append({**others, "step": step, "state": state, "frozen": frozen})
        look()

    monkeypatch.setattr(loop, "train", take)
    return handed


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), ours, theirs)


@pytest.mark.parametrize("method", [PULL_LAST, SET], ids=["loss", "train_step"])
def test_a_method_that_nobody_knows_is_trained_shown_and_written(
    method: Any, folder: Path, tmp_path: Path, called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no hook at all: each default is what a method needs that is one of many."""
    rows: list[list[str]] = []
    monkeypatch.setattr(runner, "labeled_rows", lambda given: rows.append([*given]) or np.zeros((4, 4, 3), np.uint8))
    done = run(method, args_of(folder, tmp_path / "{timestamp}", goal=0.5))
    (out,) = tmp_path.iterdir()
    assert done.output_dir == str(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert ("extra" in lines[0]) == (method is PULL_LAST)
    before, after = (Model.from_pretrained(each) for each in (folder / "text-to-image", out))
    for name in ("vae", "text_encoder"):
        assert_same(after.params[name], before.params[name])
    bias = before.params["unet"]["conv_out"]["bias"]
    wanted = jnp.full_like(bias, 0.5) if method is SET else bias + 0.02 * jnp.sign(0.5 - bias)
    np.testing.assert_allclose(after.params["unet"]["conv_out"]["bias"], wanted, rtol=1e-3, atol=1e-4)
    rest = [{**model.params["unet"], "conv_out": 0} for model in (before, after)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), *rest)
    assert rows == [["condition", "teacher, 50 steps", "student, 2 steps", "data"]]
    shown = [params["unet"]["conv_out"]["bias"] for _, params, *_ in called]
    np.testing.assert_array_equal(shown[0], bias)
    np.testing.assert_allclose(shown[1], wanted, rtol=1e-3, atol=1e-4)


def test_a_run_resumed_with_another_prediction_type_is_refused_first(
    folder: Path, tmp_path: Path, called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before data or a model is looked at."""
    run(SET, args_of(folder, tmp_path, checkpointing_steps=1))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the run was to be refused before")

    for place, name in ((batches, "open_training_data"), (teacher.Model, "open")):
        monkeypatch.setattr(place, name, refuse)
    resumed = args_of(folder, tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match='was made with prediction_type = null, but this run has "v_prediction"'):
        run(SET, dataclasses.replace(resumed, prediction_type="v_prediction"))
    with pytest.raises(CheckpointError, match=r"was made with goal = 1\.0, but this run has 2\.0"):
        run(SET, dataclasses.replace(resumed, goal=2.0))
    with pytest.raises(AssertionError, match="refused before"):
        run(SET, resumed)


def test_what_a_run_is_beyond_its_flags_must_stay_the_same(
    folder: Path, tmp_path: Path, called: list[tuple[Any, ...]]
) -> None:
    run(SET, args_of(folder, tmp_path, checkpointing_steps=1), identity={"blocks": "one"})
    resumed = args_of(folder, tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match='was made with blocks = "one", but this run has "two"'):
        run(SET, resumed, identity={"blocks": "two"})


@pytest.mark.parametrize(
    ("mixed_precision", "cached", "stay"),
    [("no", False, {"vae", "text_encoder"}), ("bf16", False, {"vae", "text_encoder"}), ("no", True, set())],
)
def test_only_what_the_step_reads_is_on_the_devices_when_the_loop_starts(
    mixed_precision: str, cached: bool, stay: set[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no second copy of what is trained, and nothing of networks whose outputs are cached."""
    loaded: dict[str, list[Any]] = {}

    def load(*given: Any) -> Model:
        model = load_teacher(*given)
        loaded.update({name: [weakref.ref(x) for x in jax.tree.leaves(model.params[name])] for name in model.params})
        return model

    def alive() -> set[str]:
        gc.collect()
        return {name for name, leaves in loaded.items() if any(leaf() is not None for leaf in leaves)}

    left: list[set[str]] = []
    handed = handed_over(monkeypatch, lambda: left.append(alive()))
    # On a CPU, an array in host memory is the one on the device.
    monkeypatch.setattr(sharding, "fetch", lambda tree: jax.tree.map(np.array, tree))
    flags = {"mixed_precision": mixed_precision, "cache_latents": cached, "cache_dir": str(tmp_path / "cache")}
    run(SET, args_of(folder, tmp_path, **flags), hooks=Hooks(load_model=load))
    assert left == [stay]
    assert handed[0]["state"].bias.dtype == jnp.float32
    assert handed[0]["frozen"].params.keys() == {"vae"} & stay


def test_networks_whose_outputs_are_cached_return_to_draw(
    folder: Path, tmp_path: Path, called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = handed_over(monkeypatch)
    for cached in (False, True):
        flags = {"cache_latents": cached, "cache_dir": str(tmp_path / "cache")}
        run(SET, args_of(folder, tmp_path / str(cached), **flags))
        handed[-1]["validate"](handed[-1]["state"], 1)
    plain, cached = called[: len(called) // 2], called[len(called) // 2 :]
    assert len(plain) == len(cached) > 1
    for (_, expected, *_), (_, params, *_) in zip(plain, cached, strict=True):
        assert params.keys() == expected.keys() >= {"vae", "text_encoder"}
        assert_same(params["vae"], expected["vae"])
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_the_teacher_is_read_again_to_be_shown_and_once(
    folder: Path, tmp_path: Path, called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = handed_over(monkeypatch)
    run(SET, args_of(folder, tmp_path, mixed_precision="bf16", steps=(None, 1)))
    ((validate, state),) = [(each["validate"], each["state"]) for each in handed]
    for step in (1, 2):
        validate(state, step)
    of_unet = [params["unet"]["conv_in"]["kernel"].dtype for _, params, *_ in called]
    assert of_unet == [jnp.bfloat16, *[jnp.float32] * 4]
    assert [int(inputs["num_steps"]) for *_, inputs in called] == [50, 50, 1, 50, 1]


def test_training_in_half_precision_saves_what_is_frozen_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Model.from_pretrained(folder / "text-to-image")
    handed = handed_over(monkeypatch)
    run(PULL, args_of(folder, tmp_path / "run", mixed_precision="bf16", save_dtype="bfloat16"))
    assert_same(handed[0]["state"].params["unet"], exact.params["unet"])
    handed[0]["export"](handed[0]["state"], tmp_path / "saved")
    saved = Model.from_pretrained(tmp_path / "saved")
    for name in ("vae", "text_encoder"):
        assert_same(saved.params[name], exact.params[name])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), exact.params["unet"])
    assert_same(saved.params["unet"], rounded)


def test_a_method_without_a_controlnet_leaves_none(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipeline("controlnet", tmp_path).save_pretrained(tmp_path / "model")

    def without(networks: Any, flags: Any, *, remat: bool = False) -> PullSetup:
        return configure(dataclasses.replace(networks, controlnet=None), flags, remat=remat)

    for method, has_one in ((SET, True), (dataclasses.replace(SET, configure=without), False)):
        handed, out = handed_over(monkeypatch), tmp_path / str(has_one)
        run(method, args_of(folder, out, pretrained_model_name_or_path=str(tmp_path / "model")))
        handed[0]["export"](handed[0]["state"], out)
        assert (out / "controlnet").exists() == has_one
        assert (Model.open(out).networks.controlnet is not None) == has_one


def test_how_networks_are_computed_does_not_reach_the_student_that_is_saved(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipeline("controlnet", tmp_path).save_pretrained(tmp_path / "model")
    handed = handed_over(monkeypatch)
    for options in ({"gradient_checkpointing": True, "scan_layers": True}, {}):
        args = args_of(folder, tmp_path / f"{len(options)}", pretrained_model_name_or_path=str(tmp_path / "model"))
        run(SET, dataclasses.replace(args, **options))
    with_options, plain = (each["step"].keywords["setup"].networks for each in handed)
    # Only what is trained recomputes activations, and every UNet scans its layers.
    assert with_options.unet.remat
    assert not with_options.controlnet.remat
    assert with_options.unet.scan_layers
    assert with_options.controlnet.scan_layers
    assert plain.unet == Model.open(tmp_path / "model").networks.unet
    students = [each["validate"].args[1].student.networks.unet.remat for each in handed]
    assert students == [False, False]


def test_the_step_reads_what_its_setup_names_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(networks: Any, flags: Any, *, remat: bool = False) -> PullSetup:
        setup = configure(networks, flags, remat=remat)
        return dataclasses.replace(setup, frozen=("text_encoder",), target="unet", needs_null_text=True)

    def of_four_steps(schedule: Any, flags: Any) -> Any:
        return schedule.sampled(SamplingSpec.codi(4))

    handed = handed_over(monkeypatch)
    run(SET, args_of(folder, tmp_path / "plain"))
    run(dataclasses.replace(SET, configure=more, sampling=of_four_steps), args_of(folder, tmp_path / "more"))
    plain, other = (each["frozen"] for each in handed)
    assert plain.params.keys() == {"vae"}
    assert (plain.teacher_schedule, plain.null_text, plain.target) == (None, None, None)
    assert other.params.keys() == {"text_encoder"}
    assert other.null_text.context.shape[0] == 1
    assert_same(other.target, Model.from_pretrained(folder / "text-to-image").params["unet"])
    assert other.schedule.sampling.grid_steps == 4
    assert other.teacher_schedule.to_config() == plain.schedule.to_config()


def test_hooks_take_the_place_of_what_most_runs_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each has the run, with its model, to work with."""
    seen: list[tuple[str, Any]] = []

    def note(name: str, value: Any) -> Callable[..., Any]:
        def hook(this: Any, *given: Any) -> Any:
            assert isinstance(this.model, Model)
            seen.append((name, len(given)))
            return value

        return hook

    record = loop.Recorder(lambda state, step: None, 3)
    hooks = Hooks(
        check=note("check", None), frozen=note("frozen", {"mine": 1}), record=note("record", record),
        show=note("show", {}), write=note("write", None), load={"extra": lambda: {"x": np.zeros(1, "f4")}},
    )  # fmt: skip
    handed = handed_over(monkeypatch)

    def init_with_more(setup: Any, load: Any, *given: Any, **more: Any) -> Any:
        assert load("extra")["x"].shape == (1,)
        return SET.init(setup, load, *given, **more)

    run(dataclasses.replace(SET, init=init_with_more), args_of(folder, tmp_path), hooks=hooks)
    (given,) = handed
    assert (given["frozen"], given["record"]) == ({"mine": 1}, record)
    given["validate"](given["state"], 1)
    given["export"](given["state"], tmp_path)
    assert seen == [("check", 0), ("frozen", 1), ("record", 0), ("show", 1), ("write", 2)]
    handed.clear()
    run(SET, args_of(folder, tmp_path / "nothing"), hooks=Hooks(show=None))
    assert handed[0]["validate"] is None


def test_exports_during_training_are_those_at_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In folders of their own, by the hook that writes the last one; without the flag there are none."""
    written: list[tuple[Any, Path]] = []
    handed, hooks = handed_over(monkeypatch), Hooks(write=lambda this, state, where: written.append((state, where)))
    run(SET, args_of(folder, tmp_path, export_steps=4), hooks=hooks)
    assert handed[0]["record"].every == 4
    handed[0]["record"].write("a state", 8)
    assert written == [("a state", tmp_path / "step-8")]
    run(SET, args_of(folder, tmp_path / "plain"))
    assert handed[1]["record"] is None


def test_parameters_are_read_onto_the_mesh_of_the_run(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    handed = handed_over(monkeypatch)
    run(PULL_LAST, args_of(folder, tmp_path, mixed_precision="bf16"))
    mesh = handed[0]["mesh"]
    assert mesh.axis_names == sharding.make_mesh().axis_names
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(handed[0]["state"].params))
