"""Groups of flags: every one of a script's groups is checked, whatever the order that it inherits them in."""

import dataclasses
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from codi_jax.cli.flags import Adjustable, Flags, Local, Operational, Scope, Secret
from codi_jax.data import DataFlags
from codi_jax.data.preparation.conditions import PairFlags
from codi_jax.data.preparation.edits import GenerateFlags
from codi_jax.data.preparation.job import JobFlags
from codi_jax.data.preparation.tables import ScoreFlags
from codi_jax.io.download import DownloadFlags
from codi_jax.methods.autoencoder import AutoencoderFlags
from codi_jax.methods.bk_sdm import BkSdmFlags
from codi_jax.methods.codi import CodiFlags
from codi_jax.methods.denoising import EditFlags, TextToImageFlags
from codi_jax.methods.disback import DisbackFlags
from codi_jax.methods.lcm import LcmEditFlags, LcmTextFlags
from codi_jax.training import optim, starting
from codi_jax.training.flags import EditDataFlags, ManyStepsFlags, ValidationFlags
from codi_jax.training.jobs.autoencoder import VaeFlags
from codi_jax.training.jobs.disback import DisbackRunFlags
from codi_jax.training.jobs.lcm import LcmRunFlags

PLAIN = (TextToImageFlags, ManyStepsFlags)
EDIT = (EditDataFlags, EditFlags, ManyStepsFlags)
BK_SDM = (BkSdmFlags, ManyStepsFlags)
AUTOENCODER = (AutoencoderFlags, VaeFlags)
CODI = (starting.LoopFlags, optim.OptimizerFlags, CodiFlags, DataFlags, ValidationFlags)
LCM = (LcmRunFlags, EditDataFlags, LcmEditFlags)
LCM_TEXT = (LcmRunFlags, LcmTextFlags)
DISBACK_RUN = (DisbackRunFlags,)
DISBACK = (DisbackFlags, starting.LoopFlags, optim.OptimizerFlags, DataFlags, ValidationFlags)
DATA_TOOL = (JobFlags, DownloadFlags, PairFlags, GenerateFlags, ScoreFlags)
OF_ALL = {
    "fsdp": 0,
    "checkpoints_total_limit": 0,
    "logging_steps": 0,
    "learning_rate": -1.0,
    "ema_decay": 1.0,
    "resolution": 0,
    "num_validation_images": 0,
}
BAD = [(groups, flag, value) for groups in (PLAIN, CODI, AUTOENCODER) for flag, value in OF_ALL.items()]
BAD += [
    (groups, flag, value)
    for groups, of_groups in {
        PLAIN: {
            "noise_offset": -0.1,
            "snr_gamma": 0.0,
            "validation_sampling_steps": 0,
            "guidance_scale": -1.0,
            "export_steps": -1,
        },
        EDIT: {**OF_ALL, "conditioning_dropout_prob": 0.5},
        BK_SDM: {**OF_ALL, "output_weight": -1.0, "input_perturbation": -1.0},
        AUTOENCODER: {"kl_scale": -1.0, "export_steps": -1},
        LCM_TEXT: {**OF_ALL, "lora_rank": 0, "lora_alpha": 0.0},
        DISBACK_RUN: {**OF_ALL, "lora_dropout": 0.1, "conditioning_timestep": -1},
    }.items()
    for flag, value in of_groups.items()
]
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
    for flag, value in {
        "shard_size": 0,
        "num_proc": 0,
        "retries": -1,
        "image_quality": 0,
        "max_shared": 2.0,
        "max_watermark_score": -0.5,
    }.items()
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
        ({"share": float("nan")}, "--share nan is not possible: it must be a finite number."),
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
    if groups not in (AUTOENCODER, CODI, DISBACK, DATA_TOOL):
        needed["pretrained_model_name_or_path"] = "m"
    script(**needed).check()
    with pytest.raises(ValueError, match=f"--{flag} {value} is not possible"):
        script(**{**needed, flag: value}).check()


def test_every_group_with_a_check_is_tried_above() -> None:
    tried = {cls for groups, *_ in BAD for group in groups for cls in inspect.getmro(group)}
    missed, queue = [], [Flags]
    while queue:
        group = queue.pop()
        queue += group.__subclasses__()
        if "check" in vars(group) and group.__module__.startswith("codi_jax.") and group not in tried:
            missed += [group] if group.__name__ != "Args" else []  # of a command, tried in test_commands.py
    assert missed == []


# What has to share the value of a flag


SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "training_scripts").glob("train_*.py"))
# All that a run may be resumed with another value of. A flag that is not here belongs to the run, so that a new one
# does unless somebody decides otherwise.
MAY_CHANGE = {
    # The optimizer's
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "adam_weight_decay",
    "max_grad_norm", "generator_lr", "guidance_lr",
    # How long, on how many devices, in how much memory
    "max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "fsdp",
    "gradient_checkpointing", "scan_layers",
    "attention", "vae_encode_batch_size", "debug",
    # Planned instead of run
    "plan", "plan_batch", "plan_output",
    # Faults
    "peer_timeout", "hang_timeout", "check_replicas",
    # Where things are
    "output_dir", "dataset_name", "train_data_dir", "train_shards_path_or_url", "train_prompt_path", "real_image_path",
    "cache_dir", "cache_latents_dir", "ccache", "dataloader_num_workers", "max_unreadable_share", "path",
    "distill_table", "model_config_name_or_path", "stage", "checkpoint_dir",
    # What is shown and saved
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_dir", "logging_steps",
    "report_to", "tracker_project_name", "wandb_entity", "profile_steps", "profile_validation", "profile_memory",
    "validation_steps", "validate_at_start", "validation_data_dir", "validation_prompt", "validation_image",
    "num_validation_images", "validation_sampling_steps", "validation_epochs", "guidance_scale",
    "image_guidance_scale", "teacher_guidance_scale", "bake_guidance_scale", "bake_image_guidance_scale",
    "save_dtype", "export_steps", "push_to_hub", "hub_token", "hub_model_id",
    # What has no effect
    "from_pt", "controlnet_from_pt", "enable_xformers_memory_efficient_attention", "local_rank", "cast_teacher_unet",
    "sdxl", "denoising_loss_weight", "latent_resolution", "initialie_generator", "start_target_num", "grid_size",
    "log_loss", "wandb_name",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_belongs_to_the_run_unless_it_says_otherwise(script):
    args_class = importlib.import_module(f"training_scripts.{script}").Args
    scopes = args_class.scopes()
    assert set(scopes) == set(args_class.names())
    assert {name for name, scope in scopes.items() if scope > Scope.RUN} <= MAY_CHANGE
    assert scopes["hub_token"] is Scope.SECRET


@pytest.mark.parametrize("script", ["train_text_to_image_flax", "train_bk_sdm_flax"])
def test_what_a_network_predicts_belongs_to_the_run(script):
    args_class = importlib.import_module(f"training_scripts.{script}").Args
    args = args_class(pretrained_model_name_or_path="x", train_data_dir="y", prediction_type="v_prediction")
    assert args.values_within(Scope.RUN)["prediction_type"] == "v_prediction"


@dataclass(frozen=True)
class Base(Flags):
    plain: int = 1
    adjusted: Adjustable[Annotated[Path, "more"]] = Path("a")
    local: Local[int] = 3
    token: Secret[str | None] = "secret"


@dataclass(frozen=True)
class Derived(Base):
    adjusted: Path = Path("b")
    shown: Operational[tuple[int, ...]] = (1, 2)


def test_scopes_are_inherited_and_values_are_json_without_secrets():
    assert Derived.scopes() == {
        "plain": Scope.RUN, "adjusted": Scope.RESUME, "local": Scope.PROCESS, "token": Scope.SECRET,
        "shown": Scope.START,
    }  # fmt: skip
    assert Derived().values_within(Scope.RUN) == {"plain": 1}
    assert Derived().values_within(Scope.START) == {"plain": 1, "adjusted": "b", "shown": [1, 2]}
    for widest in (Scope.PROCESS, Scope.SECRET):
        assert Derived().values_within(widest) == {"plain": 1, "adjusted": "b", "local": 3, "shown": [1, 2]}
