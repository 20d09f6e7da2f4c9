"""What the scripts of plain training share: all of it but their flags of data and the networks that they train."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from codi_jax.cli.flags import Operational
from codi_jax.io.images import labeled_rows
from codi_jax.methods import denoising
from codi_jax.pipeline.conditions import refuse_guidance_input
from codi_jax.pipeline.model import DiffusionPipeline
from codi_jax.training import loop, optim
from codi_jax.training.pretrained import ModelFlags, modules_of, save_trained
from codi_jax.training.validation import Samples, ValidationFlags, generate_with


@dataclass(frozen=True, kw_only=True)
class DenoisingTrainingFlags(ModelFlags, loop.LoopFlags, optim.OptimizerFlags, optim.EmaFlags, ValidationFlags):
    """The flags of a run of plain training, but for data and conditions."""

    snr_gamma: float | None = None
    """Gamma of the min-SNR weights of the loss, usually 5. If left out: no weights. With a model that predicts v
    they leave the noisiest times next to untrained."""
    ema_decay: float = 0.9999
    """Decay of the moving average of --use_ema, for each update."""
    validation_sampling_steps: Operational[int] = 50
    """Steps of the sampler for validation pictures."""
    guidance_scale: Operational[float] = 7.5
    """Guidance scale of the text in validation pictures."""

    def check(self) -> None:
        super().check()
        self.require_positive("snr_gamma")
        self.require_at_least(1, "validation_sampling_steps")
        self.require_at_least(0, "guidance_scale")


def denoise(
    args: Any,
    pipeline: DiffusionPipeline,
    names: Sequence[str],
    loader: loop.Loader,
    samples: Samples,
    mesh: Mesh,
    *,
    run_config: Mapping[str, Any] | None = None,
    frozen: Mapping[str, Any] | None = None,
    image_guidance_scale: float | int | None = None,
    method: Any = denoising,
    teacher: DiffusionPipeline | None = None,
    **options: Any,
) -> None:
    """Trains networks of a model by denoising, and writes the model.

    Args:
      args: `DenoisingTrainingFlags` and `codi_jax.data.DataFlags`, from `codi_jax.training.loop.start`.
      pipeline: the model, with float32 parameters of what is trained. These are taken out of it: they would lie in
        memory beside those of the state.
      names: of the networks that are trained.
      loader: of the data.
      samples: for validation pictures.
      mesh: that all of it lies on.
      run_config: see `codi_jax.training.loop.train`.
      frozen: what the step reads beyond the model's other networks and its schedule, such as the null text.
      image_guidance_scale: in validation pictures, for editors.
      method: `codi_jax.methods.denoising`, or one beyond it, with a ``Config`` and a ``train_step`` like it.
      teacher: shown in validation pictures too.
      **options: further attributes of the method's ``Config``.
    """
    refuse_guidance_input(
        pipeline.modules["unet"],
        "which plain training does not give it: start from the model that it was distilled from, or bake a scale in",
    )
    if "unet" in names:
        # Whatever few steps the model was distilled for, it is trained at all times now. A ControlNet changes nothing
        # of the UNet that it is for.
        pipeline = dataclasses.replace(pipeline, schedule=pipeline.schedule.with_many_steps())
    config = method.Config(
        modules_of(pipeline, names, args),
        args.snr_gamma,
        ema_decay=args.decay_if_kept,
        accumulation=args.gradient_accumulation_steps,
        **options,
    )
    num_steps = loop.num_steps(args, loader.samples_per_epoch)
    optimizer = optim.make_optimizer(args, num_steps, batch_size=loop.global_batch_size(args))
    state = optim.init_state(
        {name: pipeline.params.pop(name) for name in names},
        optimizer,
        jax.random.key(args.seed),
        ema=args.use_ema,
        mixed_precision=args.mixed_precision,
    )
    scales = {"guidance_scale": args.guidance_scale}
    if image_guidance_scale is not None:
        scales["image_guidance_scale"] = image_guidance_scale
    given, wanted = ("source", "wanted") if pipeline.task == "edit" else ("condition", "data")

    steps = args.validation_sampling_steps

    @functools.cache
    def by_teacher() -> np.ndarray | None:
        return None if teacher is None else generate_with(teacher, {}, samples, steps=steps, **scales)

    def validate(state: Any, _: int) -> dict[str, np.ndarray]:
        made = generate_with(pipeline, state.result, samples, steps=steps, **scales)
        rows = {given: samples.conditions, "teacher": by_teacher(), f"{steps} steps": made, wanted: samples.pictures}
        return {"samples": labeled_rows(rows)}

    def export(state: Any, folder: Path) -> None:
        trained = {name: (pipeline.modules[name], params) for name, params in state.result.items()}
        save_trained(args, pipeline, folder, trained)

    loop.train(
        functools.partial(method.train_step, config=config, optimizer=optimizer),
        state,
        {**pipeline.params, **(frozen or {}), "schedule": pipeline.schedule},
        loader,
        args,
        mesh=mesh,
        validate=validate,
        export=export,
        run_config=run_config,
    )
