"""The script of BK-SDM, run as a user runs it, and what is distilled further from the students that it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import yaml
from folders import SD_UNET, SIZE, make_pipeline, refuse_weights
from oracle import make_torch
from picture_folders import write_folder
from script_runs import (
    SHARED,
    Inputs,
    assert_frozen,
    assert_reports,
    assert_same_weights,
    picture_of,
    prepare,
    run,
    weights_of,
)

from codi_jax.cli import command_line
from codi_jax.io.pruning_levels import find_level
from codi_jax.models.pruning import prune
from codi_jax.pipeline.model import Model
from codi_jax.training import loop
from training_scripts import train_bk_sdm_flax as bk_sdm
from training_scripts import train_codi_flax as codi
from training_scripts import train_lcm_flax as lcm

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LEVELS = ASSETS / "recipes" / "small-levels.yaml"
PLAIN = {"down": [0], "up": [0, 2]}
TABLE = {"mine": {"resolutions": [PLAIN, PLAIN], "mid": "drop"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = make_pipeline("text-to-image", folder)
    teacher.register_modules(unet=make_torch("unet", {**SD_UNET, "layers_per_block": 2}, 3))
    teacher.save_pretrained(folder / "model")
    (folder / "levels.yaml").write_text(yaml.safe_dump(TABLE))
    return Inputs(folder / "model", write_folder(folder / "data", 6, size=(SIZE, SIZE), condition_size=(SIZE, SIZE)))


def of_level(inputs: Inputs, **flags: Any) -> dict[str, Any]:
    return {"distill_level": "mine", "distill_table": inputs.model.parent / "levels.yaml", **flags}


@pytest.fixture(scope="module")
def student(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = of_level(inputs, use_ema=True, ema_decay=0.5, max_train_steps=4, checkpointing_steps=2)
    return run(bk_sdm, inputs, tmp_path_factory.mktemp("bk-sdm") / "student", **flags)


def test_a_student_is_a_whole_folder_that_diffusers_loads(inputs: Inputs, student: Path) -> None:
    assert_reports(student, 4)
    line = json.loads((student / "metrics.jsonl").read_text().splitlines()[0])
    terms = {"task", "output", "features", "features/down_blocks_0", "features/up_blocks_1"}
    assert terms <= line.keys()
    assert line["loss"] == pytest.approx(line["task"] + line["output"] + line["features"], rel=1e-5)
    loaded = diffusers.DiffusionPipeline.from_pretrained(student)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    assert (loaded.unet.config.layers_per_block, loaded.unet.config.mid_block_type) == (1, None)
    loaded.set_progress_bar_config(disable=True)
    assert np.isfinite(loaded("a cat", num_inference_steps=2, output_type="np").images).all()
    assert_frozen(student, inputs.model, "vae", "text_encoder")
    ours, theirs = weights_of(student / "unet"), weights_of(inputs.model / "unet")
    assert len(ours) < len(theirs)
    assert not any(name.startswith("mid_block") for name in ours)
    assert not np.array_equal(ours["conv_in.weight"], theirs["conv_in.weight"]), "this is the teacher"
    assert picture_of(student).shape[0] == 3 * SIZE  # teacher, student, data


def test_a_resumed_run_is_the_same_run(
    inputs: Inputs, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_validate", lambda *_: None)
    flags = of_level(inputs, use_ema=True, ema_decay=0.5, max_train_steps=4)
    run(bk_sdm, inputs, tmp_path, resume_from_checkpoint=str(student / "checkpoint-2"), **flags)
    assert_same_weights(tmp_path / "unet", student / "unet")


def test_a_run_of_another_level_is_not_gone_on_with(inputs: Inputs, student: Path, tmp_path: Path) -> None:
    (tmp_path / "levels.yaml").write_text(yaml.safe_dump({"mine": {**TABLE["mine"], "mid": "keep"}}))
    flags = {"distill_level": "mine", "distill_table": tmp_path / "levels.yaml", "use_ema": True, "ema_decay": 0.5}
    with pytest.raises(ValueError, match="was made with surgery = "):
        run(bk_sdm, inputs, student, resume_from_checkpoint="latest", max_train_steps=4, **flags)


def test_before_training_the_student_is_what_stays_of_the_teacher(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average too, which the reference code makes of the whole UNet; also from half precision."""
    prepared = prepare(bk_sdm, inputs, tmp_path, monkeypatch, **of_level(inputs, use_ema=True, mixed_precision="bf16"))
    teacher = Model.from_pretrained(inputs.model)
    kept_blocks = find_level("mine", inputs.model.parent / "levels.yaml")
    _, wanted = prune(teacher.networks.unet, teacher.params["unet"], kept_blocks)
    for trained in (prepared.state.params["unet"], prepared.state.ema["unet"]):
        assert jax.tree.structure(trained) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, trained, wanted)
    state, metrics = prepared.traced()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), prepared.state
    )
    assert {"task", "output", "features"} <= metrics.keys()


VARIANTS: dict[str, dict[str, Any]] = {
    "task alone": {"output_weight": 0.0, "feature_weight": 0.0},
    "another type": {"prediction_type": "v_prediction", "noise_offset": 0.1, "input_perturbation": 0.1},
    "normalized": {
        "feature_normalize": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "scan_layers": True,
    },
    "fp16": {"mixed_precision": "fp16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_can_be_traced(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    prepared = prepare(bk_sdm, inputs, tmp_path, monkeypatch, **of_level(inputs, **VARIANTS[variant]))
    _, metrics = prepared.traced()
    assert ("output" in metrics) == (variant != "task alone")
    assert prepared.state.ema is None
    if variant == "another type":
        assert prepared.frozen.schedule.prediction_type == "v_prediction"
        assert prepared.frozen.teacher_schedule.prediction_type == "epsilon"


def test_unpruned_the_student_is_the_whole_teacher(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(bk_sdm, inputs, tmp_path, monkeypatch, prepare_unet=False, validation_epochs=2)
    prepared.export(prepared.state, tmp_path)
    assert_same_weights(tmp_path / "unet", inputs.model / "unet")


# ---- Steps and blocks together


CHAINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "codi": (codi, {}),
    "codi, both": (codi, {"train": "unet"}),
    "codi, text": (codi, {"distill_type": "unconditional", "cfg_aware_distill": True}),
    "lcm": (lcm, {"unet_time_cond_proj_dim": 16, "validation_sampling_steps": (1, 2)}),
    "lcm, lora": (lcm, {"use_lora": True, "lora_rank": 2, "validation_sampling_steps": (1, 2)}),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_student_with_fewer_blocks_is_a_teacher_of_few_steps(
    inputs: Inputs, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: str
) -> None:
    """As far as tracing a step; the slow test below runs them."""
    script, flags = CHAINS[chain]
    prepared = prepare(script, inputs._replace(model=student), tmp_path, monkeypatch, **flags)
    _, metrics = prepared.traced()
    assert "loss" in metrics
    if "controlnet" in prepared.state.params:
        assert not any(name == "mid_block" for name in prepared.state.params["controlnet"])


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_few_steps_and_fewer_blocks(inputs: Inputs, student: Path, tmp_path: Path, chain: str) -> None:
    script, flags = CHAINS[chain]
    out = run(script, inputs._replace(model=student), tmp_path, **flags)
    assert_reports(out, 2)
    if "lora" in chain:
        return
    made = Model.from_pretrained(out)
    assert made.networks.unet.config.mid_block_type is None
    control = np.zeros((SIZE, SIZE, 3), np.uint8) if made.networks.controlnet is not None else None
    pictures = made("a cat", control_image=control, height=SIZE, width=SIZE, steps=1, guidance_scale=1)
    assert len(np.unique(pictures)) > 10


# ---- Flags, and what is refused


def parse(words: list[str]) -> Any:
    return command_line.parse(bk_sdm.Args, words)


def test_the_command_line_of_the_seed() -> None:
    known = (
        "--pretrained_model_name_or_path=SG161222/Realistic_Vision_V4.0 "
        "--dataset_name=lambdalabs/pokemon-blip-captions --use_ema "
        "--resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4 "
        "--gradient_checkpointing --max_train_steps=15000 --distill_level=sd_small --output_weight=0.5 "
        "--feature-weight=0.5 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 "
        "--output_dir=sd-pokemon-model"
    )
    args = parse(known.split())
    assert (args.distill_level, args.output_weight, args.feature_weight) == ("sd_small", 0.5, 0.5)
    assert args.use_ema
    assert args.prepare_unet


def test_every_known_flag_sets_the_argument_of_its_name() -> None:
    known = (
        "--distill_level bk_tiny --prepare_unet False --output_weight 0.5 --feature_weight 0.4 --use_ema "
        "--non_ema_revision r --input_perturbation 0.1 --noise_offset 0.2 --prediction_type sample "
        "--validation_epochs 3 --feature_normalize"
    )
    shared = SHARED.replace("--validation_prompt ", "--validation_prompts ")
    args, defaults = parse([*known.split(), *shared.split()]), parse(["--pretrained_model_name_or_path", "other"])
    for word in known.split():
        if word.startswith("--"):
            assert getattr(args, word[2:]) != getattr(defaults, word[2:]), word
    assert args.validation_prompt == ("a", "b")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another family": ({"distill_level": "bk_base"}, "bk_base is for UNets of 4 resolutions, and this one has 2"),
    "no level": ({"distill_level": "huge"}, "--distill_level huge: there is no such level; there are bk_base,"),
    "no level of the table": (
        {"distill_level": "bk_base", "distill_table": LEVELS},
        r"bk_base: there is no such level in --distill_table .*; there are base, small, tiny",
    ),
    "no table": ({"distill_table": Path("/nowhere.yaml")}, r"/nowhere.yaml cannot be read as YAML: .*No such"),
    "weight": ({"output_weight": -1.0}, "--output_weight -1.0 is not possible: it must be at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_weights_are_loaded(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    flags, message = BAD[case]
    refuse_weights(monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        run(bk_sdm, inputs, tmp_path, **flags)
    assert "\n" not in str(error.value)


def test_a_table_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text("base: {resolutions: [")
    with pytest.raises(ValueError, match=r"table.yaml cannot be read as YAML: while parsing") as error:
        find_level("base", tmp_path / "table.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "table.yaml").write_text("- base")
    with pytest.raises(ValueError, match="holds no levels by name"):
        find_level("base", tmp_path / "table.yaml")


def test_a_model_with_a_controlnet_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    make_pipeline("controlnet", tmp_path).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="take a text-to-image model without a ControlNet"):
        run(bk_sdm, inputs._replace(model=tmp_path / "model"), tmp_path / "out", prepare_unet=False)


def test_a_student_whose_config_does_not_fit_its_weights_is_refused(
    inputs: Inputs, student: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(student, tmp_path / "student"))
    shutil.copy(inputs.model / "unet" / "config.json", spoilt / "unet" / "config.json")
    with pytest.raises(ValueError, match=r"does not fit its config\.json; check that they are from one model"):
        run(codi, inputs._replace(model=spoilt), tmp_path / "out")


def test_the_levels_fit_the_embedded_model() -> None:
    model = Model.from_pretrained(ASSETS / "avatars")
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(prune(model.networks.unet, model.params["unet"], level)[1]))
        for level in (find_level(name, LEVELS) for name in ("base", "small", "tiny"))
    ]
    assert counts == [4_304_400, 3_251_344, 1_659_376]
