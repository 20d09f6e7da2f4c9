"""Models of every family, made and loaded once for all tests of this folder."""

import functools
from typing import Any

import pytest
from pairs import Pair, Pairs, as_in_folder, load_pair

from codi_jax.pipeline.programs import Programs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    @functools.cache
    def load(family: str) -> Pair:
        return load_pair(family, tmp_path_factory.mktemp(family))

    return lambda family: as_in_folder(load(family))


@pytest.fixture(autouse=True)
def _mode_of_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """To inpaint, diffusers samples the latents of the masked image; we take their mode."""
    distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mean)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("this should have been refused before it is compiled")

    monkeypatch.setattr(Programs, "run", fail)
