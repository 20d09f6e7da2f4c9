"""Groups of flags: every one of a script's groups is checked, whatever the order that it inherits them in."""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

import pytest

from codi_jax import optim, train
from codi_jax.data import DataFlags
from codi_jax.denoising_training import DenoisingTrainingFlags
from codi_jax.flags import Flags
from codi_jax.lcm_training import LcmTrainingFlags
from codi_jax.methods.codi import CodiFlags
from codi_jax.methods.disback import DisbackFlags
from codi_jax.preparation.conditions import PairFlags
from codi_jax.preparation.edits import GenerateFlags
from codi_jax.preparation.job import JobFlags
from codi_jax.pretrained import EditFlags
from codi_jax.validation import ValidationFlags

PLAIN = (DenoisingTrainingFlags, DataFlags)
CODI = (train.LoopFlags, optim.OptimizerFlags, CodiFlags, DataFlags, ValidationFlags)
LCM = (LcmTrainingFlags, EditFlags)
DISBACK = (DisbackFlags, train.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags)
DATA_TOOL = (JobFlags, PairFlags, GenerateFlags)
OF_ALL = {
    "fsdp": 0,
    "checkpoints_total_limit": 0,
    "logging_steps": 0,
    "learning_rate": -1.0,
    "ema_decay": 1.0,
    "resolution": 0,
    "num_validation_images": 0,
}
BAD = [(groups, flag, value) for groups in (PLAIN, CODI) for flag, value in OF_ALL.items()]
BAD += [
    (LCM, flag, value)
    for flag, value in {
        **OF_ALL, "num_ddim_timesteps": 0, "conditioning_dropout_prob": 1.0, "vae_encode_batch_size": 0,
    }.items()
]  # fmt: skip
BAD += [
    (DISBACK, flag, value)
    for flag, value in {
        "interval": 0, "dfake_gen_update_ratio": 0, "lora_rank": 0, "learning_rate": -1.0, "ema_decay": 1.0,
    }.items()
]  # fmt: skip
BAD += [
    (DATA_TOOL, flag, value)
    for flag, value in {"shard_size": 0, "num_proc": 0, "retries": -1, "image_quality": 0, "max_shared": 2.0}.items()
]


@dataclass(frozen=True)
class Numbers(Flags):
    count: int | None = 3
    share: float = 0.5

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "count")
        self.require_in(0, 1, "share")


@pytest.mark.parametrize("values", [{}, {"count": None}, {"count": 1}, {"share": 0.0}, {"share": 1}])
def test_possible_values_pass(values: dict[str, Any]) -> None:
    Numbers(**values).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count 0 is not possible: it must be at least 1."),
        ({"share": 1.5}, "--share 1.5 is not possible: it must be between 0 and 1."),
        ({"share": float("nan")}, "--share nan is not possible: it must be between 0 and 1."),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Numbers(**values).check()


@pytest.mark.parametrize("backwards", [False, True], ids=["one order", "the other"])
@pytest.mark.parametrize(("groups", "flag", "value"), BAD)
def test_all_groups_of_a_script_are_checked(
    tmp_path, groups: tuple[type, ...], flag: str, value: float, backwards: bool
) -> None:
    bases = groups[::-1] if backwards else groups
    script: Any = dataclasses.make_dataclass("Script", [], bases=bases, frozen=True, kw_only=True)
    needed = {"train_data_dir": str(tmp_path)}
    if groups in (PLAIN, LCM):
        needed["pretrained_model_name_or_path"] = "m"
    script(**needed).check()
    with pytest.raises(ValueError, match=f"--{flag} {value} is not possible"):
        script(**{**needed, flag: value}).check()


def test_every_group_with_a_check_is_tried_above() -> None:
    tried = {cls for group in (*PLAIN, *CODI, *LCM, *DISBACK, *DATA_TOOL) for cls in inspect.getmro(group)}
    missed, queue = [], [Flags]
    while queue:
        group = queue.pop()
        queue += group.__subclasses__()
        if "check" in vars(group) and group.__module__.startswith("codi_jax.") and group not in tried:
            missed.append(group)
    assert missed == []
