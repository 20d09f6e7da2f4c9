"""The interface of a training method: a value that names its pure functions.

`codi_jax.training.run.run` trains with any method and depends on none. A method is one file in `codi_jax/methods/`, in
the order of the fields below; see *Adding a method* in CONTRIBUTING.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import optax
from jaxtyping import Array, Float, Key

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen
from codi_jax.pipeline.networks import Networks
from codi_jax.training import optim
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState

F = TypeVar("F", bound=Flags)
S = TypeVar("S", bound="Setup")

Load = Callable[[str], Params]
"""Reads the float32 parameters of one of the teacher's networks, by name."""


@runtime_checkable
class MakeOptimizer(Protocol):
    """Makes an optimizer from the run's flags."""

    def __call__(self, num_updates: int, learning_rate: float | None = None) -> optax.GradientTransformation:
        """An optimizer for this many updates. Default: the learning rate of ``--learning_rate``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A method's setup, made from a model and its flags: hashable, and static in the compiled step.

    A method's own setup has more attributes.

    Examples:
      >>> Setup(networks=networks, student=networks, trained=("unet",), frozen=("vae", "text_encoder"))

    Attributes:
      networks: the teacher's networks, as the loss computes with them.
      student: the student's networks, to compute with, to show and to save.
      trained: the names of the trained networks among them.
      frozen: the names of the teacher's networks whose parameters the step reads.
      target: the name of the network in `Frozen.target`, for distribution matching.
      needs_null_text: whether the step reads `Frozen.null_text`.
      ema_decay: the decay of the trained parameters' moving average; ``None`` keeps none.
    """

    networks: Networks
    student: Networks
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    target: str | None = None
    needs_null_text: bool = False
    ema_decay: float | None = None


@dataclass(frozen=True)
class Export:
    """What a run writes of a state.

    Examples:
      >>> Export({"unet": (setup.student.unet, state.ema["unet"])})

    Attributes:
      networks: (network, parameters) by name, which replace the teacher's.
      beside: additional networks, each in a folder with its name.
      lora: adapters by network name, in a file.
      is_whole: whether the rest of the model is written too, so that the folder can be loaded on its own.
      has_schedule: whether the noise schedule is written, if the rest of the model is not.
    """

    networks: Mapping[str, tuple[Any, Params]] = field(default_factory=dict)
    beside: Mapping[str, tuple[Any, Params]] = field(default_factory=dict)
    lora: Mapping[str, Params] = field(default_factory=dict)
    is_whole: bool = True
    has_schedule: bool = True


@runtime_checkable
class Configure(Protocol[F, S]):
    """Makes the setup of a method."""

    def __call__(self, networks: Networks, flags: F, *, remat: bool = False) -> S:
        """Needs no weights, so that misfits are refused before they are read.

        Args:
          networks: the teacher's networks.
          flags: the method's flags.
          remat: whether trained networks recompute activations in the backward pass.

        Raises:
          ValueError: if the method cannot train this model.
        """
        ...


@runtime_checkable
class Init(Protocol[S]):
    """Makes the state before the first step."""

    def __call__(
        self, setup: S, load: Load, optimizer: Any, key: Key[Array, ""], *, mixed_precision: MixedPrecision = "no"
    ) -> Any:
        """The state: a `TrainState`, or a tree of several with a ``step``.

        Args:
          setup: the method's setup.
          load: reads the teacher's parameters.
          optimizer: from `Method.optimizer`.
          key: the run's key.
          mixed_precision: the computation's precision.
        """
        ...


@runtime_checkable
class Loss(Protocol[S]):
    """The loss of a method that trains one set of parameters."""

    def __call__(
        self, params: Params, state: TrainState, frozen: Frozen, batch: Batch, key: Key[Array, ""], setup: S
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss as a mean over the batch, and additional metrics."""
        ...


@runtime_checkable
class TrainStep(Protocol[S]):
    """One update of everything that is trained."""

    def __call__(
        self, state: Any, frozen: Frozen, batch: Batch, *, setup: S, optimizer: Any, accumulation: int = 1
    ) -> tuple[Any, Metrics]:
        """The state after the update, and metrics; pure, to be compiled with the state donated."""
        ...


def same_sampling(schedule: NoiseSchedule | Any, flags: Flags) -> NoiseSchedule | Any:
    """Samples the student like the teacher; an autoencoder alone has no schedule."""
    del flags
    return schedule


def one_optimizer(flags: Flags, make: MakeOptimizer, num_steps: int) -> optax.GradientTransformation:
    """One optimizer, from the run's flags."""
    del flags
    return make(num_steps)


def result_of_state(state: TrainState, setup: Setup, load: Load) -> Mapping[str, Params]:
    """The parameters to show: the moving average if there is one."""
    del setup, load
    return state.result


def export_result(state: TrainState, setup: Setup, load: Load) -> Export:
    """The trained networks, which replace the teacher's."""
    student = setup.student.by_name()
    return Export({name: (student[name], params) for name, params in result_of_state(state, setup, load).items()})


@dataclass(frozen=True, kw_only=True)
class Method(Generic[F, S]):
    """One way to train or to distill a model.

    Examples:
      >>> METHOD = Method(flags=LcmFlags, sampling=sampling, configure=configure, init=init, loss=loss, export=export)

    Attributes:
      flags: the class of its flags.
      sampling: from the teacher's schedule and the flags, makes the schedule to train with and to save with the
        student; raises `ValueError` if it is impossible.
      configure: makes the setup.
      optimizer: makes the optimizer, or a tuple of several.
      init: makes the state.
      loss: the loss of a method that trains one set of parameters with one optimizer; or
      train_step: the step of any other method.
      result: from a state, the parameters to show, by network name.
      export: from a state, what to write.
    """

    flags: type[F]
    configure: Configure[F, S]
    init: Init[S]
    sampling: Callable[[NoiseSchedule, F], NoiseSchedule] = same_sampling
    optimizer: Callable[[F, MakeOptimizer, int], Any] = one_optimizer
    loss: Loss[S] | None = None
    train_step: TrainStep[S] | None = None
    result: Callable[[Any, S, Load], Mapping[str, Params]] = result_of_state
    export: Callable[[Any, S, Load], Export] = export_result

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.train_step is None):
            raise TypeError("a method has either a loss or a train_step.")

    def step(self, setup: S, optimizer: Any, accumulation: int = 1) -> Callable[..., tuple[Any, Metrics]]:
        """The function ``step(state, frozen, batch) -> (state, metrics)`` for a setup; pure.

        Args:
          setup: the method's setup.
          optimizer: from `optimizer`.
          accumulation: the number of microbatches per update.
        """
        train_step = self.train_step or partial(update, self.loss)
        return partial(train_step, setup=setup, optimizer=optimizer, accumulation=accumulation)


def update(
    loss: Any,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    setup: Setup,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of one set of parameters, and of its moving average; see `codi_jax.training.optim.step`.

    Args:
      loss: the method's loss.
      state: the state before.
      frozen: the frozen trees that the loss reads.
      batch: the samples of the update.
      setup: the method's setup.
      optimizer: the optimizer that the state was made with.
      accumulation: the number of microbatches.
    """
    return optim.step(
        state,
        lambda params, batch, key: loss(params, state, frozen, batch, key, setup),
        batch,
        optimizer,
        accumulation=accumulation,
        ema_decay=setup.ema_decay,
    )
