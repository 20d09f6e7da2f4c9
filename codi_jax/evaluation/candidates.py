"""The models to compare, as given by ``--models`` and related flags."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from codi_jax.diffusion.scheduler_config import SamplerName
from codi_jax.evaluation.arguments import Args


class Checkpoint(NamedTuple):
    """A model's location: its folder, and its ControlNet's, or ``None`` for the one in its folder, if any."""

    model: str
    controlnet: str | None


@dataclass(frozen=True)
class Candidate:
    """A model to compare, and how it is sampled.

    Attributes:
      name: the name in table and report.
      checkpoints: one, or one per seed.
      sampler: the sampler's name. Default: the folder's.
      guidance_scale: how strongly to follow the text.
      image_guidance_scale: how strongly to preserve the image.
      steps: the sampler's steps.
      gamma: randomness of the sampler tcd.
      training_steps: the training steps after which the model was exported; ``None`` for the finished model.
    """

    name: str
    checkpoints: tuple[Checkpoint, ...]
    sampler: SamplerName | None = None
    guidance_scale: float | int = 7.5
    image_guidance_scale: float | int = 1.5
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    gamma: float | int = 0.3
    training_steps: int | None = None


def read_candidates(args: Args) -> list[Candidate]:
    """The models that the flags name.

    Raises:
      ValueError: if a flag cannot be read, names a model twice, or names one that does not exist.
    """
    models = _read_models(args)
    samplers = _overrides("--samplers", args.samplers, models)
    scales = _numbers("--guidance_scales", args.guidance_scales, args.guidance_scale, models)
    image_scales = _numbers("--image_guidance_scales", args.image_guidance_scales, args.image_guidance_scale, models)
    gammas = _numbers("--gammas", args.gammas, args.gamma, models, most=1)
    found = []
    for entry, checkpoints in models.items():
        name, steps = _read_steps(entry, args)
        sampler = _sampler(samplers.get(entry))
        found.append(Candidate(name, checkpoints, sampler, scales[entry], image_scales[entry], steps, gammas[entry]))
    named = [(candidate.name, steps) for candidate in found for steps in candidate.steps]
    if twice := next((each for each in named if named.count(each) > 1), None):
        raise ValueError(f"--models names {twice[0]} with {twice[1]} steps twice: rename one of them.")
    earlier = [export for candidate in found for export in _exports(candidate, args.training_steps)]
    if args.training_steps and not earlier:
        raise ValueError(
            f"--training_steps: no model's folder has step-{args.training_steps[0]}: train it with --export_steps."
        )
    return [*earlier, *found]


def _read_models(args: Args) -> dict[str, tuple[Checkpoint, ...]]:
    """The entries of ``--models``: ``NAME`` or ``NAME@STEPS`` -> checkpoints."""
    models: dict[str, tuple[Checkpoint, ...]] = {}
    for text in args.models:
        name, equals, checkpoints = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--models {text}: write NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER.")
        if not name.isprintable():
            raise ValueError(f"--models {text!r}: the name must consist of printable characters.")
        if name in models:
            raise ValueError(f"--models names two models {name}: give each its own name.")
        models[name] = tuple(_read_checkpoint(text, checkpoint) for checkpoint in checkpoints.split(","))
        if len(models[name]) not in (1, len(args.seeds)):
            raise ValueError(
                f"--models {text}: {len(models[name])} folders for {len(args.seeds)} --seeds: give one, or as many."
            )
    if not models:
        raise ValueError("--models is empty: write NAME=FOLDER.")
    return models


def _read_steps(text: str, args: Args) -> tuple[str, tuple[int, ...]]:
    """``NAME@4,1`` -> name and steps; ``NAME`` alone has ``--steps``."""
    name, at, steps = text.partition("@")
    if not at:
        return name, args.steps
    if not name or not all(number.isdecimal() and int(number) > 0 for number in steps.split(",")):
        raise ValueError(f"--models {text}: write NAME@STEPS, such as base@4,1.")
    return name, tuple(map(int, steps.split(",")))


def _exports(model: Candidate, training_steps: Sequence[int]) -> list[Candidate]:
    """A model's exports during training, at those of the steps that its folders have."""
    found = []
    for steps in training_steps:
        checkpoints = tuple(
            Checkpoint(str(Path(folder).expanduser() / f"step-{steps}"), controlnet)
            for folder, controlnet in model.checkpoints
        )
        if all(Path(checkpoint.model).is_dir() for checkpoint in checkpoints):
            found.append(replace(model, checkpoints=checkpoints, training_steps=steps))
    return found


def _read_checkpoint(text: str, checkpoint: str) -> Checkpoint:
    folder, _, controlnet = checkpoint.partition("+")
    if not folder:
        raise ValueError(f"--models {text}: write NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER.")
    for each in filter(None, (folder, controlnet)):
        is_hub_id = each.count("/") == 1 and not each.startswith((".", "/", "~"))
        if not Path(each).expanduser().is_dir() and not is_hub_id:
            raise ValueError(f"--models {text}: there is no folder {each}.")
    return Checkpoint(folder, controlnet or None)


def _overrides(flag: str, texts: Sequence[str], names: Mapping[str, Any]) -> dict[str, str]:
    """Values by model. ``NAME`` means all models of that name, except those that ``NAME@STEPS`` sets separately."""
    for_family, for_entry = {}, {}
    for text in texts:
        name, colon, value = text.rpartition(":")
        if not colon or not value:
            raise ValueError(f"{flag} {text}: write NAME:VALUE.")
        meant = [each for each in names if each.partition("@")[0] == name]
        if name in names:
            for_entry[name] = value
        elif meant:
            for_family |= dict.fromkeys(meant, value)
        else:
            raise ValueError(f"{flag} {text}: --models does not name {name}, only {', '.join(names)}.")
    return for_family | for_entry


def _sampler(value: str | None) -> SamplerName | None:
    if value is not None and value not in get_args(SamplerName):
        raise ValueError(f"--samplers: there is no sampler {value}; there are {', '.join(get_args(SamplerName))}.")
    return value  # pyright: ignore[reportReturnType]


def _numbers(
    flag: str, texts: Sequence[str], default: float | int, names: Mapping[str, Any], most: float | int = math.inf
) -> dict[str, float | int]:
    numbers = dict.fromkeys(names, default)
    for name, value in _overrides(flag, texts, names).items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"{flag}: {value} is not a number.") from None
        if not (math.isfinite(numbers[name]) and 0 <= numbers[name] <= most):
            what = "a finite number of at least 0" if math.isinf(most) else f"from 0 to {most}"
            raise ValueError(f"{flag}: {value} is not possible: it must be {what}.")
    return numbers
