"""A plan of sampling is of the program that sampling runs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from folders import SIZE, refuse_weights, saved_pipeline

from codi_jax.pipeline import planned
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.programs import Programs
from codi_jax.planning.chips import Chip
from codi_jax.planning.targets import Target

CHIP = Chip("Chip", memory=10**9, flops=10**12, flops_float32=10**11, bandwidth=10**10, network=10**9)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_memory_is_that_of_the_program(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An editor with three branches, batches of two: to the byte, and no weights are read."""
    folder = saved_pipeline("instruct-pix2pix", scratch)
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    call: dict[str, Any] = {"prompt": ["a", "b"], "image": picture, "steps": 2, "sampler": "ddim"}
    model = Model.from_pretrained(folder)
    model(**call)
    (compiled,) = model.programs._compiled.values()
    memory = compiled.memory_analysis()

    refuse_weights(monkeypatch)
    target = Target("cpu", CHIP, jax.devices(), tmp_path)
    plan = planned.plan_sampling(Model.open(folder), call, target, "title")
    assert plan.program.temporary == memory.temp_size_in_bytes + memory.output_size_in_bytes
    of_weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert {name: plan.kinds[name] for name in ("unet", "vae", "text_encoder")} == {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(model.params[name])) for name in model.params
    }
    assert of_weights < plan.program.given < 1.1 * of_weights
    assert (plan.samples, plan.batch, plan.devices) == (2, 2, 1)
    assert plan.program.flops > 2 * 3 * 2 * 10**6  # steps, branches, images


def test_sampling_is_planned_as_it_is_called(scratch: Path, monkeypatch: pytest.MonkeyPatch):
    """The same program, and arrays of the same shapes, with a ControlNet and a negative prompt."""
    call: dict[str, Any] = {
        "prompt": "a", "control_image": np.zeros((SIZE, SIZE, 3), np.uint8), "negative_prompt": "b", "steps": 3,
        "guidance_scale": 2.0,
    }  # fmt: skip
    folder = saved_pipeline("controlnet", scratch)
    ours = planned._Recorder()
    model = Model.open(folder)
    abstract = {name: network.abstract_params(network.dtype) for name, network in model.networks.by_name().items()}
    model.replace(params=abstract, programs=ours)(**call)
    run: list[Any] = []

    def take(self: Programs, program: Any, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        run.append((program, arguments))
        return np.zeros((1, 1, 1, 3), np.uint8), np.ones(1, bool)

    monkeypatch.setattr(Programs, "run", take)
    Model.from_pretrained(folder)(**call)
    (program, arguments), (planned_program, planned_arguments) = run[0], ours.recorded
    assert program == planned_program

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(planned_arguments) == shapes(arguments)
