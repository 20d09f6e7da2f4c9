"""DisBack: distribution backtracking on distribution matching distillation (Zhang et al., 2024, arXiv:2408.15991).

Distribution matching relies on the teacher's score at an untrained generator's samples, which are far from anything the
teacher has seen. DisBack provides closer targets (section 4):

1. *Degradation recording*: φ starts as the teacher and is trained on the samples of the untrained generator G, by L_φ,
   with G fixed. Every few steps it becomes a node of the path from the teacher to the score of G: s'_1 … s'_M.
2. *Distribution backtracking*: φ continues as s'_M, G is trained by L_G, and its target θ walks the path backward:
   s'_M−1, …, s'_1, and finally the teacher itself, where it stays.

L_G and L_φ come from `codi_jax.methods.dmd`; without stage 1, with the teacher as the target throughout, this is plain
DMD. The step does not know which node θ is: it only sees the frozen target.
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
"""The learning rates of the generator and the fake score."""


@dataclass(frozen=True)
class DisbackFlags(DmdFlags):
    """The flags of DisBack."""

    num_nodes: int = 10
    """Number of nodes of the path that stage 1 records."""
    degradation_interval: int = 100
    """Steps between two nodes in stage 1."""
    interval: int = 1000
    """Updates of the generator per target node in stage 2; then the next node is the target, and finally the
    teacher."""

    generator_ckpt_path: str | None = None
    """Where the generator starts: a UNet of the teacher's architecture, as a file or a folder. Default: the teacher."""
    generator_lr: Adjustable[float | None] = None
    """The learning rate of the generator. Default: --learning_rate."""
    guidance_lr: Adjustable[float | None] = None
    """The learning rate of the fake score, in both stages. Default: --learning_rate."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "num_nodes", "degradation_interval", "interval")
        self.require_at_least(0, "generator_lr", "guidance_lr")
        if self.generator_ckpt_path is not None and self.generator_lora:
            raise ValueError("--generator_lora starts as the teacher: give it, or --generator_ckpt_path.")


def target_index(step: int, flags: DisbackFlags, num_nodes: int) -> int:
    """The index of the target on the reversed path s'_M, …, s'_1, teacher after ``step`` steps: 1 to M.

    φ starts as the 0th. The index depends only on the number of generator updates, ⌈step / k⌉, so that a resumed run
    has the same; from M on it is the teacher.

    Args:
      step: completed steps of stage 2.
      flags: the method's flags.
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
        """Attempted steps: the fake score takes one in each."""
        return self.fake.step


@dataclass(frozen=True, kw_only=True)
class DisbackSetup(DmdSetup):
    """Everything that the compiled steps depend on besides arrays.

    Attributes:
      flags: the method's flags.
      has_path: whether there is a path to walk back; otherwise this is plain DMD.
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
      networks: the teacher's networks.
      flags: the method's flags.
      side: the side of the images in pixels, which prompts do not tell.
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
    """One optimizer for the generator, which is updated every k-th step, and one for the fake score."""
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

    In plain DMD, φ starts as the teacher too. With ``generator_ckpt_path``, G starts as ``generator``.
    """
    flags, unet = setup.flags, load("unet")
    generator_key, fake_key, lora_key, head_key = jax.random.split(key, 4)
    fake: Params = {"unet": load("path_end") if setup.has_path else unet}
    if flags.cls_on_clean_image:
        fake["head"] = setup.head.random_params(head_key)
    start = unet if flags.generator_ckpt_path is None else load("generator")
    generator = init_generator(flags, start, lora_key)
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
    """Stage 2: an update of G in every k-th step, then an update of φ on the new G's samples.

    One program: the update of G is a branch on the device. φ's update comes after it and sees the new G, so nothing of
    the old one has to be kept.

    Returns:
      The state, and as metrics those of φ's step plus ``generator_loss``, ``generator_grad_norm`` and
      ``generator_learning_rate``. The first two are infinite if G was not updated; averages over several steps skip
      such values.
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
    """One update of G by L_G, with φ fixed."""
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
    """One update of φ by L_φ, with G fixed."""
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
    """Stage 2, or plain DMD, for images with this side in pixels."""
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
    """Like `configure`; all of the teacher is frozen, since it is the generator."""
    setup = configure(networks, flags, side=side, remat=remat)
    return replace(setup, frozen=tuple(networks.by_name()), target=None, needs_null_text=False, ema_decay=None)


def degradation_optimizer(flags: DisbackFlags, make: MakeOptimizer, num_steps: int) -> optax.GradientTransformation:
    """The fake score's optimizer."""
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
    """Stage 1: one update of φ on samples of the untrained generator.

    It is the frozen ``unet``: the teacher, unless G starts elsewhere.
    """
    generator = {"unet": frozen.params["unet"]}
    return fake_step(state, generator, frozen, batch, setup=setup, optimizer=optimizer, accumulation=accumulation)


def degradation(side: int) -> Method[DisbackFlags, DisbackSetup]:
    """Stage 1, for images with this side in pixels. Its result is the path, not a model."""
    return Method(
        flags=DisbackFlags,
        sampling=sampling,
        configure=partial(configure_degradation, side=side),
        optimizer=degradation_optimizer,
        init=init_degradation,
        train_step=degradation_step,
        export=lambda state, setup, load: Export(is_whole=False, has_schedule=False),
    )
