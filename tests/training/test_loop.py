import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in
from several import start_all
from stand_in import EXAMPLES, Loader, fingerprint, frozen_trees, init_state, make_train_step, metrics_of, run

from codi_jax.models import sharding
from codi_jax.training import loop, starting
from codi_jax.training.buffers import own_buffers
from codi_jax.training.checkpoint import CheckpointError, list_checkpoints
from codi_jax.training.starting import LoopFlags, num_steps

SCRIPT = Path(stand_in.__file__)

ON_EIGHT_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
import stand_in
from codi_jax.models import sharding

folder = Path(sys.argv[1])
assert jax.device_count() == 8
for fsdp in map(int, sys.argv[2:]):
    state = stand_in.run(folder / str(fsdp), state=stand_in.init_state(8192), train_batch_size=2, fsdp=fsdp,
                         gradient_accumulation_steps=2, checkpointing_steps=0)
    kernels = state.params, state.ema, state.opt_state[0].mu, state.opt_state[0].nu
    for tree in kernels:
        assert tree["first"]["kernel"].addressable_data(0).shape == (8, 8192 // fsdp), tree
    np.savez(folder / f"{fsdp}.npz", *map(np.asarray, jax.tree.leaves(state.params)))
state = stand_in.run(folder / "resumed", state=stand_in.init_state(8192), train_batch_size=2, fsdp=4,
                     gradient_accumulation_steps=2, resume_from_checkpoint=str(folder / "one" / "checkpoint-6"))
np.savez(folder / "resumed.npz", *map(np.asarray, jax.tree.leaves(state.params)))
"""


def flags_of(tmp_path: Path, **flags) -> LoopFlags:
    return LoopFlags(output_dir=str(tmp_path), **flags)


def child(folder: Path, *, devices: int = 8, **flags) -> subprocess.CompletedProcess:
    """Trains in a process of its own."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(flags)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


# How long


@pytest.mark.parametrize(
    ("flags", "samples", "devices", "expected"),
    [
        ({"max_train_steps": 7}, 1000, 1, 7),
        ({"max_train_steps": 7}, None, 8, 7),
        ({"num_train_epochs": 3, "train_batch_size": 4}, 100, 1, 75),
        # Accumulation makes steps rarer once, not twice: 3 * 100 / (4 * 5), not / (4 * 5 * 5).
        ({"num_train_epochs": 3, "train_batch_size": 4, "gradient_accumulation_steps": 5}, 100, 1, 15),
        ({"num_train_epochs": 3, "train_batch_size": 4, "gradient_accumulation_steps": 5}, 100, 2, 8),
        ({"num_train_epochs": 1, "train_batch_size": 64}, 10, 1, 1),
    ],
)
def test_number_of_steps(flags, samples, devices, expected, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert num_steps(LoopFlags(**flags), samples) == expected


def test_epochs_of_unknown_length_need_a_number_of_steps():
    with pytest.raises(ValueError, match="--max_train_steps is needed"):
        num_steps(LoopFlags(), None)


def test_epochs_come_to_an_end(tmp_path):
    state = run(tmp_path, max_train_steps=None, num_train_epochs=2, gradient_accumulation_steps=2)
    assert int(state.step) == 2 * EXAMPLES // (8 * 2)


# The step


def recorded_program(monkeypatch) -> list:
    """Fills with the program that the loop compiles."""
    programs, compile_step = [], loop._compile

    def record(*args):
        programs.append(compile_step(*args))
        return programs[-1]

    monkeypatch.setattr(loop, "_compile", record)
    return programs


def test_the_loop_does_what_the_steps_do(tmp_path):
    """Against the same steps, not compiled as one program, one after the other."""
    loader, state, step = Loader(16), init_state(), jax.jit(make_train_step(2))
    for _ in range(10):
        state, _ = step(state, frozen_trees(), next(loader))
    trained = run(tmp_path, gradient_accumulation_steps=2, logging_steps=10)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), trained.params, state.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), trained.ema, state.ema)
    assert int(trained.step) == 10
    assert metrics_of(tmp_path)[0]["learning_rate"] == pytest.approx(0.01)


def test_frozen_trees_are_arguments(tmp_path, monkeypatch):
    programs = recorded_program(monkeypatch)
    frozen = frozen_trees() | {"large": jnp.ones((300, 300))}

    def train_step(state, frozen, batch):
        state, metrics = make_train_step()(state, frozen, batch)
        return state, metrics | {"large": jnp.sum(frozen["large"])}

    run(tmp_path, frozen=frozen, train_step=train_step)
    (program,) = programs
    assert re.search(r"f32\[300,300\]\S* parameter\(", program.as_text())
    assert not re.search(r"f32\[300,300\]\S* constant\(", program.as_text())
    batch = sharding.to_global(sharding.make_mesh(), next(Loader(8)))
    _, metrics = program(init_state_on_mesh(), frozen, batch)
    _, others = program(init_state_on_mesh(), frozen | {"large": jnp.zeros((300, 300)), "scale": jnp.float32(2)}, batch)
    assert (metrics["large"], others["large"]) == (300 * 300, 0)
    np.testing.assert_allclose(others["loss"], 2 * metrics["loss"], rtol=1e-6)


def init_state_on_mesh():
    return own_buffers(sharding.put(sharding.make_mesh(), init_state()), {})


class Moving:
    """A teacher that is another one after every third step, and notes which steps asked for it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = False
        self.teachers = [
            sharding.put(sharding.make_mesh(), {**frozen_trees(), "scale": jnp.float32(n)}) for n in range(4)
        ]

    def at(self, step: int) -> dict:
        self.asked.append(step)
        return self.teachers[step // 3]

    def close(self) -> None:
        self.closed = True


def test_frozen_trees_may_change_from_step_to_step(tmp_path, monkeypatch):
    """One program for all of them, which the loop asks for by the number of steps before; a resumed run as well."""
    programs, moving = recorded_program(monkeypatch), Moving()
    trained = run(tmp_path / "whole", frozen=moving)
    assert moving.asked == [0, 0, *range(10)]  # the first two are of the compilation, and of what state may not share
    assert len(programs) == 1
    assert moving.closed
    loader, state, step = Loader(8), init_state(), jax.jit(make_train_step())
    for i in range(10):
        state, _ = step(state, moving.teachers[i // 3], next(loader))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), trained.params, state.params)
    shutil.rmtree(tmp_path / "whole" / "checkpoint-10")
    resumed = Moving()
    again = run(tmp_path / "whole", frozen=resumed, resume_from_checkpoint="checkpoint-8")
    assert min(resumed.asked) == 8
    assert fingerprint(again) == fingerprint(trained)


def test_a_record_is_written_every_so_often_and_before_the_checkpoint(tmp_path):
    written = []

    def write(state, step):
        assert int(state.step) == step
        written.append((step, list_checkpoints(tmp_path)))

    run(tmp_path, record=loop.Recorder(write, 2), checkpointing_steps=4)
    assert [step for step, _ in written] == [2, 4, 6, 8, 10]
    assert 4 not in written[1][1]


def test_the_state_is_donated_and_nothing_else(tmp_path, monkeypatch):
    programs = recorded_program(monkeypatch)
    frozen, state = frozen_trees(), init_state()
    # The student starts as the very arrays of its teacher, as the average does of the student's.
    frozen["student"] = state.params
    before = jax.tree.map(np.array, frozen)
    trained = run(tmp_path, state=state, frozen=frozen)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert not np.allclose(trained.params["first"]["kernel"], trained.ema["first"]["kernel"])
    assert state.opt_state[0].mu["first"]["kernel"].is_deleted()
    (program,) = programs
    aliases = program.as_text().partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    assert aliases.count("-alias)") == len(jax.tree.leaves(state))


def test_steps_are_compiled_once(tmp_path):
    traced = []

    def train_step(state, frozen, batch):
        traced.append(1)
        return make_train_step()(state, frozen, batch)

    run(tmp_path, train_step=train_step)
    assert len(traced) == 1


def test_steps_are_traced_on_their_mesh(tmp_path):
    """Or a kernel that XLA cannot split would not know among which devices to split itself."""
    traced = []

    def train_step(state, frozen, batch):
        traced.append(jax.sharding.get_abstract_mesh().axis_names)
        return make_train_step()(state, frozen, batch)

    run(tmp_path, train_step=train_step)
    assert traced == [("data", "fsdp")]
    assert jax.sharding.get_abstract_mesh().empty


def lowered_product() -> jax.stages.Lowered:
    return jax.jit(lambda x, y: jnp.tanh(x @ y)).lower(jnp.ones((256, 256)), jnp.ones((256, 256)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for CPUs")
def test_steps_are_compiled_with_the_options_for_cpus(tmp_path, monkeypatch):
    programs = recorded_program(monkeypatch)

    def train_step(state, frozen, batch):
        state, metrics = make_train_step()(state, frozen, batch)
        return state, metrics | {"product": jnp.sum(frozen["large"] @ frozen["large"])}

    run(tmp_path, frozen=frozen_trees() | {"large": jnp.ones((300, 300))}, train_step=train_step)
    # If this JAX does it no more by itself, the options have had their day.
    assert "ynn_fusion" in str(lowered_product().compile().as_text())
    assert "ynn_fusion" not in programs[0].as_text()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_options_that_jax_does_not_know_are_left_out(monkeypatch, platform):
    monkeypatch.setattr(loop, "CPU_OPTIONS", {"xla_cpu_of_yesterday": True})
    program = loop.compile_for(platform, lowered_product())
    np.testing.assert_allclose(program(jnp.ones((256, 256)), jnp.ones((256, 256))), jnp.ones((256, 256)))


def test_validation(tmp_path):
    pictures = []

    def validate(state, step):
        assert int(state.step) == step
        pictures.append(step)
        time.sleep(0.2)
        return {"a house": np.full((2, 2, 3), step, np.uint8)}

    # Once, where a due validation is the last.
    flags = {"validate": validate, "validation_steps": 5, "checkpointing_steps": 0, "logging_steps": 10}
    run(tmp_path, validate_at_start=True, **flags)
    assert pictures == [0, 5, 10]
    names = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert names == ["a house-0.png", "a house-10.png", "a house-5.png"]
    # Its time is not that of the steps.
    assert metrics_of(tmp_path)[0]["seconds_per_step"] < 0.02


def test_steps_that_are_not_finite_end_the_run(tmp_path):
    def train_step(state, frozen, batch):
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {"loss": jnp.nan * state.step, "skipped_in_a_row": jnp.maximum(state.step - 5, 0)}

    with pytest.raises(FloatingPointError, match=r"last 25 steps up to 30 .*lower --learning_rate.*--mixed_precision"):
        run(tmp_path, train_step=train_step, logging_steps=6, max_train_steps=100, checkpointing_steps=20)
    assert list_checkpoints(tmp_path) == [20]


def test_debug_says_where_a_nan_comes_from(tmp_path):
    def train_step(state, frozen, batch):
        state, metrics = make_train_step()(state, frozen, batch)
        return state, metrics | {"x": jnp.log(3.0 - state.step)}

    with jax.debug_nans(False):
        pass  # after which JAX overlooks a setting for all threads
    with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in log"):
        run(tmp_path, train_step=train_step, debug=True)
    assert not jax.config.jax_debug_nans


# Going on


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(tmp_path, accumulation):
    flags = {"gradient_accumulation_steps": accumulation, "train_batch_size": 6}
    whole = run(tmp_path / "whole", **flags)
    run(tmp_path / "parts", max_train_steps=5, **flags)
    assert list_checkpoints(tmp_path / "parts") == [4, 5]
    resumed = run(tmp_path / "parts", resume_from_checkpoint="latest", **flags)
    assert fingerprint(resumed) == fingerprint(whole)
    assert list_checkpoints(tmp_path / "parts") == [4, 5, 8, 10]


@pytest.mark.parametrize(
    "kills",
    [
        [{"kill_in_save": 8}],
        pytest.param([{"kill_in_save": 4}, {"kill_at_batch": 10}, {"kill_in_save": 10}], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bit_for_bit_like_one_that_never_stopped(tmp_path, kills):
    """Killed between checkpoints, and while one is being written, with 8 devices, fsdp and accumulation."""
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "fsdp": 2, "resume_from_checkpoint": "latest"}
    parts = tmp_path / "parts"
    for kill in kills:
        assert child(parts, **flags, **kill).returncode == -signal.SIGKILL
    left = list_checkpoints(parts)
    assert left == ([4] if kills[-1] == {"kill_in_save": 8} else [4, 8])
    (unfinished,) = parts.glob("*.orbax-checkpoint-tmp")
    last, whole = child(parts, **flags), child(tmp_path / "whole", **flags)
    assert last.returncode == whole.returncode == 0, last.stderr + whole.stderr
    assert f"resuming from {parts / f'checkpoint-{left[-1]}'}" in last.stderr
    assert last.stdout == whole.stdout
    assert not unfinished.exists()


@pytest.mark.parametrize("fsdp", ["2", pytest.param("148", marks=pytest.mark.slow)])
def test_devices_do_not_matter(tmp_path, fsdp):
    """One device against eight, with the parameters split in every way; and from one to eight in mid-course.

    The sums are taken in other orders, which is what the tolerance is for.
    """
    flags = {"state": init_state(8192), "train_batch_size": 16, "gradient_accumulation_steps": 2}
    run(tmp_path / "one", max_train_steps=6, **flags)
    whole = run(tmp_path / "one", resume_from_checkpoint="latest", **flags | {"state": init_state(8192)})
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path), *fsdp]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in (*fsdp, "resumed"):
        found = np.load(tmp_path / f"{name}.npz").values()
        for leaf, expected in zip(found, jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def children(folder: Path, **flags) -> list[tuple[int, str, str]]:
    """Trains in two processes with two devices each: their statuses, the bits of their states, and what they say."""
    started = start_all([str(SCRIPT), str(folder), json.dumps(flags)], 2, JAX_NUM_CPU_DEVICES="2")
    texts = [process.communicate(timeout=120) for process in started]
    return [(of.returncode, out.strip().rpartition("\n")[2], err) for of, (out, err) in zip(started, texts)]


@pytest.mark.slow
def test_several_processes(tmp_path):
    """Ctrl-C in one of them ends both after the same step, and two of them go on, or one."""
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "fsdp": 2, "resume_from_checkpoint": "latest"}
    flags |= {"max_train_steps": 60, "checkpointing_steps": 40}
    parts = tmp_path / "parts"
    for status, _, err in children(parts, **flags, end_at_batch=6):
        assert status == 143, err
    (step,) = list_checkpoints(parts)
    assert 5 <= step < 40
    shutil.copytree(parts, tmp_path / "alone")
    (first, second), (whole, _) = children(parts, **flags), children(tmp_path / "whole", **flags)
    alone = child(tmp_path / "alone", devices=4, **flags)
    assert first[0] == second[0] == whole[0] == alone.returncode == 0, first[2] + second[2] + alone.stderr
    assert first[1] == second[1] == whole[1]
    # One process takes its sums in another order than two.
    numbers = [np.frombuffer(bytes.fromhex(bits), np.float32) for bits in (whole[1], alone.stdout.strip())]
    np.testing.assert_allclose(*numbers, rtol=1e-3, atol=1e-3)
    assert "step 60/60" in first[2]
    assert not second[2]


@pytest.mark.slow
def test_the_global_batch_is_kept_on_other_devices(tmp_path):
    """Four devices, then one, then two: the same number of examples per step, and the same examples."""
    flags = {"train_batch_size": 2, "checkpointing_steps": 4, "logging_steps": 1, "resume_from_checkpoint": "latest"}
    ends = [
        child(tmp_path, devices=devices, max_train_steps=steps, **flags) for devices, steps in ((4, 4), (1, 8), (2, 12))
    ]
    assert [end.returncode for end in ends] == [0, 0, 0], ends[-1].stderr
    assert "instead of" not in ends[0].stderr
    message = "--gradient_accumulation_steps is {} instead of 1: with {} devices this keeps the global batch of 8"
    assert message.format(4, 1) in ends[1].stderr
    assert message.format(2, 2) in ends[2].stderr
    position = json.loads((tmp_path / "checkpoint-12" / "data" / "metadata").read_text())
    assert position == {"of_processes": [{"position": 12 * 8}]}


def test_a_batch_that_does_not_come_out_even_is_refused(tmp_path):
    run(tmp_path, max_train_steps=5, train_batch_size=6)
    with pytest.raises(CheckpointError, match=r"checkpoint-5 was made with a global batch of 6, but this run has 4: "):
        run(tmp_path, max_train_steps=10, train_batch_size=4, resume_from_checkpoint="latest")


def test_latest_starts_afresh_where_there_is_none(tmp_path, capsys):
    run(tmp_path, resume_from_checkpoint="latest")
    assert f"{tmp_path} has no checkpoint: starting from scratch" in capsys.readouterr().err


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    whole, exported, loader = run(tmp_path), [], Loader(8)
    again = run(tmp_path, resume_from_checkpoint="latest", loader=loader, export=lambda *given: exported.append(given))
    assert fingerprint(again) == fingerprint(whole)
    assert loader.given == 0
    assert len(exported) == 1


def test_the_model_is_exported_when_all_is_on_the_disk(tmp_path):
    seen = []
    state = run(tmp_path, export=lambda state, folder: seen.append((state, folder, list_checkpoints(folder))))
    assert seen == [(state, tmp_path, [4, 8, 10])]


def test_no_checkpoints_if_so_wanted(tmp_path):
    run(tmp_path, checkpointing_steps=0)
    assert list_checkpoints(tmp_path) == []


# Refused before long work


def test_settings_must_be_those_of_the_checkpoint(tmp_path):
    run(tmp_path, max_train_steps=5)
    with pytest.raises(CheckpointError, match=r"checkpoint-5 was made with learning_rate = 0.01, but this run has 0.1"):
        run(tmp_path, resume_from_checkpoint="latest", run_config={"learning_rate": 0.1})


def test_a_batch_that_cannot_be_shared_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--fsdp 2 does not divide the 1 devices"):
        run(tmp_path, fsdp=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", 0),
        ("max_train_steps", 0),
        ("fsdp", 0),
        ("validation_steps", -1),
        ("logging_steps", 0),
        ("checkpointing_steps", -1),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value} is not possible: it must be at least {value + 1}"):
        LoopFlags(**{flag: value}).check()


def test_flags_that_jax_has_no_use_for(tmp_path, capsys):
    starting.start(flags_of(tmp_path, local_rank=0))
    assert "--local_rank has no effect" in capsys.readouterr().err


def test_tf32(tmp_path):
    before = jax.config.jax_default_matmul_precision
    try:
        starting.start(flags_of(tmp_path, allow_tf32=True))
        assert jax.config.jax_default_matmul_precision == "tensorfloat32"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


# Flags, and who shares them


@pytest.mark.parametrize(
    ("flag", "value"), [("seed", 1), ("gradient_accumulation_steps", 2), ("train_batch_size", 16), ("allow_tf32", True)]
)
def test_a_run_is_resumed_with_the_flags_that_it_was_started_with(tmp_path, flag, value):
    run(tmp_path, max_train_steps=5)
    with pytest.raises(CheckpointError, match=r"checkpoint-5 was made with .*, but this run has"):
        run(tmp_path, max_train_steps=10, resume_from_checkpoint="latest", **{flag: value})


def test_flags_that_say_so_may_change_when_a_run_is_resumed(tmp_path):
    run(tmp_path / "old", max_train_steps=5)
    (tmp_path / "old").rename(tmp_path / "new")
    changed = {"logging_steps": 3, "checkpointing_steps": 2, "checkpoints_total_limit": 9, "validation_steps": 7}
    state = run(tmp_path / "new", max_train_steps=6, resume_from_checkpoint="latest", **changed)
    assert int(state.step) == 6


def test_a_flag_that_is_younger_than_a_checkpoint_is_not_compared(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Younger(LoopFlags):
        prediction_type: str | None = None

    run(tmp_path, max_train_steps=5)
    given = {"output_dir": str(tmp_path), "train_batch_size": 8, "resume_from_checkpoint": "latest"}
    starting.start(Younger(prediction_type="epsilon", **given), {"learning_rate": 1e-2})


def test_damage_sends_a_run_back_to_the_checkpoint_before(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", max_train_steps=8)
    for path in (tmp_path / "parts" / "checkpoint-8" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7] + b"damaged")
    resumed = run(tmp_path / "parts", resume_from_checkpoint="latest")
    said = capsys.readouterr().err
    assert f"{tmp_path / 'parts' / 'checkpoint-8'} is damaged and was set aside: " in said
    assert f"resuming from {tmp_path / 'parts' / 'checkpoint-4'}" in said
    assert fingerprint(resumed) == fingerprint(whole)
    assert list_checkpoints(tmp_path / "parts") == [4, 8, 10]
    for path in (tmp_path / "parts" / "checkpoint-10" / "state").rglob("d/*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-10 is damaged .*is missing.*latest resumes from the newest"):
        run(tmp_path / "parts", resume_from_checkpoint="checkpoint-10")
