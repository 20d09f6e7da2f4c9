"""A training run with any method: data, model, state, loop, validation images and exports."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from codi_jax.cli.flags import Flags
from codi_jax.cli.messages import counted
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import default_sampler
from codi_jax.io.images import labeled_rows
from codi_jax.io.lora_files import save_lora
from codi_jax.io.weights import save_model
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Frozen
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.saving import save, save_schedule
from codi_jax.planning.report import report
from codi_jax.training import batches, loop, optim, planned, starting, teacher
from codi_jax.training.configured import configure, frozen_of, without_unused
from codi_jax.training.flags import RunFlags
from codi_jax.training.method import Export, Load, Method, Setup
from codi_jax.training.model_card import write_card
from codi_jax.training.validation import Samples, generate_with, validation_samples

Args = TypeVar("Args", bound=RunFlags)


@dataclass(eq=False, kw_only=True)
class Run(Generic[Args]):
    """A run whose model is loaded.

    Attributes:
      args: the run's arguments, with the folder filled in.
      method: the training method.
      flags: the method's flags.
      setup: the method's setup.
      model: the teacher, with the parameters that are still needed.
      student: the student model, without the trained parameters.
      samples: the samples to show.
      mesh: the mesh that everything is on.
      num_steps: the number of steps of the complete run.
      load: reads the teacher's parameters.
      resting: in host memory, the parameters that only sampling reads.
    """

    args: Args
    method: Method[Any, Any]
    flags: Flags
    setup: Setup
    model: Model
    student: Model
    samples: Samples
    mesh: Mesh
    num_steps: int
    load: Load
    resting: Mapping[str, Params] = field(default_factory=dict)

    @functools.cached_property
    def by_teacher(self) -> np.ndarray:
        """The teacher's images for the samples."""
        scales = self.args.shown.teacher_scales or {}
        model = teacher.load_missing(self.model.with_params(self.awakened()), self.mesh)
        return generate_with(model, {}, self.samples, steps=self.teacher_steps, **scales)

    def awakened(self) -> dict[str, Params]:
        """The parameters that only sampling reads, on the mesh."""
        return {name: sharding.put(self.mesh, tree) for name, tree in self.resting.items()}

    @property
    def teacher_steps(self) -> int:
        """The number of steps with which the teacher is shown."""
        return self.model.sampling.most_steps(teacher.STEPS)


def show_samples(run: Run, state: Any) -> loop.Pictures:
    """The student's images for the data's samples or the user's prompts, along with the teacher's."""
    given, samples, shown = ("source" if run.model.task == "edit" else "condition"), run.samples, run.args.shown
    rows = {given: samples.conditions}
    if shown.teacher_scales is not None:
        rows[f"teacher, {run.teacher_steps} steps"] = run.by_teacher
    params = {**run.awakened(), **run.method.result(state, run.setup, run.load)}
    for steps in shown.steps:
        made = generate_with(run.student, params, samples, steps=steps, **shown.scales)
        number = run.student.sampling.default_steps(default_sampler(run.student.schedule)) if steps is None else steps
        rows[f"student, {counted(number, 'step')}"] = made
    return {"samples": labeled_rows({**rows, "data": samples.pictures})}


def write_export(run: Run, state: Any, folder: Path) -> None:
    """Writes what the method exports: a complete diffusers folder, unless it says otherwise.

    Raises:
      WeightsError: if something cannot be written.
    """
    export: Export = run.method.export(state, run.setup, run.load)
    if export.is_whole:
        _write_whole(run, export, folder)
    elif export.has_schedule and jax.process_index() == 0:
        save_schedule(run.student.schedule, folder)
    for name, (network, params) in export.beside.items():
        save_model(folder, name, network, params, dtype=run.args.save_dtype)
    if export.lora:
        save_lora(folder, export.lora)


def _write_whole(run: Run, export: Export, folder: Path) -> None:
    """Writes the trained networks, and the rest of the model unchanged."""
    model = run.student.replace(params={})
    for name, (network, params) in export.networks.items():
        model = model.with_network(name, network, params)
    untouched = [name for name in model.networks.by_name() if name not in export.networks]
    of_file: dict[str, Any] = dict.fromkeys(export.networks, run.args.save_dtype)
    save(model, folder, of_file, {name: run.model.sources[name] for name in untouched})


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does differently from most; the defaults are what most runs do.

    Examples:
      >>> run(method, args, hooks=Hooks(show=None))

    Attributes:
      open_model: from the flags, opens the model without its weights.
      load_model: from that model, the flags and the mesh, loads the model with its weights.
      samples: from the flags, reads the samples to show.
      has_text: whether the data has captions.
      load: reads trees by names that `codi_jax.training.method.Load` does not know.
      check: refuses a run after its model is loaded.
      frozen: from what most steps read, makes what this step reads; or a `codi_jax.training.loop.Moving`.
      record: writes something every few steps. Default: the exports of ``--export_steps``.
      show: from a state, makes images by name; ``None`` shows nothing.
      write: writes a state's export into a folder.
    """

    open_model: Callable[[Any], Model] = teacher.open_teacher
    load_model: Callable[[Model, Any, Mesh], Model] = teacher.load_teacher
    samples: Callable[[Any], Samples] = validation_samples
    has_text: bool = True
    load: Mapping[str, Callable[[], Params]] = field(default_factory=dict)
    check: Callable[[Run], None] = lambda run: None
    frozen: Callable[[Run, Frozen], Any] = lambda run, frozen: frozen
    record: Callable[[Run], loop.Recorder] | None = None
    show: Callable[[Run, Any], loop.Pictures] | None = show_samples
    write: Callable[[Run, Any, Path], None] = write_export


def run(
    method: Method[Any, Any], args: Args, *, hooks: Hooks | None = None, identity: Mapping[str, Any] | None = None
) -> Args:
    """Trains with a method, from the start or from a checkpoint, and writes what it exports.

    Examples:
      >>> run(lcm.TEXT, args)

    Args:
      method: one of `codi_jax.methods`.
      args: the script's arguments.
      hooks: what this run does differently from most.
      identity: what a resumed run must share beyond its flags, JSON.

    Returns:
      The arguments, with the folder filled in.

    Raises:
      ValueError: if flags, model and data do not fit each other.
      OSError: if something cannot be read or written.
      FloatingPointError: if consecutive steps gave non-finite values.
      SystemExit: with ``--plan``, which only plans the run.
    """
    hooks = hooks or Hooks()
    if args.plan is not None:
        report(planned.plan(method, args, hooks.open_model, has_text=hooks.has_text), args.plan_output)
    args = starting.start(args, identity)
    source = batches.open_training_data(args, has_text=hooks.has_text)
    samples = hooks.samples(args)
    configured = configure(method, args, hooks.open_model)
    setup, schedule = configured.setup, configured.schedule
    mesh = sharding.make_mesh(args.fsdp)
    model = without_unused(hooks.load_model(configured.model, args, mesh), setup)
    loader = batches.load_batches(args, model, source, trains_edits=setup.networks.is_instruct_pix2pix)
    num_steps = starting.num_steps(args, loader.samples_per_epoch)
    this = Run(
        args=args, method=method, flags=configured.flags, setup=setup, model=model,
        student=_student_of(model, setup, schedule), samples=samples,
        mesh=mesh, num_steps=num_steps, load=teacher.loader_of(model, mesh, hooks.load),
    )  # fmt: skip
    del model  # otherwise `_release` could not free its parameters
    hooks.check(this)
    batch_size = starting.global_batch_size(args, mesh.size)
    optimizer = method.optimizer(configured.flags, optim.maker(args, batch_size), num_steps)
    state = method.init(setup, this.load, optimizer, jax.random.key(args.seed), mixed_precision=args.mixed_precision)
    unread = batches.unread_networks(args, setup.networks)
    frozen = hooks.frozen(this, frozen_of(setup, this.model, schedule, unread))
    _release(this, unread)
    loop.train(
        method.step(setup, optimizer, args.gradient_accumulation_steps),
        state,
        frozen,
        loader,
        args,
        mesh=mesh,
        validate=None if hooks.show is None else functools.partial(_validate, hooks.show, this),
        record=_exports(hooks, this) if hooks.record is None else hooks.record(this),
        export=functools.partial(_finish, hooks.write, this),
        run_config=identity,
    )
    return args


def _finish(write: Callable[[Run, Any, Path], None], run: Run, state: Any, folder: Path) -> None:
    """Writes the export of a finished run, and its card."""
    write(run, state, folder)
    if jax.process_index() == 0:
        write_card(folder, run.args, run.student)


def _exports(hooks: Hooks, run: Run) -> loop.Recorder | None:
    """Exports the state every few steps into folders of their own, if the flags say so."""

    def write(state: Any, step: int) -> None:
        hooks.write(run, state, Path(run.args.output_dir) / f"step-{step}")

    return loop.Recorder(write, run.args.export_steps) if run.args.export_steps else None


def _validate(show: Callable[[Run, Any], loop.Pictures], run: Run, state: Any, step: int) -> loop.Pictures:
    del step
    return show(run, state)


def _student_of(model: Model, setup: Setup, schedule: NoiseSchedule | Any) -> Model:
    """The model that training turns this one into, without the trained parameters."""
    networks = replace(setup.student.with_options(remat=False), vae_parts=1)
    return model.without_params(*setup.trained).replace(networks=networks, schedule=schedule)


def _release(run: Run, unread: Collection[str]) -> None:
    """Frees parameters on the devices.

    Those that would duplicate the state's `Run.by_teacher` reads again; those that no step reads rest in host memory.
    """
    setup, params = run.setup, run.model.params
    unused = [name for name in setup.trained if name not in setup.frozen]
    run.resting = {name: sharding.fetch(params[name]) for name in unread if name in params and name not in unused}
    run.model = run.model.without_params(*unused, *run.resting)
    run.student = run.student.without_params(*run.resting)
    run.load = teacher.loader_of(run.model, run.mesh)
