"""Compares models: what each generates for the same samples, and how it is measured."""

import platform
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from codi_jax.diffusion.timesteps import default_sampler
from codi_jax.evaluation.arguments import SEED_STRIDE, Args
from codi_jax.evaluation.attributes import READER, Reader, shown_shares
from codi_jax.evaluation.candidates import Candidate, Checkpoint, read_candidates
from codi_jax.evaluation.features import Features, inception_features, load_features
from codi_jax.evaluation.metrics import NEIGHBORS, edge_f1, edit_success, fid, kid, precision_recall, preservation, psnr
from codi_jax.evaluation.report import Example, Report, Result, check_plots, write_report
from codi_jax.evaluation.samples import Samples, read_samples
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.io.images import canny
from codi_jax.pipeline.loading import resolve_dtype
from codi_jax.pipeline.model import Model

_MOST_PSNR = 100.0  # dB, for equal images


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with on one kind of features.

    Attributes:
      features: maps images to features of dimension d.
      truth: the real images' features.
    """

    features: Features
    truth: Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class Benchmark:
    """The data that all models are measured on.

    Attributes:
      samples: n samples.
      lite: EfficientNet-Lite0's features.
      shown: the r samples whose images the report shows.
      reader: reads attributes off images, if the samples name them.
      inception: Inception's features, if there are weights for it.
    """

    samples: Samples
    lite: Reference
    shown: Int[np.ndarray, " r"]
    reader: Reader | None = None
    inception: Reference | None = None


def make_pictures(
    pipeline: Model, model: Candidate, samples: Samples, steps: int, seed: int, args: Args
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """One image per sample, and the seconds per image without compilation.

    The last batch is padded with its last sample, so that all batches share one shape and one program.
    """
    count = len(samples.prompts)
    batch_size = min(args.batch_size, count)
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
                height=samples.truth.shape[1],
                width=samples.truth.shape[2],
                seed=seed * SEED_STRIDE + start,
            )
        )
        seconds += pipeline.seconds
    pictures = np.concatenate(made)
    return pictures[:count], seconds / len(pictures)


def measure(pictures: UInt8[np.ndarray, "n h w 3"], samples: Samples, benchmark: Benchmark) -> dict[str, float]:
    """The metrics of one seed's images that the data allows, by the keys of `codi_jax.evaluation.report.METRICS`."""
    found, truth = benchmark.lite.features(pictures), benchmark.lite.truth
    values = {
        "fid_lite": fid(found, truth),
        "kid_lite": 1000 * kid(found, truth),
        "psnr": float(np.minimum(psnr(pictures, samples.truth), _MOST_PSNR).mean()),
    }
    if benchmark.inception is not None:
        values |= _on_inception(benchmark.inception.features(pictures), benchmark.inception.truth)
    if benchmark.reader is not None:
        shares = shown_shares(benchmark.reader.read(pictures), samples.looks)
        values["attribute_accuracy"] = float(shares.mean())
        if samples.inputs is not None:
            values["edit_accuracy"] = float((shares == 1).mean())
    if samples.conditions is not None:
        edges = np.stack([canny(picture) for picture in pictures]) > 0
        values["edge_f1"] = float(edge_f1(edges, samples.conditions[..., 0] > 127).mean())
    if samples.variants:
        success = edit_success(pictures, samples.variants, np.asarray(samples.wanted))
        values["edit_success"] = float(success.mean())
    if samples.inputs is not None:
        kept = preservation(pictures, samples.inputs, samples.truth)
        if not np.isnan(kept).all():
            values["preservation"] = float(np.nanmean(np.minimum(kept, _MOST_PSNR)))
    return values


def _on_inception(found: Float[np.ndarray, "n e"], truth: Float[np.ndarray, "m e"]) -> dict[str, float]:
    precision, recall = precision_recall(found, truth)
    return {"fid": fid(found, truth), "kid": 1000 * kid(found, truth), "precision": precision, "recall": recall}


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
    candidates = read_candidates(args)
    check_plots()
    samples = read_samples(args.data, args.max_samples)
    candidates = [_with_possible_steps(candidate, samples, args) for candidate in candidates]
    if not any(candidate.steps for candidate in candidates):
        raise ValueError("no model can be run with any of --steps: see the warnings above.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs(args.ccache)
    benchmark = _benchmark(samples, args)
    results = [result for each in candidates if each.steps for result in _evaluate(each, benchmark, args)]
    if not any("edge_f1" in result.values for result in results):
        samples = _without_conditions(samples)
    names = {candidate.name for candidate in candidates}
    report = Report(
        title=f"{len(names)} models on {args.data}" if len(names) > 1 else f"{candidates[0].name} on {args.data}",
        results=results,
        examples=[_example(samples, int(i)) for i in benchmark.shown],
        facts=_facts(args, len(samples.prompts)),
        command=command,
    )
    write_report(args.output_dir, report)
    return report


def _benchmark(samples: Samples, args: Args) -> Benchmark:
    count = len(samples.prompts)
    if args.inception_weights is not None and count <= NEIGHBORS:
        raise ValueError(f"--inception_weights: precision and recall need at least {NEIGHBORS + 1} pictures.")
    shown = np.linspace(0, count - 1, min(args.num_shown, count)).round().astype(int)
    reader = Reader() if samples.looks and READER.is_dir() else None
    inception = None
    if args.inception_weights is not None:
        inception = _reference(inception_features(args.inception_weights, args.fid_resizing), samples)
    return Benchmark(samples, _reference(load_features(), samples), shown, reader, inception)


def _reference(features: Features, samples: Samples) -> Reference:
    return Reference(features, features(samples.truth))


def _load(checkpoint: Checkpoint, args: Args) -> Model:
    return Model.from_pretrained(*checkpoint, dtype=resolve_dtype(args.dtype), attention=args.attention)


def _with_possible_steps(model: Candidate, samples: Samples, args: Args) -> Candidate:
    """The model with the steps that its sampler supports, after checking that it fits the data.

    Weights are not read: all models are checked before hours are spent on the first one.

    Raises:
      ValueError: if the model is for another task, or cannot make images of this size.
    """
    steps, (height, width) = model.steps, samples.truth.shape[1:3]
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


def _check_task(pipeline: Model, model: Candidate, samples: Samples, data: Path) -> None:
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
        pipeline = _load(checkpoint, args)
        samples = benchmark.samples
        if pipeline.networks.controlnet is None:
            samples = _without_conditions(samples)
        sampler = model.sampler or default_sampler(pipeline.schedule)
        for steps in model.steps:
            for seed in _progress(seeds, f"{model.name}, {steps} steps"):
                made, seconds = make_pictures(pipeline, model, samples, steps, seed, args)
                measured = measure(made, samples, benchmark)
                for key, value in {**measured, "seconds": seconds}.items():
                    values.setdefault(steps, {}).setdefault(key, []).append(value)
                pictures.setdefault(steps, made[benchmark.shown])
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


def _without_conditions(samples: Samples) -> Samples:
    """The samples for a model without a ControlNet, which does not see the edges and is not measured by them."""
    return replace(samples, conditions=None)


def _seeds_of(model: Candidate, seeds: tuple[int, ...]) -> list[tuple[Checkpoint, tuple[int, ...]]]:
    """Which checkpoints generate with which seeds."""
    if len(model.checkpoints) == 1:
        return [(model.checkpoints[0], seeds)]
    return [(checkpoint, (seed,)) for checkpoint, seed in zip(model.checkpoints, seeds, strict=True)]


def _progress(seeds: tuple[int, ...], name: str) -> Iterable[int]:
    return tqdm(seeds, desc=name, leave=False, disable=not sys.stderr.isatty())


def _example(samples: Samples, i: int) -> Example:
    condition = samples.conditions if samples.inputs is None else samples.inputs
    return Example(samples.prompts[i], samples.truth[i], None if condition is None else condition[i])


def _facts(args: Args, count: int) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "Data": f"{args.data}, {count} pictures",
        "Seeds": ", ".join(map(str, args.seeds)),
        "Device": f"{jax.device_count()} × {device.device_kind} ({device.platform}), batches of {args.batch_size}",
        "Machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("codi_jax", "jax", "flax", "numpy")),
    }
