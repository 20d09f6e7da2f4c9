"""One device and eight give the same, and what travels between eight is what should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]

SCRIPT = """
import re
import jax, jax.numpy as jnp, numpy as np
from published import TINY_SD15
from codi_jax.models import sharding
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

assert jax.device_count() == 8
sharding.MIN_SHARDED_SIZE = 64  # no layer is too small to be split
module = UNet2DCondition(UNetConfig.from_dict(TINY_SD15))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f4") * 0.1, module.abstract_params())
# 18 x 18: enough keys for the chunked attention, and odd halves. No weight has an axis of 40.
B = 40
batch = (rng.standard_normal((B, 18, 18, 4)), np.arange(B) * 20.0, rng.standard_normal((B, 5, 24)))
batch = tuple(x.astype("f4") for x in batch)

def step(params, sample, t, text):
    def loss(params):
        prediction, _ = module.apply({"params": params}, sample, t, text)
        return jnp.mean(prediction**2), prediction
    return jax.value_and_grad(loss, has_aux=True)(params)

one = jax.jit(step)(params, *batch)
mesh = sharding.make_mesh(4)
split, spread = sharding.put(mesh, params), jax.device_put(batch, sharding.batch_sharding(mesh))
out = ((None, sharding.batch_sharding(mesh)), sharding.shardings(mesh, params))
with sharding.context_of(split):
    program = jax.jit(step, out_shardings=out).lower(split, *spread).compile()
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(program(split, *spread)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())

travels = re.compile(r" (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\\(")
traveling = [line for line in program.as_text().splitlines() if travels.search(line)]
assert any("all-gather" in line for line in traveling)
# Weights and their gradients. A feature map has 40 samples, or the 5 of a device, and a side of 18 or 9.
of_samples = [line for line in traveling if re.search(r"\\[(40|5),(18|9|324|81),", line)]
assert not of_samples, of_samples
"""


KERNEL = """
import jax, jax.numpy as jnp, numpy as np
from codi_jax.models import sharding
from codi_jax.models.kernels import attention

assert jax.device_count() == 8
seen = []

def kernel(query, key, value, is_causal):
    seen.append(query.shape[0])
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

attention._pallas_attention = kernel
mesh = sharding.make_mesh(2)
rng = np.random.default_rng(0)

def loss(*qkv):
    return jnp.sum(attention.dot_product_attention(*qkv, implementation="pallas") ** 2)

for batch, own in ((16, 2), (3, 3)):
    qkv = [rng.standard_normal((batch, 6, 2, 4)).astype("f4") for _ in range(3)]
    place = sharding.batch_sharding(mesh) if own == 2 else sharding.replicated(mesh)
    spread = jax.device_put(qkv, place)
    seen.clear()
    with sharding.context_of(spread):
        eight = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*spread)
    assert set(seen) == {own}, seen
    seen.clear()
    one = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv)
    assert set(seen) == {batch}, seen
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
"""


def run_on_eight(script: str) -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_one_device_and_eight_agree_and_activations_stay_where_they_are() -> None:
    """Without a word to the compiler it gathers activations of the whole batch, where weights are split."""
    run_on_eight(SCRIPT)


def test_a_kernel_that_xla_cannot_split_runs_on_every_devices_part() -> None:
    run_on_eight(KERNEL)
