"""BK-SDM: a student with fewer blocks, distilled by its teacher's features (Kim et al., 2023, arXiv:2305.15798).

    L = L_task + λ_out · mean‖F_θ(z_t, t, c) − F_T(z_t, t, c)‖² + λ_feat · Σ_l mean‖f_θ^l − f_T^l‖²

with F the outputs of student and teacher, and f^l those of their blocks, for the pairs of blocks l of
`codi_jax.models.pruning.feature_pairs`. L_task is that of plain training. θ starts as the blocks of the teacher that
stay, see `codi_jax.models.pruning.prune`.

Nothing bounds the scale of features, and where it is large their term decides alone. With ``feature_normalize``, which
is this project's own, the distance of each pair and sample is divided by mean‖f_T^l‖².

Beyond plain training, its neighbor: the teacher.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from codi_jax.diffusion.losses import mse
from codi_jax.methods import denoising
from codi_jax.models.config import Params
from codi_jax.models.pruning import Features, Surgery, feature_pairs, prune
from codi_jax.pipeline.conditions import Batch, Modules, refuse_guidance_input
from codi_jax.pipeline.prediction import predict_with_taps
from codi_jax.training import optim


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Config):
    """What the training depends on besides parameters and data, beyond plain training.

    Attributes:
      teacher_unet: its module.
      features: the taps that are compared, the student's and the teacher's.
      output_weight: λ_out.
      feature_weight: λ_feat.
      feature_normalize: whether distances of features are relative to the teacher's.
    """

    teacher_unet: Any
    features: Features
    output_weight: float | int = 1.0
    feature_weight: float | int = 1.0
    feature_normalize: bool = False


def make_student(unet: Any, params: Params, surgery: Surgery) -> tuple[Any, Params, Features]:
    """The student before the first step, and what is compared.

    Args:
      unet: the teacher's module.
      params: of the teacher.
      surgery: what stays of it.

    Raises:
      ConfigError: if the surgery does not fit the teacher.
      ValueError: if the teacher takes its guidance as an input.
    """
    refuse_guidance_input(
        unet,
        "which plain training does not give it: take blocks from the model that it was distilled from, and distill the "
        "student then",
    )
    return *prune(unet, params, surgery), feature_pairs(unet.config, surgery)


def loss(
    params: Mapping[str, Params], frozen: Mapping[str, Any], batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], optim.Metrics]:
    """The loss at the top of this file, as a mean over the batch.

    Args:
      params: θ: ``unet``.
      frozen: parameters of the ``teacher`` UNet and its ``teacher_schedule``; of the others, and what else
        `codi_jax.methods.denoising.draw` needs.
      batch: see there.
      key: likewise.
      config: the configuration.

    Returns:
      The loss, and its terms before their weights: ``task``, ``output``, ``features``, and of each block
      ``features/NAME``. Where both weights are 0 the teacher is not computed, and only ``task`` is there.

    Raises:
      ValueError: if features are not of the same shape.
    """
    networks = {**frozen, **params}
    task = denoising.draw(networks, batch, key, config)
    prediction, taps = predict_with_taps(config.modules, networks, task.z_t, task.t, task.condition)
    distance = task.distance(prediction)
    if not (config.output_weight or config.feature_weight):
        return distance, {"task": distance}
    wanted, teacher_taps = _teach(config, frozen, task)
    output = jnp.mean(mse(prediction, wanted))
    features = _feature_distances(config, taps, teacher_taps)
    total = sum(features.values(), jnp.zeros(()))
    value = distance + config.output_weight * output + config.feature_weight * total
    return value, {"task": distance, "output": output, "features": total, **features}


def _teach(config: Config, frozen: Mapping[str, Any], task: denoising.Task) -> tuple[Array, dict[str, Array]]:
    """The teacher's output, as the student is to put it, and its taps."""
    modules: Modules = dataclasses.replace(config.modules, unet=config.teacher_unet)
    networks = {**frozen, "unet": frozen["teacher"]}
    prediction, taps = predict_with_taps(modules, networks, task.z_t, task.t, task.condition)
    own, student = frozen["teacher_schedule"], frozen["schedule"]
    if own.prediction_type != student.prediction_type:
        prediction = student.target(*own.to_x0_eps(prediction, task.z_t, task.t), task.t)
    return prediction, taps


def _feature_distances(config: Config, taps: Mapping[str, Array], teacher_taps: Mapping[str, Array]) -> optim.Metrics:
    distances = {}
    for name, of_teacher in config.features:
        f, wanted = taps[name], teacher_taps[of_teacher]
        if f.shape != wanted.shape:
            raise ValueError(
                f"features of different shapes cannot be compared: {name} of the student, {f.shape}, and {of_teacher} "
                f"of the teacher, {wanted.shape}."
            )
        distance = mse(f, wanted)
        if config.feature_normalize:
            distance = distance / mse(wanted, jnp.zeros_like(wanted))
        distances[f"features/{name}"] = jnp.mean(distance)
    return distances


def train_step(
    state: optim.TrainState,
    frozen: Mapping[str, Any],
    batch: Batch,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
) -> tuple[optim.TrainState, optim.Metrics]:
    """One update of θ, and of its moving average; see `codi_jax.training.optim.step`."""
    return optim.step(
        state,
        lambda params, batch, key: loss(params, frozen, batch, key, config),
        batch,
        optimizer,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
    )
