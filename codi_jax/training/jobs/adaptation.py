"""Applies weight deltas to files: an editor's UNet in, an adapted one out, a few tensors in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from codi_jax.cli.messages import listed
from codi_jax.cli.progress import progress_over
from codi_jax.io.atomic import write_json
from codi_jax.io.hub import ModelFolder
from codi_jax.io.lora_files import load_lora
from codi_jax.io.state_dict import to_flax_layout, to_torch_layout
from codi_jax.io.weight_files import StoredTensor
from codi_jax.io.weights import open_model, write_model
from codi_jax.methods import weight_delta
from codi_jax.methods.weight_delta import ConvIn, Plan
from codi_jax.models.config import Params, WeightsError
from codi_jax.models.lora import lora_layers, merged_kernel, module_name
from codi_jax.models.network import Network

REPORT = "adaptation.json"
"""The file in the adapted model's folder that says what happened to each tensor."""

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Editor:
    """The UNet to adapt.

    Attributes:
      module: the module, for its configuration.
      tensors: the tensors, by name in the PyTorch state dict.
    """

    module: Network
    tensors: Tensors


@dataclass(frozen=True)
class Delta:
    """What to add to an editor.

    Attributes:
      plan: what happens to each tensor.
      adapt: maps a name, the editor's tensor and a weight to the adapted tensor, float32.
      text_loras: what a LoRA adds to the text encoders, by their name in the model.
    """

    plan: Plan
    adapt: Callable[[str, np.ndarray, float | int], Float[np.ndarray, "..."]]
    text_loras: Mapping[str, Params] = field(default_factory=dict)


def open_editor(source: str | Path, variant: str | None = None) -> Editor:
    """Opens the UNet of a model; raises as `codi_jax.io.weights.open_model` does."""
    return Editor(*open_model(source, "unet", variant=variant))


def delta_of_models(
    editor: Editor, base: str | Path, distilled: str | Path, *, conv_in: ConvIn = "skip", variant: str | None = None
) -> Delta:
    """The difference between two models.

    Args:
      editor: the editor to adapt.
      base: folder or repository of the model that distillation started from: complete, or only a UNet.
      distilled: folder or repository of the distilled model.
      conv_in: see `codi_jax.methods.weight_delta.plan`.
      variant: the variant of the weight files.

    Raises:
      ValueError: if a model is missing, or they are of different families.
    """
    old, new = _open_unet(base, variant), _open_unet(distilled, variant)
    plan = weight_delta.plan(*map(_shapes, (editor.tensors, old, new)), conv_in=conv_in)

    def adapt(name: str, tensor: np.ndarray, weight: float | int) -> Float[np.ndarray, "..."]:
        return weight_delta.adapt(tensor, np.asarray(old[name]), np.asarray(new[name]), weight)

    return Delta(plan, adapt)


def _open_unet(source: str | Path, variant: str | None) -> Tensors:
    is_whole = ModelFolder(str(Path(source).expanduser())).find("model_index.json") is not None
    return open_model(source, "unet" if is_whole else None, variant=variant)[1]


def _shapes(tensors: Tensors) -> weight_delta.Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def delta_of_lora(editor: Editor, lora: str | Path, text_encoders: Mapping[str, Params] | None = None) -> Delta:
    """The difference that a LoRA makes.

    Args:
      editor: the editor to adapt.
      lora: a file, folder or repository, or a file in one: ``owner/name/file.safetensors``.
      text_encoders: the model's text encoders, by name: a LoRA may adapt them too.

    Raises:
      WeightsError: if it is missing, or adapts no layer of the editor.
    """
    loras = load_lora(lora, {"unet": editor.module.abstract_params(), **(text_encoders or {})})
    if "unet" not in loras:
        raise WeightsError(f"{lora} adapts no layer of the UNet, but only {listed(sorted(loras))}.")
    layers = lora_layers(loras.pop("unet"))
    by_name = {f"{module_name(path)}.weight": layer for path, layer in layers.items()}
    by_name |= {f"{module_name(path)}.bias": layer for path, layer in layers.items() if "bias" in layer}
    one_sided = dict.fromkeys(sorted(editor.tensors.keys() - by_name.keys()), "the editor")

    def adapt(name: str, tensor: np.ndarray, weight: float | int) -> Float[np.ndarray, "..."]:
        if name.endswith(".bias"):
            return tensor.astype(np.float32) + weight * np.asarray(by_name[name]["bias"], np.float32)
        kernel = jnp.asarray(to_flax_layout("kernel", tensor))
        return to_torch_layout("kernel", np.asarray(merged_kernel(kernel, by_name[name], float(weight))))

    return Delta(Plan(tuple(sorted(by_name)), (), one_sided), adapt, loras)


def write_adapted(
    folder: Path, editor: Editor, delta: Delta, weight: float | int, dtype: DTypeLike | None = None
) -> None:
    """Writes the adapted UNet into ``folder/unet``, and the report next to it.

    Args:
      folder: the complete model's folder.
      editor: the editor to adapt.
      delta: the delta to add.
      weight: λ.
      dtype: the file's dtype. Default: each tensor's own.

    Raises:
      WeightsError: if a number does not fit the dtype, or something cannot be written.
    """
    header = {
        name: (np.dtype(tensor.dtype if dtype is None else dtype), tensor.shape)
        for name, tensor in editor.tensors.items()
    }
    changed = set(delta.plan.adapted)

    def arrays() -> Iterator[Any]:
        for name, tensor in progress_over(editor.tensors.items(), "adapting", len(editor.tensors), "tensors"):
            array = np.asarray(tensor)
            if name in changed:
                array = delta.adapt(name, array, weight)
            with np.errstate(over="ignore"):  # found below
                array = array.astype(header[name][0], copy=False)
            if not np.isfinite(array.astype(np.float32)).all():
                raise WeightsError(f"{name} does not fit into {header[name][0]}: choose another --save_dtype.")
            yield array

    write_model(folder, "unet", editor.module, header, arrays())
    write_json(folder / REPORT, {"weight": weight, **asdict(delta.plan)})


def describe(plan: Plan) -> str:
    """Describes the plan in one line."""
    text = f"{len(plan.adapted)} tensors adapted"
    if plan.skipped:
        text += f", skipped {', '.join(plan.skipped)}"
    where: dict[str, list[str]] = {}
    for name, models in plan.one_sided.items():
        where.setdefault(models, []).append(name)
    for models, names in where.items():
        text += f", {len(names)} only in {models} ({names[0]}{', …' if len(names) > 1 else ''})"
    return text
