import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from stand_in import run

from codi_jax.training import tracking
from codi_jax.training.tracking import Tracker, TrackingFlags

RED = np.full((4, 6, 3), (255, 0, 0), np.uint8)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list:
    """What TensorBoard's files say, as its own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_files(tmp_path):
    tracker = Tracker(TrackingFlags(report_to="none"), tmp_path, {})
    tracker.scalars({"loss": 0.5, "grad_norm": float("nan")}, 3)
    tracker.pictures({"a dog": RED, "edges/1": RED}, 3)
    assert read(tmp_path) == [{"step": 3, "loss": 0.5, "grad_norm": None}]  # on the disk before it is closed
    tracker.close()
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["a dog-3.png", "edges_1-3.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "validation" / "a dog-3.png")), RED)


def test_tensorboard(tmp_path):
    tracker = Tracker(TrackingFlags(), tmp_path, {})
    tracker.scalars({"loss": 0.5}, 3)
    tracker.pictures({"dog": RED}, 3)
    tracker.close()
    values = {value.tag: (event.step, value) for event in events(tmp_path / "logs") for value in event.summary.value}
    assert values["loss"][0] == values["dog"][0] == 3
    assert values["loss"][1].simple_value == 0.5
    assert (values["dog"][1].image.height, values["dog"][1].image.width) == (4, 6)
    assert read(tmp_path) == [{"step": 3, "loss": 0.5}]


def test_a_resumed_run_takes_back_what_was_reported_after_the_checkpoint(tmp_path):
    flags = TrackingFlags(logging_dir="events")
    tracker = Tracker(flags, tmp_path, {})
    for step in (1, 2, 3):
        tracker.scalars({"loss": step}, step)
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1}\n\x00\x00\n{"step": null}\n')  # of a disk that lost its power
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    tracker = Tracker(flags, tmp_path, {}, step=2)
    tracker.scalars({"loss": 30.0}, 3)
    tracker.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    # TensorBoard drops what an earlier file says from the step on with which a session starts.
    starts = [event.step for event in events(tmp_path / "events") if event.session_log.status == 1]
    assert starts == [3]


def test_a_run_that_starts_afresh_starts_its_files_afresh(tmp_path):
    for loss in (1.0, 2.0):
        tracker = Tracker(TrackingFlags(report_to="none"), tmp_path, {})
        tracker.scalars({"loss": loss}, 1)
        tracker.close()
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracker = Tracker(TrackingFlags(), tmp_path, {})
    tracker.scalars({"loss": 1.0}, 1)
    tracker.pictures({"dog": RED}, 1)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_wandb(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()
    wandb.init = lambda **given: logged.append(given) or run
    wandb.Image = lambda picture: ("image", picture.shape)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = TrackingFlags(report_to="wandb", tracker_project_name="codi", wandb_entity="me")
    tracker = Tracker(flags, tmp_path / "run", {"seed": 3})
    tracker.scalars({"loss": 1.0}, 2)
    tracker.pictures({"dog": RED}, 2)
    tracker.close()
    opened, *rest = logged
    assert opened["project"] == "codi"
    assert opened["entity"] == "me"
    assert opened["config"] == {"seed": 3}
    assert opened["id"] == "run"
    assert rest == [({"loss": 1.0}, 2), ({"dog": ("image", (4, 6, 3))}, 2), "finish"]


def test_wandb_that_is_not_there_is_said_at_once(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb needs the package wandb: pip install wandb"):
        TrackingFlags(report_to="wandb").check()


@pytest.mark.parametrize(("flag", "value"), [("logging_steps", 0), ("profile_steps", -1)])
def test_a_number_that_makes_no_sense_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}"):
        TrackingFlags(**{flag: value}).check()


def test_profiles(tmp_path):
    validate = lambda state, step: {}  # noqa: E731
    run(tmp_path / "a", profile_steps=2, profile_memory=True, checkpointing_steps=0)
    assert list((tmp_path / "a" / "logs").rglob("*.xplane.pb"))
    assert (tmp_path / "a" / "memory_initial.prof").stat().st_size > 0
    assert (tmp_path / "a" / "memory_final.prof").stat().st_size > 0
    run(tmp_path / "b", profile_validation=True, validate=validate, checkpointing_steps=0)
    assert list((tmp_path / "b" / "logs").rglob("*.xplane.pb"))
    # More than there are steps.
    run(tmp_path / "c", profile_steps=1000, checkpointing_steps=0)
    assert list((tmp_path / "c" / "logs").rglob("*.xplane.pb"))
