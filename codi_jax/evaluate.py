"""``python3 -m codi_jax.evaluate``: models side by side, by metrics, plots and pictures, in one page of HTML."""

import json
import math
import platform
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from codi_jax.cli import command_line
from codi_jax.cli.flags import LARGEST_SEED, Flags
from codi_jax.diffusion.sampling import Sampler, default_sampler
from codi_jax.evaluation.features import Features, load_features
from codi_jax.evaluation.metrics import edge_f1, edit_success, fid, kid, preservation, psnr
from codi_jax.evaluation.report import Report, Result, Row, check_plots, markdown, write_report
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.io.images import canny, open_image
from codi_jax.models.kernels.attention import Implementation
from codi_jax.pipeline.model import DiffusionPipeline, DType, open_pipeline, resolve_dtype

Place = tuple[str, str | None]
"""A model's folder, and that of its ControlNet or ``None`` where it has none, or one in its folder."""

_MOST_PSNR = 100.0  # dB, of pictures that are equal
_SEEDS_APART = 1_000_000  # so that the pictures of two seeds have no noise in common


@dataclass(frozen=True)
class Args(Flags):
    """Compares models on a folder of pictures with captions, edges or edits, such as the emoji benchmark.

    Writes metrics.json, report.html (one file that needs nothing else), pictures.png and the plots, and prints the
    table.
    """

    models: tuple[str, ...]
    """NAME=FOLDER, or NAME=FOLDER+CONTROLNET_FOLDER; several separated by spaces. Hub ids work as folders do.
    NAME=FOLDER,FOLDER,... is one model trained several times: one folder for each of --seeds. NAME@STEPS,...=FOLDER has
    steps of its own, and may be there again with other steps: base@50=runs/base base@4,1=runs/base-lcm is one curve."""
    data: Path = Path("data/emoji/validation")
    """Folder with metadata.jsonl; made by dataset_tools/emoji.py. Its subfolder edits/validation compares editors."""
    training_steps: tuple[int, ...] = ()
    """Evaluate models whose folders hold what they were after so many training steps, in step-N (--export_steps of
    training writes it), at those, too, and plot the metrics against them."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Steps of the samplers. Those that a model's sampler cannot take are left out for that model."""
    samplers: tuple[str, ...] = ()
    """NAME:SAMPLER for models that shall not use the sampler of their folder."""
    guidance_scale: float = 7.5
    """How strongly to follow the text; 1 is no guidance."""
    guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with a guidance scale of their own, such as student:1, or base@4,1:1 for those steps."""
    image_guidance_scale: float = 1.5
    """How strongly to keep to the image, for InstructPix2Pix."""
    image_guidance_scales: tuple[str, ...] = ()
    """NAME:SCALE for models with an image guidance scale of their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """All pictures are made once with each; the table has the mean and the standard deviation."""
    max_samples: int | None = None
    """Use at most so many pictures, evenly spread over the folder. If left out: all."""
    batch_size: int = 32
    """Pictures at a time."""
    num_shown: int = 12
    """Rows of pictures in the report."""
    output_dir: Path = Path("outputs/evaluation")
    """Folder for metrics.json, report.html, pictures.png and the plots."""
    dtype: DType = "auto"
    """Precision of weights and computation. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    attention: Implementation = "auto"
    """Attention kernel. auto: the fastest that the device has."""
    ccache: Path = Path("~/.cache/codi_jax/xla")
    """Folder that keeps compiled programs, so that the next start is faster."""

    def check(self) -> None:
        super().check()
        if not self.steps or min(self.steps) < 1:
            raise ValueError("--steps must be numbers of at least 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds must be different numbers of at least 0.")
        self.require("seeds", max(self.seeds) < LARGEST_SEED // _SEEDS_APART, f"below 2^63 / {_SEEDS_APART}")
        if self.batch_size < 1 or self.num_shown < 1:
            raise ValueError("--batch_size and --num_shown must be at least 1.")
        if self.max_samples is not None and self.max_samples < 2:
            raise ValueError("--max_samples must be at least 2.")
        self.require_at_least(0, "guidance_scale", "image_guidance_scale")
        self.require_at_least(1, "training_steps")


@dataclass(frozen=True)
class Competitor:
    """A model, and how it is sampled.

    Attributes:
      name: in table and report.
      places: folder, and folder of the ControlNet or ``None``: one place, or one for each seed.
      sampler: ``None`` is that of the folder.
      guidance_scale: how strongly to follow the text.
      image_guidance_scale: how strongly to keep to the image.
      steps: of the sampler.
      training_steps: after how many this is what the model was; ``None`` if it is what it is now.
    """

    name: str
    places: tuple[Place, ...]
    sampler: Sampler | None = None
    guidance_scale: float | int = 7.5
    image_guidance_scale: float | int = 1.5
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    training_steps: int | None = None


@dataclass(frozen=True)
class Samples:
    """What the models are given, and what they should make of it: one entry a picture in every field that is there."""

    prompts: list[str]
    truth: UInt8[np.ndarray, "n h w 3"]
    conditions: UInt8[np.ndarray, "n h w 3"] | None = None
    inputs: UInt8[np.ndarray, "n h w 3"] | None = None
    variants: list[UInt8[np.ndarray, "_v h w 3"]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """What all models are measured on: n pictures with features of dimension d, of which r are shown."""

    samples: Samples
    features: Features
    of_truth: Float[np.ndarray, "n d"]
    shown: Int[np.ndarray, " r"]


# ---- What to compare


def read_models(args: Args) -> list[Competitor]:
    """The models that the flags name.

    Raises:
      ValueError: if a flag cannot be read, or names a model twice or one that is not there.
    """
    models: dict[str, tuple[Place, ...]] = {}
    for text in args.models:
        name, equals, places = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--models {text}: write NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER.")
        if not name.isprintable():
            raise ValueError(f"--models {text!r}: the name must be of printable characters.")
        if name in models:
            raise ValueError(f"--models has two models of the name {name}: give each a name of its own.")
        models[name] = tuple(_read_place(text, place) for place in places.split(","))
        if len(models[name]) not in (1, len(args.seeds)):
            raise ValueError(
                f"--models {text}: {len(models[name])} folders for {len(args.seeds)} --seeds: give one, or as many."
            )
    if not models:
        raise ValueError("--models names no model: write NAME=FOLDER.")
    samplers = _overrides("--samplers", args.samplers, models)
    scales = _scales("--guidance_scales", args.guidance_scales, args.guidance_scale, models)
    of_image = _scales("--image_guidance_scales", args.image_guidance_scales, args.image_guidance_scale, models)
    found = []
    for name, places in models.items():
        label, steps = _read_steps(name, args)
        found.append(Competitor(label, places, _sampler(samplers.get(name)), scales[name], of_image[name], steps))
    named = [(model.name, steps) for model in found for steps in model.steps]
    if twice := next((each for each in named if named.count(each) > 1), None):
        raise ValueError(f"--models has two models of the name {twice[0]} with {twice[1]} steps: name one otherwise.")
    earlier = [past for model in found for past in _earlier(model, args.training_steps)]
    if args.training_steps and not earlier:
        raise ValueError(
            f"--training_steps: no model's folder has step-{args.training_steps[0]}: train it with --export_steps."
        )
    return [*earlier, *found]


def _read_steps(text: str, args: Args) -> tuple[str, tuple[int, ...]]:
    """``NAME@4,1`` -> name and steps; those of all models where there are none."""
    name, at, steps = text.partition("@")
    if not at:
        return name, args.steps
    if not name or not all(number.isdecimal() and int(number) > 0 for number in steps.split(",")):
        raise ValueError(f"--models {text}: write NAME@STEPS, such as base@4,1.")
    return name, tuple(map(int, steps.split(",")))


def _earlier(model: Competitor, training_steps: Sequence[int]) -> list[Competitor]:
    """What a model was in the course of its training, as far as its folders hold it."""
    found = []
    for steps in training_steps:
        places = tuple((str(Path(folder).expanduser() / f"step-{steps}"), other) for folder, other in model.places)
        if all(Path(folder).is_dir() for folder, _ in places):
            found.append(replace(model, places=places, training_steps=steps))
    return found


def _read_place(text: str, place: str) -> Place:
    folder, _, controlnet = place.partition("+")
    if not folder:
        raise ValueError(f"--models {text}: write NAME=FOLDER or NAME=FOLDER+CONTROLNET_FOLDER.")
    for each in filter(None, (folder, controlnet)):
        is_hub_id = each.count("/") == 1 and not each.startswith((".", "/", "~"))
        if not Path(each).expanduser().is_dir() and not is_hub_id:
            raise ValueError(f"--models {text}: there is no folder {each}.")
    return folder, controlnet or None


def _overrides(flag: str, texts: Sequence[str], names: Mapping[str, Any]) -> dict[str, str]:
    """Values by models. A name without its steps means all of that name, but for those that are named in full."""
    of_label, of_model = {}, {}
    for text in texts:
        name, colon, value = text.rpartition(":")
        if not colon or not value:
            raise ValueError(f"{flag} {text}: write NAME:VALUE.")
        meant = [each for each in names if each.partition("@")[0] == name]
        if name in names:
            of_model[name] = value
        elif meant:
            of_label |= dict.fromkeys(meant, value)
        else:
            raise ValueError(f"{flag} {text}: --models names no {name}, only {', '.join(names)}.")
    return of_label | of_model


def _sampler(value: str | None) -> Sampler | None:
    if value is not None and value not in get_args(Sampler):
        raise ValueError(f"--samplers: there is no sampler {value}; there are {', '.join(get_args(Sampler))}.")
    return value  # pyright: ignore[reportReturnType]


def _scales(flag: str, texts: Sequence[str], default: float | int, names: Mapping[str, Any]) -> dict[str, float | int]:
    scales = dict.fromkeys(names, default)
    for name, value in _overrides(flag, texts, names).items():
        try:
            scales[name] = float(value)
        except ValueError:
            raise ValueError(f"{flag}: {value} is no number.") from None
        if not 0 <= scales[name] < math.inf:
            raise ValueError(f"{flag}: {value} is not possible: it must be a finite number of at least 0.")
    return scales


def read_samples(folder: Path, most: int | None = None) -> Samples:
    """Reads a folder with ``metadata.jsonl``: captions with or without edges, or edits.

    Raises:
      ValueError: if there is none, or it has not the columns, or the pictures differ in size.
      FileNotFoundError: if a picture is missing.
    """
    rows = _read_rows(folder)
    if most is not None and most < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]
    edits = "edited_image" in rows[0]
    needed = ("input_image", "edited_image", "edit_prompt") if edits else ("file_name", "text")
    for row in rows:
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{folder}/metadata.jsonl has a line without {absent[0]}.")
    files: dict[str, np.ndarray] = {}

    def read(names: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        for name in names:
            if name not in files:
                files[name] = np.asarray(open_image(folder / name))
        if len({files[name].shape for name in names}) > 1:
            raise ValueError(f"the pictures of {folder} are not of one size: scale them first.")
        return np.stack([files[name] for name in names])

    if not edits:
        captions = [text if isinstance(text := row["text"], str) else text[0] for row in rows]
        edges = read([row["conditioning_image"] for row in rows]) if "conditioning_image" in rows[0] else None
        return Samples(captions, read([row["file_name"] for row in rows]), edges)
    prompts, truth = [row["edit_prompt"] for row in rows], read([row["edited_image"] for row in rows])
    inputs = read([row["input_image"] for row in rows])
    if "variants" not in rows[0]:
        return Samples(prompts, truth, inputs=inputs)
    variants = [read(row["variants"]) for row in rows]
    wanted = [row["variants"].index(row["edited_image"]) for row in rows]
    return Samples(prompts, truth, inputs=inputs, variants=variants, wanted=wanted)


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"--data {folder} has no metadata.jsonl: make the folder with dataset_tools/emoji.py.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, one object a line: {error}.") from None
    if len(rows) < 2:
        raise ValueError(f"{path} names {len(rows)} pictures: metrics need at least two.")
    return rows


# ---- Making pictures


def make_pictures(
    pipeline: DiffusionPipeline, model: Competitor, samples: Samples, steps: int, seed: int, args: Args
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """One picture for each sample, and the seconds that one took, compilation left out.

    The last batch is filled up with its last sample, so that all have one shape and one program.
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
                seed=seed * _SEEDS_APART + start,
            )
        )
        seconds += pipeline.seconds
    pictures = np.concatenate(made)
    return pictures[:count], seconds / len(pictures)


def measure(
    pictures: UInt8[np.ndarray, "n h w 3"], samples: Samples, features: Features, of_truth: np.ndarray
) -> dict[str, float]:
    """The metrics of one seed's pictures that the data allows, by the keys of `codi_jax.evaluation.report.METRICS`."""
    found = features(pictures)
    values = {
        "fid_lite": fid(found, of_truth),
        "kid_lite": 1000 * kid(found, of_truth),
        "psnr": float(np.minimum(psnr(pictures, samples.truth), _MOST_PSNR).mean()),
    }
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


def _load(place: Place, args: Args) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(*place, dtype=resolve_dtype(args.dtype), attention=args.attention)


def _with_possible_steps(model: Competitor, samples: Samples, args: Args) -> Competitor:
    """The model with the steps that its sampler can take, once it is found to fit the data.

    Weights are not read: hours may be spent on the models before this one.

    Raises:
      ValueError: if it is for another task, or cannot make pictures of this size.
    """
    steps, (height, width) = model.steps, samples.truth.shape[1:3]
    for place in model.places:
        pipeline = open_pipeline(*place)
        _check_task(pipeline, model, samples, args.data)
        steps = _possible_steps(pipeline, model, steps)
        conditions = samples.conditions if "controlnet" in pipeline.modules else None
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


def _possible_steps(pipeline: DiffusionPipeline, model: Competitor, steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of steps that the sampler can take; a warning names the others."""
    possible = []
    for number in steps:
        try:
            pipeline.times(number, model.sampler)
            possible.append(number)
        except ValueError as error:
            warnings.warn(f"{model.name} is not run with {number} steps: {error}", stacklevel=2)
    return tuple(possible)


def _check_task(pipeline: DiffusionPipeline, model: Competitor, samples: Samples, data: Path) -> None:
    if (pipeline.task == "edit") != (samples.inputs is not None) or pipeline.task == "inpaint":
        raise ValueError(
            f"the model {model.name} is for the task {pipeline.task!r}, which {data} is not for: text-to-image models "
            "need rows with file_name and text, editors rows with input_image, edited_image and edit_prompt."
        )
    if "controlnet" in pipeline.modules and samples.conditions is None:
        raise ValueError(f"the model {model.name} has a ControlNet, but {data} names no conditioning_image.")


# ---- The run


def run(args: Args) -> Report:
    """Compares the models and writes the report.

    Raises:
      ValueError: if arguments do not fit each other, the models or the data; also `WeightsError` and `ConfigError`.
      OSError: if a picture is not there, or the output cannot be written.
      FloatingPointError: if a model gives NaN.
    """
    args.check()
    models = read_models(args)
    check_plots()
    samples = read_samples(args.data, args.max_samples)
    models = [_with_possible_steps(model, samples, args) for model in models]
    if not any(model.steps for model in models):
        raise ValueError("no model can be run with any of --steps: see the warnings above.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs(args.ccache)
    features = load_features()
    shown = np.linspace(0, len(samples.prompts) - 1, min(args.num_shown, len(samples.prompts))).round().astype(int)
    benchmark = Benchmark(samples, features, features(samples.truth), shown)
    results = [result for model in models if model.steps for result in _evaluate(model, benchmark, args)]
    if not any("edge_f1" in result.values for result in results):
        samples = _without_conditions(samples)
    names = {model.name for model in models}
    report = Report(
        title=f"{len(names)} models on {args.data}" if len(names) > 1 else f"{models[0].name} on {args.data}",
        results=results,
        rows=[_row(samples, int(i)) for i in shown],
        facts=_facts(args, len(samples.prompts)),
        command="python3 -m codi_jax.evaluate " + shlex.join(sys.argv[1:]),
    )
    write_report(args.output_dir, report)
    print(markdown(report))
    return report


def _evaluate(model: Competitor, benchmark: Benchmark, args: Args) -> list[Result]:
    """One model with every number of steps, over all seeds."""
    values: dict[int, dict[str, list[float]]] = {}
    pictures: dict[int, np.ndarray] = {}
    sampler = model.sampler
    for place, seeds in _seeds_of(model, args.seeds):
        pipeline = _load(place, args)
        samples = benchmark.samples if "controlnet" in pipeline.modules else _without_conditions(benchmark.samples)
        sampler = model.sampler or default_sampler(pipeline.schedule)
        for steps in model.steps:
            for seed in _progress(seeds, f"{model.name}, {steps} steps"):
                made, seconds = make_pictures(pipeline, model, samples, steps, seed, args)
                measured = measure(made, samples, benchmark.features, benchmark.of_truth)
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
    """What a model without a ControlNet is given, and measured by: it has not seen the edges."""
    return replace(samples, conditions=None)


def _seeds_of(model: Competitor, seeds: tuple[int, ...]) -> list[tuple[Place, tuple[int, ...]]]:
    """Which places make pictures with which seeds."""
    if len(model.places) == 1:
        return [(model.places[0], seeds)]
    return [(place, (seed,)) for place, seed in zip(model.places, seeds, strict=True)]


def _progress(seeds: tuple[int, ...], name: str) -> Iterable[int]:
    return tqdm(seeds, desc=name, leave=False, disable=not sys.stderr.isatty())


def _row(samples: Samples, i: int) -> Row:
    condition = samples.conditions if samples.inputs is None else samples.inputs
    return Row(samples.prompts[i], samples.truth[i], None if condition is None else condition[i])


def _facts(args: Args, count: int) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "Data": f"{args.data}, {count} pictures",
        "Seeds": ", ".join(map(str, args.seeds)),
        "Device": f"{jax.device_count()} × {device.device_kind} ({device.platform}), batches of {args.batch_size}",
        "Machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("codi_jax", "jax", "flax", "numpy")),
    }


def main() -> None:
    """The command line."""

    def run_and_tell(args: Args) -> None:
        run(args)
        print(f"wrote {args.output_dir}/report.html")

    command_line.run(Args, run_and_tell, "python3 -m codi_jax.evaluate", save_memory="a smaller --batch_size")


if __name__ == "__main__":
    main()
