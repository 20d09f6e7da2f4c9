"""Plans a run: compiles the step that its command line describes, from shapes alone, for devices that need not exist.

Everything up to the step is what `codi_jax.training.run.run` does, with shapes in place of weights, and two blank
samples in place of the data.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from codi_jax.io.images import encode_image
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.pipeline.model import Model
from codi_jax.planning.plan import Plan
from codi_jax.planning.programs import bytes_on_device, compile_for_target, with_shardings
from codi_jax.planning.targets import Target, open_target
from codi_jax.training import batches, loop, optim, starting
from codi_jax.training.configured import Configured, configure, frozen_of, without_unused
from codi_jax.training.flags import RunFlags
from codi_jax.training.method import Method

_MOST_SAMPLES = 4096  # per device, where the search for the largest batch ends
_STEPS = 1000  # of a learning rate's schedule, where the flags do not say
_BLANKS = 2


def plan(method: Method[Any, Any], args: RunFlags, open_model: Callable[[Any], Model], *, has_text: bool) -> Plan:
    """Plans a run with a method.

    Args:
      method: the training method.
      args: the run's arguments, with ``--plan``.
      open_model: from these, opens the model without its weights.
      has_text: whether the data has captions.

    Raises:
      ValueError: if there is no such target, or flags and model do not fit each other or the target.
    """
    assert args.plan is not None
    # A compiler may still be writing reports when the plan is made.
    with tempfile.TemporaryDirectory(prefix="plan-", ignore_cleanup_errors=True) as folder:
        target = open_target(args.plan, Path(folder))
        planner = _Planner(method, with_blank_data(args, Path(folder)), open_model, has_text, target)
        return planner.largest_batch() if args.plan_batch == "auto" else planner.advised()


def with_blank_data(args: RunFlags, folder: Path) -> Any:
    """The arguments with other data: two blank images with captions and conditions, in every column there may be."""
    data = folder / "data"
    data.mkdir()
    blank = np.zeros((args.resolution, args.resolution, 3), np.uint8)
    rows = []
    for number in range(_BLANKS):
        (data / f"{number}.png").write_bytes(encode_image(blank))
        images = dict.fromkeys((args.image_column, args.conditioning_image_column), f"{number}.png")
        rows.append({**images, args.caption_column: "blank"})
    (data / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    others = dict.fromkeys(args.sources, None)
    return replace(
        args,
        **{
            **others, "train_data_dir": str(data), "dataset_config_name": None, "load_from_disk": False,
            "streaming": False, "max_train_samples": None, "dataloader_num_workers": 0, "cache_dir": str(folder),
            "cache_latents_dir": None, "output_dir": str(folder / "run"), "resume_from_checkpoint": None,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class AbstractStep:
    """A training step that can be compiled but not run: its inputs are shapes with shardings.

    Attributes:
      step: the step, jitted as the loop does.
      mesh: the devices that it is for.
      state: the state.
      frozen: the frozen trees.
      batch: the batch.
    """

    step: Any
    mesh: Mesh
    state: Any
    frozen: Any
    batch: Any

    def trace(self) -> Any:
        """The step as a jaxpr, to be lowered."""
        with jax.set_mesh(self.mesh):
            return self.step.trace(self.state, self.frozen, self.batch)

    def kinds(self) -> dict[str, int]:
        """Bytes per device of its inputs, by kind."""
        return _kinds(self.state, self.frozen, self.batch)


@dataclass(frozen=True)
class _Planner:
    """Makes plans of a run with different flags."""

    method: Method[Any, Any]
    args: Any
    open_model: Callable[[Any], Model]
    has_text: bool
    target: Target

    def plan(self, **flags: Any) -> Plan:
        """The plan with some flags changed."""
        args = replace(self.args, **flags)
        mesh = sharding.make_mesh(args.fsdp, self.target.devices)
        step = abstract_step(self.method, args, self.open_model, self.has_text, mesh)
        kinds, compiles = step.kinds(), functools.partial(loop.compile_for, self.target.platform)
        program = compile_for_target(step.trace(), sum(kinds.values()), self.target, compiles)
        return Plan(
            title=f"{Path(sys.argv[0]).name}, {args.pretrained_model_name_or_path}, {args.resolution} px",
            target=self.target.name,
            chip=self.target.chip,
            devices=mesh.size,
            batch=args.train_batch_size,
            samples=starting.global_batch_size(args, mesh.size),
            kinds=kinds,
            program=program,
            is_half=args.mixed_precision != "no",
            steps=args.max_train_steps,
        )

    def advised(self) -> Plan:
        """The plan of the flags as they are, with advice."""
        made = self.plan()
        return replace(made, advice=[*_savings(made, self.args), *self._largest(made)])

    def _largest(self, made: Plan) -> list[str]:
        """A sentence about the largest batch, by extrapolation."""
        room = made.chip.usable - made.program.given
        per_sample = made.program.temporary / made.batch
        batch = int(room / per_sample) if room > 0 else 0
        if batch < 1:
            return ["not even one sample per device fits"] if made.batch == 1 else []
        return [
            f"if temporaries grow with the batch, about --train_batch_size {batch} fits: --plan_batch auto finds out"
        ]

    def largest_batch(self) -> Plan:
        """The plan of the largest batch that fits, found by bisection; that of one sample if none does."""
        best, smallest = self.plan(train_batch_size=1), None
        if not best.fits:
            return best
        guess = best
        while True:
            size = _next_size(guess, best.batch, smallest)
            if size is None:
                break
            guess = self.plan(train_batch_size=size)
            if guess.fits:
                best = guess
            else:
                smallest = size
        sentence = f"--train_batch_size {best.batch} is the largest that fits"
        return replace(best, advice=[sentence, *_savings(best, self.args)])


def _next_size(guess: Plan, fits: int, fails: int | None) -> int | None:
    """The next batch size to try: by extrapolation, or between what fits and what does not."""
    if fails is not None and fails - fits <= 1:
        return None
    room = guess.chip.usable - guess.program.given
    size = max(int(room / (guess.program.temporary / guess.batch)), fits + 1)
    if fails is not None:
        size = min(size, fails - 1) if guess.fits else (fits + fails) // 2
    return min(size, _MOST_SAMPLES) if size <= _MOST_SAMPLES or fits < _MOST_SAMPLES else None


def _savings(made: Plan, args: RunFlags) -> list[str]:
    """What other flags would save, as far as it can be told without compiling again."""
    kinds, gib, sentences = made.kinds, 2**30, []
    split = sum(kinds.get(kind, 0) for kind in ("parameters", "optimizer", "moving averages"))
    if args.fsdp == 1 and made.devices > 1:
        saved = split * (1 - 1 / made.devices) / gib
        sentences.append(f"--fsdp {made.devices} would save about {saved:.2f} GiB per device")
    if not args.use_8bit_adam:
        sentences.append(
            f"--use_8bit_adam would save about {0.75 * kinds.get('optimizer', 0) / gib:.2f} GiB per device"
        )
    if not args.cache_latents and "frozen vae" in kinds:
        sentences.append("--cache_latents would take the autoencoder and the text encoders out of the step")
    if not args.gradient_checkpointing:
        sentences.append(
            f"--gradient_checkpointing would shrink the temporaries, {made.program.temporary / gib:.2f} GiB"
        )
    return sentences


# ---- The step


def abstract_step(
    method: Method[Any, Any], args: Any, open_model: Callable[[Any], Model], has_text: bool, mesh: Mesh
) -> AbstractStep:
    """The step of a run, without its weights.

    Args:
      method: the training method.
      args: the run's arguments, whose data is read for its shapes.
      open_model: from these, opens the model without its weights.
      has_text: whether the data has captions.
      mesh: the devices to plan for.

    Raises:
      ValueError: if flags, model and data do not fit each other.
    """
    args.check()
    configured = configure(method, args, open_model)
    setup, model = configured.setup, without_unused(configured.model, configured.setup)
    networks, random = model.networks.by_name(), _random(args)
    params = {name: each.abstract_params(None if name in random else each.dtype) for name, each in networks.items()}
    batch = _batch(args, model, params, has_text, setup.networks.is_instruct_pix2pix, mesh)
    batch_size = starting.global_batch_size(args, mesh.size)
    optimizer = method.optimizer(configured.flags, optim.maker(args, batch_size), args.max_train_steps or _STEPS)
    state, frozen = jax.eval_shape(functools.partial(_begin, method, args, configured, model, optimizer), params)
    state, frozen = (with_shardings(tree, sharding.shardings(mesh, tree)) for tree in (state, frozen))
    step = loop.jit_step(method.step(setup, optimizer, args.gradient_accumulation_steps), state, mesh)
    return AbstractStep(step, mesh, state, frozen, batch)


def _begin(
    method: Method[Any, Any], args: Any, configured: Configured, model: Model, optimizer: Any, params: Any
) -> tuple[Any, Any]:
    """The state and the frozen trees before the first step, computed from parameters."""

    def load(name: str) -> Params:
        # What is none of the model's networks is another version of its UNet.
        return jax.tree.map(lambda leaf: leaf.astype("float32"), params[name if name in params else "unet"])

    key = jax.random.key(args.seed)
    state = method.init(configured.setup, load, optimizer, key, mixed_precision=args.mixed_precision)
    unread = batches.unread_networks(args, configured.setup.networks)
    return state, frozen_of(configured.setup, model.replace(params=params), configured.schedule, unread)


def _random(args: Any) -> tuple[str, ...]:
    """The networks that start random, in float32; an autoencoder's flags do not name any."""
    return getattr(args, "starts_random", ("vae",))


def _batch(args: Any, model: Model, params: Mapping[str, Any], has_text: bool, edits: bool, mesh: Mesh) -> Any:
    """The shapes of a batch: two blank samples, read as a run reads its data, tell all but their number."""
    source = batches.open_training_data(args, has_text=has_text, batch_size=_BLANKS)
    encoders = None
    if args.cache_latents:
        encoders = batches.blank_encoders_of(model, params, args.caches_text, conditions_too=edits)
    loader = batches.load_batches(args, model, source, batch_size=_BLANKS, encoders=encoders)
    try:
        blanks = next(loader)
    finally:
        loader.close()
    size, where = starting.global_batch_size(args, mesh.size), sharding.batch_sharding(mesh)

    def shape_of(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), dtype, sharding=where)

    return jax.tree.map(shape_of, blanks)


def _kinds(state: Any, frozen: Any, batch: Any) -> dict[str, int]:
    """Bytes per device of what the step is given, by kind."""
    kinds = {"parameters": 0, "moving averages": 0, "optimizer": 0}
    names = {"params": "parameters", "ema": "moving averages", "opt_state": "optimizer"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts = [getattr(key, "name", None) for key in path]
        kind = next((names[part] for part in parts if part in names), "other")
        kinds[kind] = kinds.get(kind, 0) + bytes_on_device(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        part = getattr(path[0], "name", None)
        kind = f"frozen {path[1].key}" if part == "params" else "target" if part == "target" else "other"
        kinds[kind] = kinds.get(kind, 0) + bytes_on_device(leaf)
    return {**kinds, "batch": bytes_on_device(batch)}
