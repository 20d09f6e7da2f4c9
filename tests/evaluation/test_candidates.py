from pathlib import Path
from typing import Any

import pytest

from codi_jax.evaluation.arguments import Args
from codi_jax.evaluation.candidates import Candidate, Checkpoint, read_candidates


def test_what_a_model_was_in_training_is_found(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"{seed}" / "step-5").mkdir(parents=True)
    models = (f"new={tmp_path}/0,{tmp_path}/1", f"old={tmp_path}/0/step-5")
    found = read_candidates(Args(models=models, training_steps=(5, 9), seeds=(0, 1)))
    assert [(model.name, model.training_steps) for model in found] == [("new", 5), ("new", None), ("old", None)]
    assert found[0].checkpoints == ((f"{tmp_path}/0/step-5", None), (f"{tmp_path}/1/step-5", None))
    with pytest.raises(ValueError, match="no model's folder has step-9: train it with --export_steps"):
        read_candidates(Args(models=models, training_steps=(9,), seeds=(0, 1)))


def test_models_are_read() -> None:
    models = ("a=x/y+z/w", "b=x/y,x/z,x/w+y/z")
    scales: dict[str, Any] = {"guidance_scale": 4.0, "guidance_scales": ("b:2.5",), "image_guidance_scales": ("a:1",)}
    args = Args(models=models, samplers=("a:lcm",), gammas=("a:0",), **scales)
    assert read_candidates(args) == [
        Candidate("a", (Checkpoint("x/y", "z/w"),), "lcm", 4, 1.0, gamma=0.0),
        Candidate(
            "b", (Checkpoint("x/y", None), Checkpoint("x/z", None), Checkpoint("x/w", "y/z")), None, 2.5, 1.5, gamma=0.3
        ),
    ]


def test_models_have_steps_of_their_own() -> None:
    """And may share a name, which makes them one curve, and what is said of the name alone is meant for all of it."""
    models = ("base@50=x/y", "base@4,1=x/z", "other=x/w")
    args = Args(
        models=models, steps=(2, 8), guidance_scales=("base@4,1:1", "base:3"), image_guidance_scales=("base:2",)
    )
    read = read_candidates(args)
    assert [(model.name, model.checkpoints[0].model, model.steps) for model in read] == [
        ("base", "x/y", (50,)),
        ("base", "x/z", (4, 1)),
        ("other", "x/w", (2, 8)),
    ]
    scales = [(model.guidance_scale, model.image_guidance_scale) for model in read]
    assert scales == [(3.0, 2.0), (1.0, 2.0), (7.5, 1.5)]
