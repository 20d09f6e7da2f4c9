"""DisBack: distribution backtracking on distribution matching distillation (Zhang et al., 2024, arXiv:2408.15991).

Distribution matching asks of the teacher's score where an untrained generator's samples should go, which are far from
anything that the teacher knows. DisBack gives it nearer targets (section 4):

1. *Degradation recording*: φ starts as the teacher and is trained on the samples of the untrained generator G, by L_φ,
   with G at rest. Every so many steps it is a node of the path from the teacher to the score of G: s'_1 … s'_M.
2. *Distribution backtracking*: φ goes on as s'_M, G is trained by L_G, and its target θ walks the path backwards:
   s'_M−1, …, s'_1, and at last the teacher itself, where it stays.

L_G and L_φ are those of `codi_jax.methods.dmd`, and without stage 1, with the teacher as the target
throughout, this is plain DMD. Which node θ is does not concern the step: it is the target among what is frozen.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from codi_jax.cli.flags import Adjustable
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.methods.dmd import DmdFlags, DmdSetup, fake_loss, generator_loss
from codi_jax.methods.generator import Generator, generator_schedule, generator_unet, init_generator
from codi_jax.models.config import Params
from codi_jax.pipeline.conditions import Batch, Frozen
from codi_jax.pipeline.networks import Networks, refuse_guidance_input
from codi_jax.training import optim
from codi_jax.training.method import Export, Load, MakeOptimizer, Method
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]
"""Of the generator, and of the fake score."""


@dataclass(frozen=True)
class DisbackFlags(DmdFlags):
    """The flags of DisBack."""

    num_nodes: int = 10
    """Nodes of the path that stage 1 records."""
    degradation_interval: int = 100
    """Steps of stage 1 from one node to the next."""
    interval: int = 1000
    """Updates of the generator for which a node is the target in stage 2; then comes the next one, at last the
    teacher."""

    generator_lr: Adjustable[float | None] = None
    """The learning rate of the generator. Default: --learning_rate."""
    guidance_lr: Adjustable[float | None] = None
    """That of the fake score, in both stages. Default: --learning_rate."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_nodes", "degradation_interval", "interval")
        self.require_at_least(0, "generator_lr", "guidance_lr")


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
@dataclass(frozen=True)
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


@dataclass(frozen=True, kw_only=True)
class DisbackSetup(DmdSetup):
    """What the compiled steps depend on besides arrays.

    Attributes:
      flags: of the method.
      has_path: whether there is a path to walk back; else this is plain DMD.
    """

    flags: DisbackFlags
    has_path: bool = False


def sampling(schedule: NoiseSchedule, flags: DisbackFlags) -> NoiseSchedule:
    """The schedule to save with the generator: see `codi_jax.methods.generator.generator_schedule`."""
    return generator_schedule(schedule, flags)


def configure(
    networks: Networks, flags: DisbackFlags, *, side: int, has_path: bool = False, remat: bool = False
) -> DisbackSetup:
    """The generator and the scores, all with the teacher's UNet.

    Args:
      networks: of the teacher.
      flags: of the method.
      side: of the images, in pixels: prompts do not say it.
      has_path: whether stage 1 has recorded a path.
      remat: whether UNets recompute activations.

    Raises:
      ValueError: if the teacher has been distilled already, or is an inpainting model.
    """
    refuse_guidance_input(networks.unet, "so it has been distilled already: give the model that it was distilled from")
    if networks.task == "inpaint":
        raise ValueError("the teacher is for the task 'inpaint', which DisBack is not implemented for.")
    networks = networks.recomputing("unet", remat=remat)
    vae = networks.vae.config
    shape = (side // vae.downscale, side // vae.downscale, vae.latent_channels)
    others = tuple(name for name in networks.by_name() if name != "unet")
    return DisbackSetup(
        networks=networks,
        student=networks,
        trained=("unet",),
        frozen=(*others, "unet") if flags.generator_lora else others,
        target=None if has_path else "unet",
        needs_null_text=True,
        ema_decay=flags.kept_ema_decay,
        flags=flags,
        generator=Generator(networks, flags, shape),
        has_path=has_path,
    )


def optimizers(flags: DisbackFlags, make: MakeOptimizer, num_steps: int) -> Optimizers:
    """One for the generator, which is updated in every k-th step, and one for the fake score."""
    updates = -(-num_steps // flags.dfake_gen_update_ratio)
    return make(updates, flags.generator_lr), make(num_steps, flags.guidance_lr)


def init(
    setup: DisbackSetup,
    load: Load,
    optimizer: Optimizers,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> DisbackState:
    """The state before the first step of stage 2: G starts as the teacher, φ as the end of the path, ``path_end``.

    In plain DMD, φ starts as the teacher, too.
    """
    flags, unet = setup.flags, load("unet")
    generator_key, fake_key, lora_key, head_key = jax.random.split(key, 4)
    fake: Params = {"unet": load("path_end") if setup.has_path else unet}
    if flags.cls_on_clean_image:
        fake["head"] = setup.head.random_params(head_key)
    generator = init_generator(flags, unet, lora_key)
    return DisbackState(
        optim.init_state(generator, optimizer[0], generator_key, ema=flags.use_ema, mixed_precision=mixed_precision),
        optim.init_state(fake, optimizer[1], fake_key, mixed_precision=mixed_precision),
    )


def train_step(
    state: DisbackState,
    frozen: Frozen,
    batch: Batch,
    *,
    setup: DisbackSetup,
    optimizer: Optimizers,
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
    common: dict[str, Any] = {"setup": setup, "accumulation": accumulation}

    def update(generator: TrainState) -> tuple[TrainState, tuple[Array, Array]]:
        fake = state.fake.params
        generator, metrics = generator_step(generator, fake, frozen, batch, optimizer=optimizer[0], **common)
        return generator, (metrics["loss"], metrics["grad_norm"])

    def keep(generator: TrainState) -> tuple[TrainState, tuple[Array, Array]]:
        return generator, (jnp.float32(jnp.inf), jnp.float32(jnp.inf))

    is_turn = state.step % setup.flags.dfake_gen_update_ratio == 0
    generator, (loss, grad_norm) = jax.lax.cond(is_turn, update, keep, state.generator)
    fake, metrics = fake_step(state.fake, generator.params, frozen, batch, optimizer=optimizer[1], **common)
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
    setup: DisbackSetup,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of G by L_G, with φ at rest."""
    return optim.step(
        state,
        lambda params, batch, key: generator_loss(params, fake, frozen, batch, key, setup),
        batch,
        optimizer,
        accumulation=accumulation,
        ema_decay=setup.ema_decay,
    )


def fake_step(
    state: TrainState,
    generator: Params,
    frozen: Frozen,
    batch: Batch,
    *,
    setup: DisbackSetup,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of φ by L_φ, with G at rest."""
    return optim.step(
        state,
        lambda params, batch, key: fake_loss(params, generator, frozen, batch, key, setup),
        batch,
        optimizer,
        accumulation=accumulation,
    )


def result(state: DisbackState, setup: DisbackSetup, load: Load) -> dict[str, Params]:
    """The generator's UNet as one network."""
    return {"unet": generator_unet(state.generator.result, load("unet") if setup.flags.generator_lora else {})}


def export(state: DisbackState, setup: DisbackSetup, load: Load) -> Export:
    """The generator, and its LoRA as a file."""
    unet = result(state, setup, load)["unet"]
    lora = {"unet": state.generator.result["unet_lora"]} if setup.flags.generator_lora else {}
    return Export({"unet": (replace(setup.student.unet, remat=False), unet)}, lora=lora)


def backtracking(side: int, has_path: bool) -> Method[DisbackFlags, DisbackSetup]:
    """Stage 2, or plain DMD, for images of this side in pixels."""
    return Method(
        flags=DisbackFlags,
        sampling=sampling,
        configure=partial(configure, side=side, has_path=has_path),
        optimizer=optimizers,
        init=init,
        train_step=train_step,
        result=result,
        export=export,
    )


# ---- Stage 1: φ from the teacher to the score of the untrained generator


def configure_degradation(networks: Networks, flags: DisbackFlags, *, side: int, remat: bool = False) -> DisbackSetup:
    """As `configure`; all of the teacher is frozen, since it is the generator."""
    setup = configure(networks, flags, side=side, remat=remat)
    return replace(setup, frozen=tuple(networks.by_name()), target=None, needs_null_text=False, ema_decay=None)


def degradation_optimizer(flags: DisbackFlags, make: MakeOptimizer, num_steps: int) -> optax.GradientTransformation:
    """The one of the fake score."""
    return make(num_steps, flags.guidance_lr)


def init_degradation(
    setup: DisbackSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step of stage 1: φ starts as the teacher."""
    del setup
    return optim.init_state({"unet": load("unet")}, optimizer, key, mixed_precision=mixed_precision)


def degradation_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    setup: DisbackSetup,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """Stage 1: one update of φ on what the untrained generator makes, which is the frozen teacher."""
    generator = {"unet": frozen.params["unet"]}
    return fake_step(state, generator, frozen, batch, setup=setup, optimizer=optimizer, accumulation=accumulation)


def degradation(side: int) -> Method[DisbackFlags, DisbackSetup]:
    """Stage 1, for images of this side in pixels. What it leaves is the path, and no model."""
    return Method(
        flags=DisbackFlags,
        sampling=sampling,
        configure=partial(configure_degradation, side=side),
        optimizer=degradation_optimizer,
        init=init_degradation,
        train_step=degradation_step,
        export=lambda state, setup, load: Export(is_whole=False, has_schedule=False),
    )
