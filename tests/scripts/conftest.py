from typing import Any

import pytest
from folders import SIZE, make_pipeline
from picture_folders import write_folder
from script_runs import PICTURES, Inputs

from codi_jax.pipeline.model import Programs
from codi_jax.training import loop


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    make_pipeline("text-to-image", folder).save_pretrained(folder / "model")
    data = write_folder(folder / "data", PICTURES, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    return Inputs(folder / "model", data)


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a training step nor the program that makes pictures."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was to be refused before anything is compiled")

    monkeypatch.setattr(loop, "_compile", refuse)
    monkeypatch.setattr(Programs, "run", refuse)
