"""A model and a method that fit each other, before and after weights are read: what runs and plans have in common."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from codi_jax.cli.flags import Flags
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.pipeline.conditions import Frozen, NullText, encode_null_text
from codi_jax.pipeline.model import Model
from codi_jax.training.flags import RunFlags
from codi_jax.training.method import Method, Setup


@dataclass(frozen=True)
class Configured:
    """A method that is set up for a model.

    Attributes:
      flags: the method's flags.
      model: the model without its weights.
      schedule: the noise schedule to train with; ``None`` for an autoencoder alone.
      setup: the method's setup.
    """

    flags: Flags
    model: Model
    schedule: NoiseSchedule | Any
    setup: Setup


def configure(method: Method[Any, Any], args: RunFlags, open_model: Callable[[Any], Model]) -> Configured:
    """Opens a model and sets a method up for it; no weights are read.

    Args:
      method: the training method.
      args: the run's arguments.
      open_model: from these, opens the model without its weights.

    Raises:
      ValueError: if flags and model do not fit each other.
    """
    flags, opened = method.flags.of(args), open_model(args)
    schedule = method.sampling(opened.schedule, flags)
    networks = replace(opened.networks.with_options(**args.network_options), vae_parts=args.vae_parts)
    return Configured(flags, opened, schedule, method.configure(networks, flags, remat=args.gradient_checkpointing))


def without_unused(model: Model, setup: Setup) -> Model:
    """The model without a ControlNet that the method does not use."""
    return model if setup.networks.controlnet is not None else model.with_network("controlnet", None)


def frozen_of(setup: Setup, model: Model, schedule: NoiseSchedule | Any, unread: Collection[str] = ()) -> Frozen:
    """What the step reads of the teacher, but does not change.

    Args:
      setup: the method's setup.
      model: the teacher, with its parameters.
      schedule: the schedule to train with.
      unread: networks whose outputs are cached.
    """
    params = model.params
    return Frozen(
        params={name: params[name] for name in setup.frozen if name not in unread},
        schedule=schedule,
        teacher_schedule=None if model.schedule is schedule else model.schedule,
        null_text=null_text_of(model) if setup.needs_null_text else None,
        target=None if setup.target is None else params[setup.target],
    )


def null_text_of(model: Model) -> NullText:
    """The text that guidance points away from."""
    ids = jax.tree.map(jnp.asarray, model.tokenize([""]))
    return encode_null_text(model.networks, model.params, ids, zeros=model.zeros_for_empty_prompt)
