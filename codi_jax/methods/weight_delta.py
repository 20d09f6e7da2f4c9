"""Weight deltas: make an editor fast without training, by adding what distillation changed in another model.

    W* = W_edit + λ (W_distilled − W_base)

where W_base is the text-to-image model that the editor was fine-tuned from, and W_distilled is a student of it: "Fast
InstructPix2Pix using Distilled Text-conditional Diffusion Models" (Starodubcev, 2023). A LoRA of the student is a delta
by itself, λ · α/r · B A. The result is sampled like the student, in 4 or 5 LCM steps at image guidance 1.

Unlike its neighbors, it sees no data. Its functions take one tensor at a time, so a model of any size is adapted in the
memory of a few tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Num

ConvIn = Literal["skip", "add"]
CONV_IN = "conv_in.weight"

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a model's tensors, by name in the PyTorch state dict."""


@dataclass(frozen=True)
class Plan:
    """What happens to each tensor.

    Attributes:
      adapted: names of the tensors that get a delta.
      skipped: names of the editor's tensors that get none although the other models have them too: the first
        convolution.
      one_sided: names of the tensors that some models lack, and which models have them.
    """

    adapted: tuple[str, ...]
    skipped: tuple[str, ...]
    one_sided: dict[str, str]


def plan(editor: Shapes, base: Shapes, distilled: Shapes, conv_in: ConvIn = "skip") -> Plan:
    """Compares all tensors of the three models: a tensor that is in only one of them is neither lost nor an error.

    Args:
      editor: the model to adapt.
      base: the model that distillation started from.
      distilled: the model that it produced.
      conv_in: what to do with the first convolution, which has more input channels in an editor: leave it unchanged, as
        the original does, or add the delta to the channels that the others have.

    Raises:
      ValueError: if the models are of different families.
    """
    shared = editor.keys() & base.keys() & distilled.keys()
    models = {"the editor": editor, "the base model": base, "the distilled model": distilled}
    one_sided = {
        name: " and ".join(model for model, shapes in models.items() if name in shapes)
        for name in sorted(editor.keys() | base.keys() | distilled.keys())
        if name not in shared
    }
    odd = sorted(name for name in shared if base[name] != distilled[name])
    if odd or not shared:
        what = f"{odd[0]} is {list(base[odd[0]])} and {list(distilled[odd[0]])}" if odd else "they share no tensor"
        raise ValueError(f"the base model and the distilled model are of different families: {what}.")
    odd = sorted(name for name in shared if editor[name] != base[name] and not _is_wider(name, editor, base))
    if odd:
        name = odd[0]
        raise ValueError(
            f"the editor and the base model are of different families: {name} is {list(editor[name])} and "
            f"{list(base[name])}."
        )
    wider = {name for name in shared if editor[name] != base[name]}
    skipped = wider if conv_in == "skip" else set()
    return Plan(tuple(sorted(shared - skipped)), tuple(sorted(skipped)), one_sided)


def _is_wider(name: str, editor: Shapes, base: Shapes) -> bool:
    """Whether it is the first convolution, with more input channels."""
    wide, narrow = editor[name], base[name]
    return name == CONV_IN and wide[0] == narrow[0] and wide[2:] == narrow[2:] and wide[1] > narrow[1]


def adapt(
    editor: Num[np.ndarray, "..."],
    base: Num[np.ndarray, "..."],
    distilled: Num[np.ndarray, "..."],
    weight: float | int,
) -> Float[np.ndarray, "..."]:
    """W* of one tensor, computed in float32.

    Args:
      editor: W_edit. If its second axis is longer than the others', the delta is added to the first channels.
      base: W_base.
      distilled: W_distilled.
      weight: λ.
    """
    delta = np.float32(weight) * (distilled.astype(np.float32) - base.astype(np.float32))
    adapted = editor.astype(np.float32)
    if editor.shape == base.shape:
        return adapted + delta
    adapted[:, : base.shape[1]] += delta
    return adapted
