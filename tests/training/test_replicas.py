"""Copies of a state that should be equal, and a device whose copy is not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_in

from codi_jax.training import loop
from codi_jax.training.replicas import differing

# A state on four devices, of which the one with the number of the second argument gets one bit wrong.
FOUR_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from codi_jax.models import sharding
from codi_jax.training.replicas import check_replicas

fsdp, wrong, leaf_name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
mesh = sharding.make_mesh(fsdp)
rng = np.random.default_rng(0)
state = {
    "large": rng.standard_normal((256, 512), np.float32), "half": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
    "codes": rng.integers(0, 255, 9, np.uint8), "step": np.int32(3), "flag": np.array([True, False]),
    "key": jax.random.key(5),
}
state = sharding.put(mesh, state)
check_replicas(mesh, state, 7)
leaf = state[leaf_name]
parts = []
for index, device in enumerate(mesh.devices.flat):
    (part,) = [np.array(shard.data) for shard in leaf.addressable_shards if shard.device == device]
    if index == wrong:
        flat = part.reshape(-1)
        if leaf_name == "large":
            flat[[10, 11]] = flat[[11, 10]]  # the same numbers in another order
        else:
            flat.view(np.uint8)[-1] ^= 1
    parts.append(jax.device_put(part, device))
state[leaf_name] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
try:
    check_replicas(mesh, state, 8)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("fsdp", "wrong", "leaf", "named"),
    [
        (1, 2, "large", ["2"]),
        (1, 0, "half", ["0"]),
        (1, 3, "codes", ["3"]),
        (1, 1, "step", ["1"]),
        (1, 2, "flag", ["2"]),
        # Two copies of two parts: nobody can say which of the two copies is right.
        (2, 3, "large", ["1", "3"]),
    ],
)
def test_a_device_that_differs_is_named(fsdp: int, wrong: int, leaf: str, named: list[str]):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-c", FOUR_DEVICES, str(fsdp), str(wrong), leaf]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    devices = ", ".join(f"cpu:{number} of process 0" for number in named)
    assert done.stdout.startswith(f"after step 8 the state on {devices} differs from its copies"), done.stdout


def test_the_majority_is_right():
    same = np.full((4, 2), 5, np.uint32)
    assert differing(same) == []
    one = same.copy()
    one[2, 1] = 6
    assert differing(one) == [(2, 1)]
    two = same.copy()
    two[[0, 1], 0] = 6
    assert differing(two) == [(copy, 0) for copy in range(4)]
    assert differing(np.array([[1, 2]], np.uint32)) == []


def test_when_they_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every few steps, and before a checkpoint is written, so that none holds what is wrong."""
    compared: list[int] = []
    monkeypatch.setattr(loop, "check_replicas", lambda mesh, state, step: compared.append(step))
    stand_in.run(tmp_path / "often", check_replicas=3, max_train_steps=8, checkpointing_steps=4)
    assert compared == [3, 4, 6, 8]
    compared.clear()
    stand_in.run(tmp_path / "never", max_train_steps=8, checkpointing_steps=4)
    assert compared == []
