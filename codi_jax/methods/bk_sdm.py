"""BK-SDM: a student with fewer blocks, distilled by its teacher's features (Kim et al., 2023, arXiv:2305.15798).

    L = L_task + λ_out · mean‖F_θ(z_t, t, c) − F_T(z_t, t, c)‖² + λ_feat · Σ_l mean‖f_θ^l − f_T^l‖²

with F the outputs of student and teacher, and f^l the outputs of their blocks, for the pairs of blocks l of
`codi_jax.models.pruning.feature_pairs`. L_task is the loss of plain training. θ starts as the teacher's remaining
blocks, see `codi_jax.models.pruning.prune`.

Nothing bounds the scale of features, and where it is large their term dominates. With ``feature_normalize``, an
extension of this project, the distance of each pair and sample is divided by mean‖f_T^l‖².

Beyond plain training, its neighbor: the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from codi_jax.diffusion.losses import mse
from codi_jax.methods import denoising
from codi_jax.methods.denoising import DenoisingSetup, DenoisingTask, NoiseFlags
from codi_jax.models.config import Params
from codi_jax.models.pruning import Features, KeptBlocks, feature_pairs, prune, whole
from codi_jax.pipeline.conditions import Batch, Frozen
from codi_jax.pipeline.networks import Networks, refuse_guidance_input
from codi_jax.pipeline.prediction import predict_with_intermediates
from codi_jax.training import optim
from codi_jax.training.method import Load, Method
from codi_jax.training.optim import Metrics, MixedPrecision, TrainState


@dataclass(frozen=True)
class BkSdmFlags(NoiseFlags):
    """The flags of BK-SDM, beyond those of plain training."""

    output_weight: float = 1.0
    """Weight of the distance between the outputs of student and teacher."""
    feature_weight: float = 1.0
    """Weight of the distance between the outputs of their blocks. With both weights 0 this is plain training."""
    feature_normalize: bool = False
    """Divide the distance of each pair of blocks by the size of the teacher's features, so that neither a single pair
    nor all features together dominate the loss."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "output_weight", "feature_weight")


@dataclass(frozen=True, kw_only=True)
class BkSdmSetup(DenoisingSetup):
    """Everything that the compiled step depends on besides arrays.

    Attributes:
      flags: the method's flags.
      kept_blocks: which blocks stay.
      features: the intermediates to compare, the student's and the teacher's.
    """

    flags: BkSdmFlags
    kept_blocks: KeptBlocks
    features: Features


def configure(
    networks: Networks, flags: BkSdmFlags, *, kept_blocks: KeptBlocks | None = None, remat: bool = False
) -> BkSdmSetup:
    """The student without the pruned blocks, and the features to compare.

    Args:
      networks: the teacher's networks.
      flags: the method's flags.
      kept_blocks: which blocks stay. Default: all.
      remat: whether the student recomputes activations.

    Raises:
      ConfigError: if the blocks do not fit the teacher.
      ValueError: if the teacher takes its guidance as an input, or is not a plain text-to-image model.
    """
    refuse_guidance_input(
        networks.unet,
        "which plain training does not give it: take blocks from the model that it was distilled from, and distill the "
        "student then",
    )
    if networks.task != "text-to-image" or networks.controlnet is not None:
        raise ValueError(
            "--pretrained_model_name_or_path: take a text-to-image model without a ControlNet, which would not fit the "
            "student."
        )
    kept_blocks = whole(networks.unet.config) if kept_blocks is None else kept_blocks
    unet, _ = prune(networks.unet, networks.unet.abstract_params(), kept_blocks)
    student = replace(networks, unet=replace(unet, remat=remat))
    return BkSdmSetup(
        networks=networks,
        student=student,
        trained=("unet",),
        frozen=tuple(networks.by_name()),
        ema_decay=flags.kept_ema_decay,
        flags=flags,
        kept_blocks=kept_blocks,
        features=feature_pairs(networks.unet.config, kept_blocks),
    )


def init(
    setup: BkSdmSetup,
    load: Load,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    mixed_precision: MixedPrecision = "no",
) -> TrainState:
    """The state before the first step: θ starts as the teacher's remaining blocks."""
    _, unet = prune(setup.networks.unet, load("unet"), setup.kept_blocks)
    ema = setup.ema_decay is not None
    return optim.init_state({"unet": unet}, optimizer, key, ema=ema, mixed_precision=mixed_precision)


def loss(
    params: Mapping[str, Params],
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: Key[Array, ""],
    setup: BkSdmSetup,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss at the top of this file, as a mean over the batch.

    Args:
      params: θ: ``unet``.
      state: not read.
      frozen: the teacher; its schedule is the student's, whose prediction type may differ.
      batch: see `codi_jax.methods.denoising.draw`.
      key: for all randomness.
      setup: the method's setup.

    Returns:
      The loss, and its terms before their weights: ``task``, ``output``, ``features``, and ``features/NAME`` for each
      block. If both weights are 0, the teacher is not evaluated and there is only ``task``.

    Raises:
      ValueError: if features differ in shape.
    """
    del state
    flags = setup.flags
    task = denoising.draw(frozen.params, frozen, batch, key, setup)
    inputs = task.z_t, task.t, task.conditions.full
    prediction, f = predict_with_intermediates(setup.student, {**frozen.params, **params}, *inputs)
    distance = task.distance(prediction)
    if not (flags.output_weight or flags.feature_weight):
        return distance, {"task": distance}
    wanted, f_teacher = predict_with_intermediates(setup.networks, frozen.params, *inputs)
    output = jnp.mean(mse(prediction, _as_student(wanted, frozen, task)))
    features = _feature_distances(setup, f, f_teacher)
    total = sum(features.values(), jnp.zeros(()))
    value = distance + flags.output_weight * output + flags.feature_weight * total
    return value, {"task": distance, "output": output, "features": total, **features}


def _as_student(prediction: Array, frozen: Frozen, task: DenoisingTask) -> Array:
    """The teacher's output, converted to what the student predicts."""
    teacher, student = frozen.teacher_schedule, frozen.schedule
    if teacher is None or teacher.prediction_type == student.prediction_type:
        return prediction
    x0, eps = teacher.to_x0_eps(prediction, task.z_t, task.t)
    return student.target(x0, eps, task.t)


def _feature_distances(setup: BkSdmSetup, student: Mapping[str, Array], teacher: Mapping[str, Array]) -> Metrics:
    distances = {}
    for name, of_teacher in setup.features:
        f, wanted = student[name], teacher[of_teacher]
        if f.shape != wanted.shape:
            raise ValueError(
                f"features of different shapes cannot be compared: {name} of the student, {f.shape}, and {of_teacher} "
                f"of the teacher, {wanted.shape}."
            )
        distance = mse(f, wanted)
        if setup.flags.feature_normalize:
            distance = distance / mse(wanted, jnp.zeros_like(wanted))
        distances[f"features/{name}"] = jnp.mean(distance)
    return distances


def method(kept_blocks: KeptBlocks | None) -> Method[BkSdmFlags, BkSdmSetup]:
    """BK-SDM with these blocks. Default: all."""
    return Method(
        flags=BkSdmFlags,
        sampling=denoising.sampling,
        configure=partial(configure, kept_blocks=kept_blocks),
        init=init,
        loss=loss,
    )
