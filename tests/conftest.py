"""Settings that every test runs under. Fixtures with models live beside the tests that use them.

The environment is set here, before JAX is imported, and not through `jax.config`: processes that a test starts
inherit it.
"""

import os
import random
import resource
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

MOST_MEMORY = 4 * 2**20  # KiB of a worker: two of them, and what tests start, have to fit in 16 GiB
CACHE = Path(__file__).resolve().parent.parent / ".cache"

ENVIRONMENT = {
    # One device unless asked: JAX_NUM_CPU_DEVICES=8 splits the CPU into eight for the sharding tests.
    "JAX_PLATFORMS": "cpu",
    # A forgotten axis is an error, not a silent outer product.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Programs of tests are small and run few times: it is compiling them that takes the time.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # Without optimizations, the older emitter takes half the time. Later versions have only the newer one.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    # Compiled programs outlive the run. With a bound on its size JAX locks the folder, which the parallel workers need.
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 1024**3),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # torch, the oracle: one thread in each worker, and sums in the same order on every machine.
    "OMP_NUM_THREADS": "1",
    # No test reaches the network or the user's own caches.
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(CACHE / "huggingface"),
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Global generators start every test in the same state, in whatever order and process it runs."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """A worker that has grown large lets go of its compiled programs, of which the disk keeps a copy."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MOST_MEMORY and (jax := sys.modules.get("jax")):
        jax.clear_caches()
