"""Which targets there are, and what is said where there is none."""

import importlib.util
import os
from pathlib import Path

import jax
import pytest

from codi_jax.planning.chips import GPUS, TPUS
from codi_jax.planning.targets import open_target


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target sets options of compilers, which later tests are not to see."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.parametrize("name", ["tpu", "v5e", "v5e:4", "v9:2x2", "h100:0", "h100:two", "gpu:2", "", "a100"])
def test_what_is_no_target(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"there is no target {name}: choose among cpu, .*h200:8, v5e:4x4"):
        open_target(name, tmp_path)


def test_a_node_has_eight_gpus(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no target h200:16: a node has at most 8"):
        open_target("h200:16", tmp_path)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("h100", "jax_cuda", r"jax\[cuda12\]"), ("v5p:2x2x2", "libtpu", r"jax\[tpu\]")],
)
def test_a_compiler_that_is_missing(name, package, install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module.startswith(package) else found(module, *rest)
    )
    with pytest.raises(ValueError, match=rf"{name} needs the compiler for .*: pip install \"{install}\""):
        open_target(name, tmp_path)


def test_no_gpu_here(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no GPU here .*: plan for h100 or h200"):
        open_target("gpu", tmp_path)


def test_this_cpu(tmp_path: Path):
    target = open_target("cpu", tmp_path)
    assert (target.platform, len(target.devices)) == ("cpu", 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert target.chip.memory == memory
    assert 1e9 < target.chip.flops < 1e14
    assert 1e8 < target.chip.bandwidth < 1e13


def test_peaks_are_those_of_the_data_sheets():
    """In the units of the makers: TFLOP/s, GB and GB/s."""
    assert {name: (chip.flops / 1e12, chip.memory / 2**30) for name, chip in TPUS.items()} == {
        "v4": (275, 32), "v5e": (197, 16), "v5p": (459, 95), "v6e": (918, 32)
    }  # fmt: skip
    assert {name: (chip.flops / 1e12, round(chip.memory / 1e9)) for name, chip in GPUS.items()} == {
        "h100": (989, 85), "h200": (989, 151)
    }  # fmt: skip
