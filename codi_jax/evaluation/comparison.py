"""Compares models: what each generates for the same samples, and how it is measured."""

import functools
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from codi_jax.cli.messages import counted
from codi_jax.cli.progress import Progress, heartbeat
from codi_jax.diffusion.timesteps import default_sampler
from codi_jax.evaluation.arguments import SEED_STRIDE, Args
from codi_jax.evaluation.candidates import Candidate, Checkpoint, read_candidates
from codi_jax.evaluation.measures import Measures, build_measures
from codi_jax.evaluation.plots import check_plots
from codi_jax.evaluation.report import write_report
from codi_jax.evaluation.results import Example, Report, Result
from codi_jax.evaluation.samples import Data, Samples, open_samples
from codi_jax.evaluation.shards import files_of, shards_of
from codi_jax.io import processes
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.models import sharding
from codi_jax.pipeline.loading import resolve_dtype
from codi_jax.pipeline.model import Model

_FOLDER = "shards"
_SHOWN, _SECONDS = "shown", "seconds"  # beside the observations


@dataclass(frozen=True)
class Benchmark:
    """The data that all models are measured on.

    Attributes:
      data: the samples.
      measures: the metrics.
      shown: the numbers of the r samples whose images the report shows.
      identity: what else the observations depend on besides the model, by name.
    """

    data: Data
    measures: Measures
    shown: Int[np.ndarray, " r"]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Generated:
    """Images, and the seconds that each took without compilation."""

    pictures: UInt8[np.ndarray, "n h w 3"]
    seconds: float


def make_pictures(
    pipeline: Model,
    model: Candidate,
    samples: Samples,
    steps: int,
    first_seed: int,
    *,
    batch_size: int,
    size: tuple[int | None, int | None] = (None, None),
    advance: Callable[[int], None] = lambda count: None,
) -> Generated:
    """One image per sample.

    The last batch is padded with its last sample, so that all batches share one shape and one program.

    Args:
      pipeline: the model.
      model: how it is sampled.
      samples: its inputs.
      steps: the sampler's steps.
      first_seed: the seed of the first sample's noise; the next one's is one more.
      batch_size: images at a time.
      size: height and width. Default: the model's.
      advance: called with the number of images of each batch.
    """
    count = len(samples.prompts)
    made, seconds = [], 0.0
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        made.append(
            pipeline(
                [samples.prompts[row] for row in rows],
                None if samples.inputs is None else samples.inputs[rows],
                None if samples.conditions is None else samples.conditions[rows],
                steps=steps,
                guidance_scale=model.guidance_scale,
                image_guidance_scale=model.image_guidance_scale,
                sampler=model.sampler,
                gamma=model.gamma,
                height=size[0],
                width=size[1],
                seed=first_seed + start,
            )
        )
        seconds += pipeline.seconds
        advance(min(batch_size, count - start))
    pictures = np.concatenate(made)
    return Generated(pictures[:count], seconds / len(pictures))


def compare(args: Args, command: str) -> Report:
    """Compares the models and writes the report.

    Args:
      args: the user's arguments.
      command: the command line, which the report shows.

    Raises:
      ValueError: if the arguments contradict each other, the models or the data, also as `WeightsError` and
        `ConfigError`.
      OSError: if an image does not exist, or the output cannot be written.
      FloatingPointError: if a model produces NaN.
    """
    args.check()
    processes.initialize()
    candidates = read_candidates(args)
    check_plots()
    data = open_samples(args.data, args.resolution).evenly_spread(args.max_samples)
    probe = data.read([0])
    candidates = [_with_possible_steps(candidate, probe, args) for candidate in candidates]
    if not any(candidate.steps for candidate in candidates):
        raise ValueError("no model can be run with any of --steps: see the warnings above.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs(args.ccache)
    shown = np.linspace(0, data.count - 1, min(args.num_shown, data.count)).round().astype(int)
    measures = build_measures(args, data)
    benchmark = Benchmark(data, measures, shown, _identity(args, measures, shown))
    results = [result for each in candidates if each.steps for result in _evaluate(each, benchmark, args)]
    names = {candidate.name for candidate in candidates}
    report = Report(
        title=f"{len(names)} models on {args.data}" if len(names) > 1 else f"{candidates[0].name} on {args.data}",
        results=results,
        examples=_examples(benchmark, uses_conditions=any(_has_controlnet(each) for each in candidates)),
        facts=_facts(args, data.count),
        command=command,
    )
    if jax.process_index() == 0:
        write_report(args.output_dir, report)
    return report


def _has_controlnet(model: Candidate) -> bool:
    return any(Model.open(*checkpoint).networks.controlnet is not None for checkpoint in model.checkpoints)


def _load(checkpoint: Checkpoint, args: Args) -> Model:
    """The model, on all devices of this process."""
    dtype, place = resolve_dtype(args.dtype), sharding.place_here()
    return Model.from_pretrained(*checkpoint, dtype=dtype, attention=args.attention, place=place)


def _with_possible_steps(model: Candidate, samples: Samples, args: Args) -> Candidate:
    """The model with the steps that its sampler supports, after checking that it fits the data.

    Weights are not read: all models are checked before hours are spent on the first one.

    Raises:
      ValueError: if the model is for another task, or cannot make images of this size.
    """
    steps = model.steps
    height, width = _size(samples, args)
    for checkpoint in model.checkpoints:
        pipeline = Model.open(*checkpoint)
        _check_task(pipeline, model, samples, args.data)
        steps = _possible_steps(pipeline, model, steps)
        conditions = samples.conditions if pipeline.networks.controlnet is not None else None
        try:
            pipeline.check(
                samples.inputs,
                conditions,
                steps=next(iter(steps), 1),
                sampler=model.sampler,
                height=height,
                width=width,
            )
        except ValueError as error:
            raise ValueError(f"the model {model.name}: {error}") from error
    return replace(model, steps=steps)


def _possible_steps(pipeline: Model, model: Candidate, steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of steps that the sampler supports; a warning names the others."""
    possible = []
    for number in steps:
        try:
            pipeline.times(number, model.sampler)
            possible.append(number)
        except ValueError as error:
            warnings.warn(f"{model.name} is not run with {number} steps: {error}", stacklevel=2)
    return tuple(possible)


def _check_task(pipeline: Model, model: Candidate, samples: Samples, data: str) -> None:
    if (pipeline.task == "edit") != (samples.inputs is not None) or pipeline.task == "inpaint":
        raise ValueError(
            f"the model {model.name} is for the task {pipeline.task!r}, but {data} is for another: text-to-image "
            "models need rows with file_name and text, editors rows with input_image, edited_image and edit_prompt."
        )
    if pipeline.networks.controlnet is not None and samples.conditions is None:
        raise ValueError(f"the model {model.name} has a ControlNet, but {data} names no conditioning_image.")


def _evaluate(model: Candidate, benchmark: Benchmark, args: Args) -> list[Result]:
    """Evaluates one model with each number of steps, over all seeds."""
    values: dict[int, dict[str, list[float]]] = {}
    pictures: dict[int, np.ndarray] = {}
    sampler = model.sampler
    for checkpoint, seeds in _seeds_of(model, args.seeds):
        load = functools.cache(functools.partial(_load, checkpoint, args))
        sampler = model.sampler or default_sampler(Model.open(*checkpoint).schedule)
        for steps in model.steps:
            for seed in seeds:
                found = _observed(model, checkpoint, load, steps, seed, benchmark, args)
                with heartbeat(f"computing the metrics of {model.name}"):
                    measured = benchmark.measures.summarize(found)
                for key, value in {**measured, "seconds": float(found[_SECONDS].mean())}.items():
                    values.setdefault(steps, {}).setdefault(key, []).append(value)
                pictures.setdefault(steps, found[_SHOWN])
    return [
        Result(
            model.name,
            steps,
            str(sampler),
            float(model.guidance_scale),
            values[steps],
            pictures[steps],
            model.training_steps,
        )
        for steps in values
    ]


def _observed(
    model: Candidate,
    checkpoint: Checkpoint,
    load: Callable[[], Model],
    steps: int,
    seed: int,
    benchmark: Benchmark,
    args: Args,
) -> dict[str, np.ndarray]:
    """All observations of a model's images, those of an interrupted evaluation among them.

    Each process makes some of the shards, and all of them read all.
    """
    data = benchmark.data
    name = f"{model.name}-{steps}-{seed}"
    sampling = (model.sampler, model.guidance_scale, model.image_guidance_scale, model.gamma, steps, seed)
    identity = {**benchmark.identity, "files": [files_of(part) for part in checkpoint], "sampling": sampling}
    shards = shards_of(args.output_dir / _FOLDER, name, identity, data.count, args.shard_size)
    remedy = "give all the same command, and the same files in a folder that they share"
    processes.agree("models, data or flags", {f"what {name} depends on": shards.folder.name}, remedy)

    def make(numbers: range, advance: Callable[[int], None]) -> dict[str, np.ndarray]:
        pipeline, samples = load(), data.read(numbers)
        if pipeline.networks.controlnet is None:
            samples = replace(samples, conditions=None)  # it does not see them, and is not measured by them
        made = make_pictures(
            pipeline,
            model,
            samples,
            steps,
            seed * SEED_STRIDE + numbers.start,
            batch_size=_batch_size(args, data),
            size=_size(samples, args),
            advance=advance,
        )
        if args.save_images:
            shards.save_images(numbers, made.pictures, samples.prompts)
        shown = [number - numbers.start for number in benchmark.shown.tolist() if number in numbers]
        found = benchmark.measures.observe(made.pictures, samples)
        return {**found, _SHOWN: made.pictures[shown], _SECONDS: np.full(len(numbers), made.seconds)}

    own = shards.numbers(jax.process_index(), jax.process_count())
    with Progress(f"{model.name}, {counted(steps, 'step')}, seed {seed}", sum(map(len, own))) as progress:
        for numbers in own:
            shards.ensure(numbers, functools.partial(make, numbers, progress.advance), progress.advance)
    processes.wait_for_all(f"the images of {name}")
    return shards.read()


def _identity(args: Args, measures: Measures, shown: Int[np.ndarray, " r"]) -> dict[str, Any]:
    """What the observations of all models depend on."""
    networks = (args.inception_weights, args.fid_resizing, args.clip, args.dino, args.lpips_weights, args.lpips_heads)
    return {
        "data": (args.data, files_of(args.data), args.max_samples, args.resolution),
        "computation": (args.batch_size, args.dtype, args.attention, jax.devices()[0].platform),
        "measures": (sorted(measures.observers), networks, args.save_images, shown.tolist()),
        "version": processes.code_version(),
    }


def _batch_size(args: Args, data: Data) -> int:
    """Images at a time: as many as asked for, unless there are fewer, in equal parts for the devices."""
    devices = jax.local_device_count()
    return -(-min(args.batch_size, args.shard_size, data.count) // devices) * devices


def _size(samples: Samples, args: Args) -> tuple[int | None, int | None]:
    """Height and width of the images to make."""
    if samples.truth is None:
        return args.resolution, args.resolution
    return samples.truth.shape[1], samples.truth.shape[2]


def _seeds_of(model: Candidate, seeds: tuple[int, ...]) -> list[tuple[Checkpoint, tuple[int, ...]]]:
    """Which checkpoints generate with which seeds."""
    if len(model.checkpoints) == 1:
        return [(model.checkpoints[0], seeds)]
    return [(checkpoint, (seed,)) for checkpoint, seed in zip(model.checkpoints, seeds, strict=True)]


def _examples(benchmark: Benchmark, *, uses_conditions: bool) -> list[Example]:
    """The shown samples, with the conditions if a model sees them."""
    samples = benchmark.data.read(benchmark.shown.tolist())
    given = samples.inputs if samples.inputs is not None else samples.conditions if uses_conditions else None
    return [
        Example(prompt, None if samples.truth is None else samples.truth[i], None if given is None else given[i])
        for i, prompt in enumerate(samples.prompts)
    ]


def _facts(args: Args, count: int) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "Data": f"{args.data}, {count} pictures",
        "Seeds": ", ".join(map(str, args.seeds)),
        "Device": f"{jax.device_count()} × {device.device_kind} ({device.platform}), batches of {args.batch_size}",
        "Machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("codi_jax", "jax", "flax", "numpy")),
    }
