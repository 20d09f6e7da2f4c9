"""DisBack: distribution backtracking on distribution matching distillation (Zhang et al., 2024, arXiv:2408.15991).

Distribution matching asks of the teacher's score where an untrained generator's samples should go, which are far from
anything that the teacher knows. DisBack gives it nearer targets (section 4):

1. *Degradation recording*: φ starts as the teacher and is trained on the samples of the untrained generator G, by L_φ,
   with G at rest. Every so many steps it is a node of the path from the teacher to the score of G: s'_1 … s'_M.
2. *Distribution backtracking*: φ goes on as s'_M, G is trained by L_G, and its target θ walks the path backwards:
   s'_M−1, …, s'_1, and at last the teacher itself, where it stays.

L_G and L_φ are those of `codi_jax.methods.dmd`, and without stage 1, with the teacher as the target
throughout, this is plain DMD. Which node θ is, is no concern of the step: it is the ``unet`` of what is frozen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from codi_jax.methods.dmd import Config, MatchingFlags, fake_loss, generator_loss
from codi_jax.methods.generator import init_generator
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen
from codi_jax.training import optim
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]
"""Of the generator, and of the fake score."""


@dataclasses.dataclass(frozen=True)
class DisbackFlags(MatchingFlags):
    """The flags of DisBack."""

    num_nodes: int = 10
    """Nodes of the path that stage 1 records."""
    degradation_interval: int = 100
    """Steps of stage 1 from one node to the next."""
    interval: int = 1000
    """Updates of the generator for which a node is the target in stage 2; then comes the next one, at last the
    teacher."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_nodes", "degradation_interval", "interval")


def target_index(step: int, flags: DisbackFlags, num_nodes: int) -> int:
    """Which score of the reversed path s'_M, …, s'_1, teacher is the target after ``step`` steps: 1 to M.

    φ starts as the 0th. The index follows from how often the generator was updated, ⌈step / k⌉, so that a run which is
    resumed has the same; at M it is the teacher, and stays.

    Args:
      step: steps of stage 2 that were made.
      flags: of the method.
      num_nodes: M.
    """
    updates = -(-step // flags.dfake_gen_update_ratio)
    return min(updates // flags.interval + 1, num_nodes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DisbackState:
    """The state of stage 2.

    Attributes:
      generator: G, ``unet`` or ``unet_lora``, and its moving average; its step counts updates of the generator.
      fake: φ, ``unet``, and ``head`` for the GAN loss.
    """

    generator: TrainState | Any
    fake: TrainState | Any

    @property
    def step(self) -> Int[Array, ""]:
        """Steps that were tried: the fake score takes one in each."""
        return self.fake.step


def init_state(
    config: Config,
    teacher_params: Params,
    fake_params: Params,
    optimizers: Optimizers,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> DisbackState:
    """The state before the first step of stage 2: G starts as the teacher, φ as the end of the path.

    Args:
      config: of the method.
      teacher_params: of the teacher's UNet.
      fake_params: of the most degraded node; the teacher's for plain DMD.
      optimizers: each from `codi_jax.training.optim.make_optimizer`.
      key: of the run.
      mixed_precision: of the computation.
    """
    generator_key, fake_key, lora_key, head_key = jax.random.split(key, 4)
    fake: Params = {"unet": fake_params}
    if config.flags.cls_on_clean_image:
        fake["head"] = config.head.random_params(head_key)
    generator = init_generator(config.flags, teacher_params, lora_key)
    ema = config.flags.use_ema
    return DisbackState(
        optim.init_state(generator, optimizers[0], generator_key, ema=ema, mixed_precision=mixed_precision),
        optim.init_state(fake, optimizers[1], fake_key, mixed_precision=mixed_precision),
    )


def degradation_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """Stage 1: one update of φ, which started as the teacher, on what the untrained generator makes.

    That is the teacher too, ``unet`` of what is frozen.
    """
    generator = {"unet": frozen["unet"]}
    return fake_step(state, generator, frozen, batch, config=config, optimizer=optimizer, accumulation=accumulation)


def train_step(
    state: DisbackState,
    frozen: Frozen,
    batch: Batch,
    *,
    config: Config,
    optimizers: Optimizers,
    accumulation: int = 1,
) -> tuple[DisbackState, Metrics]:
    """Stage 2: an update of G in every k-th step, and then one of φ, on what G makes now.

    One program: the update of G is a branch that the device takes or not. φ's update comes after it and sees the new G,
    so that nothing of the old one has to be kept.

    Returns:
      The state, and as metrics those of φ's step, and ``generator_loss``, ``generator_grad_norm`` and
      ``generator_learning_rate``. The first two are infinite where G was not updated, which means over several steps
      leave out.
    """
    common: dict[str, Any] = {"config": config, "accumulation": accumulation}

    def update(generator: TrainState) -> tuple[TrainState, tuple[Array, Array]]:
        fake = state.fake.params
        generator, metrics = generator_step(generator, fake, frozen, batch, optimizer=optimizers[0], **common)
        return generator, (metrics["loss"], metrics["grad_norm"])

    def keep(generator: TrainState) -> tuple[TrainState, tuple[Array, Array]]:
        return generator, (jnp.float32(jnp.inf), jnp.float32(jnp.inf))

    is_turn = state.step % config.flags.dfake_gen_update_ratio == 0
    generator, (loss, grad_norm) = jax.lax.cond(is_turn, update, keep, state.generator)
    fake, metrics = fake_step(state.fake, generator.params, frozen, batch, optimizer=optimizers[1], **common)
    of_generator = {"loss": loss, "grad_norm": grad_norm, **optim.status(generator)}
    metrics |= {f"generator_{name}": value for name, value in of_generator.items()}
    in_a_row = jnp.maximum(fake.skipped_in_a_row, generator.skipped_in_a_row)
    return DisbackState(generator, fake), {**metrics, "skipped_in_a_row": in_a_row}


def generator_step(
    state: TrainState,
    fake: Params,
    frozen: Frozen,
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of G by L_G, with φ at rest."""
    return optim.step(
        state,
        lambda params, batch, key: generator_loss(params, fake, frozen, batch, key, config),
        batch,
        optimizer,
        accumulation=accumulation,
        ema_decay=config.flags.decay_if_kept,
    )


def fake_step(
    state: TrainState,
    generator: Params,
    frozen: Frozen,
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of φ by L_φ, with G at rest."""
    return optim.step(
        state,
        lambda params, batch, key: fake_loss(params, generator, frozen, batch, key, config),
        batch,
        optimizer,
        accumulation=accumulation,
    )
