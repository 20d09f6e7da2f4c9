"""Optimization: AdamW and its learning rate from flags, and one update of the trained parameters as a pure function.

`step` is one update of one set of parameters: gradients, accumulated over microbatches inside the program; the update,
unless a number is not finite; the moving average. A method that trains two networks against each other has a
`TrainState` and an optimizer for each, and calls `step` for each.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from codi_jax.cli.flags import Adjustable, Flags, Topic
from codi_jax.models.config import Params
from codi_jax.training.adam_8bit import scale_by_adam_8bit

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
MixedPrecision = Literal["no", "fp16", "bf16"]

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
LossFunction = Callable[[Params, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]
"""``loss(params, batch, key)``: a mean over the batch, float32, and other scalars worth logging."""
Tree = TypeVar("Tree")

POLYNOMIAL_END = 1e-7  # the end of diffusers' polynomial schedule, which no flag of its scripts changes
# From torch.amp.GradScaler.
INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWTH_INTERVAL = 2000


@dataclass(frozen=True)
class OptimizerFlags(Flags):
    """The flags of optimizer, learning rate and precision."""

    topic: ClassVar[Topic] = Topic.OPTIMIZER

    learning_rate: Adjustable[float] = 1e-4
    """The learning rate, after warm-up."""
    scale_lr: Adjustable[bool] = False
    """Multiply the learning rate by the number of samples per update: devices times accumulation times batch size."""
    lr_scheduler: Adjustable[Schedule] = "constant"
    """How the learning rate changes over the run."""
    lr_warmup_steps: Adjustable[int] = 500
    """Steps over which the learning rate rises from 0; constant has no warm-up."""
    lr_num_cycles: Adjustable[int] = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Adjustable[float] = 1.0
    """The exponent of polynomial."""
    use_8bit_adam: bool = False
    """Keep Adam's two moments in 8 bits: 2 bytes per parameter instead of 8."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_weight_decay: Adjustable[float] = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of Adam's step."""
    max_grad_norm: Adjustable[float] = 1.0
    """Gradients are scaled down to this norm; inf for no limit."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the computation; trained parameters are always float32. fp16 scales the loss dynamically."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "learning_rate", "lr_warmup_steps", "lr_power", "adam_weight_decay")
        self.require_at_least(1, "lr_num_cycles")
        rises = self.lr_scheduler == "polynomial" and not self.scale_lr and self.learning_rate <= POLYNOMIAL_END
        self.require("learning_rate", not rises, f"above {POLYNOMIAL_END}, where --lr_scheduler polynomial ends")
        self.require("adam_beta1", 0 <= self.adam_beta1 < 1, "in [0, 1)")
        self.require("adam_beta2", 0 <= self.adam_beta2 < 1, "in [0, 1)")
        self.require("adam_epsilon", self.adam_epsilon > 0, "positive")
        self.require("max_grad_norm", self.max_grad_norm > 0, "positive; inf is no limit")


@dataclass(frozen=True)
class EmaFlags(Flags):
    """The flags of the parameters' moving average, for methods where it is optional."""

    topic: ClassVar[Topic] = Topic.OPTIMIZER

    use_ema: bool = False
    """Keep a moving average of the parameters, and show and save it."""
    ema_decay: float = 0.999
    """Decay of the moving average, per update."""

    def check(self) -> None:
        super().check()
        self.require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")

    @property
    def kept_ema_decay(self) -> float | None:
        """The decay, as `step` expects it."""
        return self.ema_decay if self.use_ema else None


def compute_dtype(mixed_precision: MixedPrecision) -> Any:
    """The dtype of the networks' computation."""
    return {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}[mixed_precision]


# ---- Optimizer and schedule


def learning_rate_schedule(flags: OptimizerFlags, num_steps: int, *, batch_size: int = 1) -> optax.Schedule:
    """The learning rate by step, as in diffusers' ``get_scheduler``.

    Args:
      flags: the schedule and its parameters.
      num_steps: the number of steps of the complete run, including warm-up.
      batch_size: the number of samples per update, for ``scale_lr``.

    Returns:
      A function of the number of updates made so far.

    Raises:
      ValueError: if a polynomial schedule would have to rise to its end.
    """
    peak = flags.learning_rate * (batch_size if flags.scale_lr else 1)
    warmup = 0 if flags.lr_scheduler == "constant" else flags.lr_warmup_steps
    decay_steps = max(num_steps - warmup, 1)
    if flags.lr_scheduler == "polynomial" and not peak > POLYNOMIAL_END:
        raise ValueError(
            f"--lr_scheduler polynomial ends at {POLYNOMIAL_END}, so --learning_rate {peak} must be above that."
        )

    def schedule(count: Any) -> Float[Array, ""]:
        count = jnp.asarray(count)
        rising = count / max(warmup, 1)
        return peak * jnp.where(count < warmup, rising, _decay(flags, peak, count - warmup, decay_steps))

    return schedule


def _decay(flags: OptimizerFlags, peak: float, done: Array, steps: int) -> Array:
    """The learning rate's factor after ``done`` of the ``steps`` after warm-up."""
    progress = done / steps
    match flags.lr_scheduler:
        case "constant" | "constant_with_warmup":
            return jnp.ones_like(progress)
        case "linear":
            return jnp.maximum(1 - progress, 0.0)
        case "cosine":
            return 0.5 * (1 + jnp.cos(math.pi * progress))
        case "cosine_with_restarts":
            # In integers, because in float32 the end of a cycle may round to the start of the next.
            in_cycle = (flags.lr_num_cycles * done % steps) / steps
            return jnp.where(done < steps, 0.5 * (1 + jnp.cos(math.pi * in_cycle)), 0.0)
        case "polynomial":
            end = POLYNOMIAL_END / peak
            return (1 - end) * jnp.clip(1 - progress, 0.0, 1.0) ** flags.lr_power + end


def make_optimizer(flags: OptimizerFlags, num_steps: int, *, batch_size: int = 1) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019), after clipping the gradients by their global norm.

    Leaves without axes and leaves named ``alpha``, the constants of a LoRA, are neither decayed nor changed.

    Args:
      flags: the optimizer's parameters.
      num_steps: the number of updates of the complete run.
      batch_size: the number of samples per update, for ``scale_lr``.

    Raises:
      ValueError: as in `learning_rate_schedule`.
    """
    scale_by_adam = scale_by_adam_8bit if flags.use_8bit_adam else optax.scale_by_adam
    return optax.chain(
        optax.masked(optax.set_to_zero(), _are_constants),
        optax.clip_by_global_norm(flags.max_grad_norm),
        scale_by_adam(b1=flags.adam_beta1, b2=flags.adam_beta2, eps=flags.adam_epsilon),
        optax.add_decayed_weights(flags.adam_weight_decay, mask=are_weights),
        # Injected, the learning rate is part of the state, where the metrics find it.
        optax.inject_hyperparams(optax.scale_by_learning_rate)(
            learning_rate=learning_rate_schedule(flags, num_steps, batch_size=batch_size)
        ),
    )


def maker(flags: OptimizerFlags, batch_size: int) -> Callable[..., optax.GradientTransformation]:
    """A `codi_jax.training.method.MakeOptimizer` for these flags.

    Args:
      flags: the optimizer's parameters.
      batch_size: the number of samples per update.
    """

    def make(num_updates: int, learning_rate: float | None = None) -> optax.GradientTransformation:
        chosen = flags if learning_rate is None else replace(flags, learning_rate=learning_rate)
        return make_optimizer(chosen, num_updates, batch_size=batch_size)

    return make


def are_weights(params: Any) -> Any:
    """``False`` for constants in a tree of parameters, ``True`` for trained leaves."""

    def is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 0 and getattr(path[-1], "key", None) != "alpha"

    return jax.tree_util.tree_map_with_path(is_weight, params)


def _are_constants(params: Any) -> Any:
    return jax.tree.map(lambda is_weight: not is_weight, are_weights(params))


# ---- State


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """The factor on the loss that keeps small float16 gradients above zero (Micikevicius et al., 2018, section 3.2).

    Attributes:
      scale: the factor, float32.
      good_steps: finite steps since it last changed, int32.
    """

    scale: Float[Array, ""] | Any
    good_steps: Int[Array, ""] | Any

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """Halved after an overflow, down to 1; doubled after 2,000 finite steps in a row."""
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grows = good_steps == LOSS_SCALE_GROWTH_INTERVAL
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(jnp.maximum(self.scale * factor, 1.0), jnp.where(grows, 0, good_steps))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that one update changes.

    Attributes:
      step: the number of attempted updates, including skipped ones, int32.
      params: the trained parameters, float32.
      opt_state: the optimizer's state.
      ema: the moving average of ``params``, float32, or ``None``.
      key: the run's key. It never changes: the randomness of a step comes from ``fold_in(key, step)``.
      loss_scale: for float16 computation, else ``None``.
      skipped: the number of steps skipped because of non-finite numbers, int32.
      skipped_in_a_row: the number of steps skipped since the last update, int32.
    """

    step: Int[Array, ""] | Any
    params: Any
    opt_state: Any
    ema: Any
    key: Key[Array, ""] | Any
    loss_scale: LossScale | Any
    skipped: Int[Array, ""] | Any
    skipped_in_a_row: Int[Array, ""] | Any

    @property
    def result(self) -> Any:
        """The parameters to show and to save: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    ema: bool = False,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first update.

    It owns all of its arrays: the state is donated to the compiled step, while ``params`` may be shared with a frozen
    network (a ControlNet starts from the UNet's own arrays).

    Args:
      params: the parameters to train.
      optimizer: from `make_optimizer`.
      key: the run's key.
      ema: whether to keep a moving average, which starts at ``params``.
      mixed_precision: the computation's precision.
    """
    params = _copy(params)
    is_fp16 = mixed_precision == "fp16"
    return TrainState(
        step=_zero(),
        params=params,
        opt_state=optimizer.init(params),
        ema=_copy(params) if ema else None,
        key=jnp.copy(key),
        loss_scale=LossScale(jnp.float32(INITIAL_LOSS_SCALE), _zero()) if is_fp16 else None,
        skipped=_zero(),
        skipped_in_a_row=_zero(),
    )


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


# ---- One update


def step(
    state: TrainState,
    loss: LossFunction,
    batch: Batch,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the parameters; pure, to be compiled with the state donated.

    Args:
      state: the state before the update.
      loss: the function to minimize.
      batch: arrays with a leading axis of all samples of the update.
      optimizer: the optimizer that the state was made with.
      accumulation: the number of microbatches that the batch is computed in, one after another.
      ema_decay: the moving average's decay; ``None`` leaves the average unchanged.

    Returns:
      The state after the update, and as metrics ``loss``, ``grad_norm`` (before clipping), ``learning_rate``,
      ``skipped``, ``skipped_in_a_row``, and those of the loss.

    Raises:
      ValueError: if the batch cannot be divided into this many.
    """
    grads, metrics = accumulate_gradients(
        loss, state.params, batch, step_key(state), accumulation=accumulation, loss_scale=state.loss_scale
    )
    return apply_gradients(state, grads, metrics, optimizer, ema_decay=ema_decay)


def step_key(state: TrainState) -> Key[Array, ""]:
    """The key of the next step."""
    return jax.random.fold_in(state.key, state.step)


def accumulate_gradients(
    loss: LossFunction,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    accumulation: int = 1,
    loss_scale: LossScale | None = None,
) -> tuple[Params, Metrics]:
    """The gradient of the loss, as the mean over microbatches, each with its own key: ``fold_in(key, i)``.

    Args:
      loss: the function.
      params: the point to evaluate it at.
      batch: arrays with a leading axis of all samples.
      key: the step's key.
      accumulation: the number of microbatches.
      loss_scale: the factor to multiply the loss with and to divide the gradients by.

    Returns:
      The gradients, and the means of ``loss`` and of its metrics.

    Raises:
      ValueError: as in `step`.
    """
    scale = jnp.float32(1) if loss_scale is None else loss_scale.scale

    def scaled(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        value, metrics = loss(params, batch, key)
        return value * scale, {"loss": value, **metrics}

    gradient = jax.grad(scaled, has_aux=True)

    def microbatch(total: Params, indexed: tuple[Array, Batch]) -> tuple[Params, Metrics]:
        i, batch = indexed
        grads, metrics = gradient(params, batch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, grads), metrics

    if accumulation == 1:
        grads, metrics = gradient(params, batch, jax.random.fold_in(key, 0))
    else:
        microbatches = (jnp.arange(accumulation), _microbatches(batch, accumulation))
        grads, metrics = jax.lax.scan(microbatch, jax.tree.map(jnp.zeros_like, params), microbatches)
        metrics = jax.tree.map(lambda values: values.mean(axis=0), metrics)
    return jax.tree.map(lambda g: g / (scale * accumulation), grads), metrics


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, …] to [count, B / count, …]. Groups every ``count``-th sample, so that no sample moves to another device."""

    def split(x: Array) -> Array:
        if x.shape[0] % count:
            raise ValueError(
                f"A batch of {x.shape[0]} samples cannot be divided by --gradient_accumulation_steps {count}."
            )
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def apply_gradients(
    state: TrainState,
    grads: Params,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters and their moving average, unless the loss or a gradient is not finite.

    Args:
      state: the state before the update.
      grads: the gradients of its ``params``.
      metrics: metrics that include the ``loss``.
      optimizer: the optimizer that the state was made with.
      ema_decay: as in `step`.

    Returns:
      The state after the update, and the metrics of `step`.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema if ema_decay is None else ema_update(state.ema, params, ema_decay)
    new = _select(finite, (params, opt_state, ema), (state.params, state.opt_state, state.ema))
    params, opt_state, ema = new
    state = replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        loss_scale=None if state.loss_scale is None else state.loss_scale.after(finite),
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    return state, {"grad_norm": grad_norm, **metrics, **status(state)}


def status(state: TrainState) -> Metrics:
    """The metrics that depend only on the state: ``learning_rate``, ``skipped`` and ``skipped_in_a_row``."""
    injected = optax.tree.get(state.opt_state, "hyperparams", {})  # the learning rate
    return {**injected, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}


def ema_update(ema: Tree, params: Tree, decay: float | Float[Array, ""]) -> Tree:
    """θ⁻ ← μ θ⁻ + (1 − μ) θ, in float32."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), ema, params)


def _select(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
