import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from codi_jax.models import sharding

ON_EIGHT_DEVICES = """
import json, jax, jax.numpy as jnp, numpy as np
from codi_jax.models import sharding
found = {}
for fsdp in (1, 2, 8):
    mesh = sharding.make_mesh(fsdp)
    tree = {"large": np.arange(2**17, dtype=np.float32).reshape(8, -1), "small": np.ones(64, np.float32)}
    put = {name: sharding.place(mesh)((name,), array) for name, array in tree.items()}
    assert jax.tree.map(lambda x: x.sharding, put) == sharding.shardings(mesh, jax.eval_shape(lambda: tree))
    batch = sharding.to_global(mesh, {"x": np.arange(16)})["x"]
    found[fsdp] = {
        "mesh": dict(mesh.shape),
        "large": put["large"].addressable_data(0).shape,
        "small": put["small"].addressable_data(0).shape,
        "equal": bool(all(np.array_equal(put[name], tree[name]) for name in tree)),
        "batch": [shard.data.tolist() for shard in batch.addressable_shards],
    }
    try:
        sharding.to_global(mesh, {"x": np.zeros((12, 2))})
    except ValueError as error:
        found[fsdp]["error"] = str(error)
try:
    sharding.make_mesh(3)
except ValueError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((320, 1280), 4, P(None, "fsdp")),
        ((1280, 320), 4, P("fsdp")),
        ((3, 3, 320, 640), 8, P(None, None, None, "fsdp")),
        ((3, 3, 640, 640), 8, P(None, None, None, "fsdp")),  # of two equal axes the last
        ((1282, 320), 4, P(None, "fsdp")),  # the largest does not divide
        ((321, 1283), 4, P()),  # none does
        ((1280, 1280), 1, P()),
        ((255, 256), 4, P()),  # one row too small
        ((256, 256), 4, P(None, "fsdp")),
        ((), 4, P()),
    ],
)
def test_the_rule_of_shapes(shape, fsdp, expected):
    assert sharding.partition_spec(shape, fsdp) == expected


def test_whatever_has_the_shape_of_a_parameter_lies_where_it_lies():
    mesh = sharding.make_mesh()
    tree = {"params": jax.ShapeDtypeStruct((512, 512), jnp.float32), "moments": jnp.zeros((512, 512), jnp.int8)}
    found = sharding.shardings(mesh, tree | {"key": jax.random.key(0), "step": 3})
    assert found["params"] == found["moments"]
    assert found["key"] == found["step"] == NamedSharding(mesh, P())


def test_eight_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for fsdp in (1, 2, 8):
        of = found[str(fsdp)]
        assert of["mesh"] == {"data": 8 // fsdp, "fsdp": fsdp}
        assert of["large"] == [8, 2**14 // fsdp]
        assert of["small"] == [64]
        assert of["equal"]
        # Every device has its own share, in order.
        assert of["batch"] == np.arange(16).reshape(8, 2).tolist()
        assert "batch of 12" in of["error"]
        assert "--train_batch_size" in of["error"]
    assert found["error"] == "--fsdp 3 does not divide the 8 devices there are: choose from 1, 2, 4, 8."
