"""Every command with malformed flags: one sentence that names the flag, before anything is read or downloaded."""

import dataclasses
import importlib
import itertools
import math
import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags

SCRIPTS = (
    "adapt_instruct_pix2pix", "train_autoencoder_flax", "train_bk_sdm_flax", "train_codi_flax", "train_controlnet_flax",
    "train_disback_flax", "train_instruct_pix2pix_flax", "train_lcm_distil_instruct_pix2pix_sdxl", "train_lcm_flax",
    "train_tcd_flax", "train_tcd_instruct_pix2pix_flax", "train_text_to_image_flax",
)  # fmt: skip
TOOLS = (
    "avatars", "cache_latents", "coyo_1m_dataset_preprocess", "emoji", "laion_subset", "make_edit_dataset",
    "train_tokenizer",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
OF = {
    **{name: importlib.import_module(f"training_scripts.{name}") for name in SCRIPTS},
    **{name: importlib.import_module(f"dataset_tools.{name}") for name in TOOLS},
    **{name: importlib.import_module(f"codi_jax.{name}") for name in ("app", "generate", "evaluate")},
}

# Where a negative number means something: a direction to go against, a similarity, a level below any other.
MAY_BE_NEGATIVE = {
    "local_rank", "lora_scale", "controlnet_conditioning_scale", "weight", "min_clip_similarity",
    "min_image_similarity", "min_direction_similarity", "min_caption_similarity", "min_aesthetic_score",
}  # fmt: skip
MAY_BE_INFINITE = {"max_grad_norm"}
OF_THE_MODEL = {("generate", "steps")}  # how many there can be, its sampler says
SINGLE = 2**40  # no number of steps or pixels, but possible as a seed


def needed(name: str, folder: Path) -> dict[str, Any]:
    """The least that a command asks for; models that are not there."""
    data, out = str(folder / "data"), str(folder / "out")
    (folder / "data").mkdir(exist_ok=True)
    model = {"pretrained_model_name_or_path": "none/such"}
    match name:
        case "adapt_instruct_pix2pix":
            return {**model, "lora": "none/such", "output_dir": out}
        case "app":
            return {"model": "none/such"}
        case "train_autoencoder_flax":
            return {**model, "train_data_dir": data, "output_dir": out}
        case "cache_latents":
            return {**model, "train_data_dir": data}
        case "avatars":
            return {"train_data_dir": out}
        case "emoji":
            return {"output_dir": Path(out)}
        case "train_tokenizer":
            return {"train_data_dir": Path(data), "output_dir": Path(out)}
        case "make_edit_dataset":
            return {"train_data_dir": out, "input": "none.parquet"}
        case "coyo_1m_dataset_preprocess" | "laion_subset":
            return {"train_data_dir": out, "input": "none.parquet"}
        case "generate":
            return {"model": "none/such", "prompt": "a", "output": folder / "out.png"}
        case "evaluate":
            return {"models": ("a=none/such",), "output_dir": Path(out)}
        case _:
            return {**model, "train_data_dir": data, "output_dir": out}


def numeric_flags(name: str) -> dict[str, set[type]]:
    """The flags that take numbers, one or several, and their kinds."""
    found = {}
    for flag, annotation in typing.get_type_hints(OF[name].Args).items():
        leaves = {annotation, *typing.get_args(annotation)}
        leaves |= {leaf for each in leaves for leaf in typing.get_args(each)}
        if kinds := leaves & {int, float}:
            found[flag] = kinds
    return found


def given(name: str, flag: str, value: Any) -> Any:
    """The value as the field holds it: a tuple where the flag takes several."""
    annotation = typing.get_type_hints(OF[name].Args)[flag]
    if typing.get_origin(annotation) is not tuple:
        return value
    return (value,) if Ellipsis in typing.get_args(annotation) else (value,) * len(typing.get_args(annotation))


def outcome(name: str, folder: Path, **flags: Any) -> str:
    """What a command answers to these flags: nothing where it would go on."""
    args = OF[name].Args(**{**needed(name, folder), **flags})
    try:
        args.check()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert any(f"--{flag}" in message for flag in flags), message
        return message
    return ""


@pytest.mark.parametrize("name", OF)
def test_every_number_is_tried(name: str, tmp_path: Path) -> None:
    flags = numeric_flags(name)
    assert issubclass(OF[name].Args, Flags)
    assert flags
    assert outcome(name, tmp_path) == ""
    let_through = []
    for flag, kinds in flags.items():
        values: list[Any] = [-1, -5, 2**70, *([SINGLE] if flag not in ("seed", "seeds") else [])]
        if float in kinds:
            values = [float("nan"), float("-inf"), -1.0, -5.0]
            values += [] if flag in MAY_BE_INFINITE else [math.inf, float("1e400")]
        if flag in MAY_BE_NEGATIVE or (name, flag) in OF_THE_MODEL:
            values = [value for value in values if not -10 < value < 0]
        let_through += [
            (flag, value) for value in values if not outcome(name, tmp_path, **{flag: given(name, flag, value)})
        ]
        outcome(name, tmp_path, **{flag: given(name, flag, kinds.pop()(0))})  # a sentence or a run
    assert let_through == []


@pytest.mark.parametrize("name", OF)
def test_flags_are_checked_before_anything_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model or a data set that is not there would be the next message."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    flag = next(
        flag for flag in ("seed", "seeds", "part", "copies", "vocab_size", "port") if flag in numeric_flags(name)
    )
    values = {**needed(name, tmp_path), flag: -1}
    words = itertools.chain.from_iterable(
        (f"--{key}", *(value if isinstance(value, tuple) else (str(value),))) for key, value in values.items()
    )
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    run = OF[name].run if name in ("app", "generate", "evaluate") else OF[name].main
    with pytest.raises(SystemExit, match=rf"^error: --{flag} -1[^\n]*\.$"):
        run() if name == "train_tokenizer" else command_line.run(OF[name].Args, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


FOLDERS = [
    (name, flag)
    for name in OF
    for flag in ("cache_dir", "cache_latents_dir", "ccache", "logging_dir", "output_dir")
    if flag in [field.name for field in dataclasses.fields(OF[name].Args)]
]


@pytest.mark.parametrize("below", ["", "new/folder"])
@pytest.mark.parametrize(("name", "flag"), FOLDERS)
def test_a_file_in_place_of_a_folder(name: str, flag: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert re.search("is a file|File exists", outcome(name, tmp_path, **{flag: tmp_path / "file" / below}))


@pytest.mark.parametrize("name", [name for name, flag in FOLDERS if flag == "output_dir"])
def test_a_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    """On a file system that takes no files from anybody."""
    assert "cannot be written" in outcome(name, tmp_path, output_dir=Path("/proc/self/out"))


def test_every_command_is_tried() -> None:
    there = {path.stem for folder in ("training_scripts", "dataset_tools") for path in (ROOT / folder).glob("*.py")}
    assert there - {"__init__"} == {*SCRIPTS, *TOOLS}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train_lcm_flax", {"w_min": -5.0}, "--w_min -5.0 is not possible: it must be at least 0"),
        ("train_lcm_flax", {"lora_alpha": 0.0}, "--lora_alpha 0.0 is not possible: it must be positive"),
        ("train_lcm_flax", {"lora_rank": 10**9}, "--lora_rank 1000000000 is not possible: it must be between 1 and"),
        ("train_codi_flax", {"resolution": 10**8}, "--resolution 100000000 is not possible: it must be at most 16384"),
        ("train_codi_flax", {"dataloader_num_workers": 2000}, "--dataloader_num_workers 2000 is not possible"),
        ("train_disback_flax", {"path": __file__}, "--path .* is not possible: .* is a file, but must be a folder"),
        ("generate", {"seed": 2**63}, r"--seed 9223372036854775808 is not possible: it must be from 0 to 2\^63 - 1"),
        ("generate", {"seed": 2**63 - 1}, "--seed 9223372036854775807 is not possible: it must be smaller"),
        ("evaluate", {"seeds": (0, 2**62)}, "--seeds 0 4611686018427387904 is not possible: it must be below 2"),
        (
            "coyo_1m_dataset_preprocess",
            {"canny_low": (150, 250)},
            "--canny_low 150 250 is not possible: it must be at most --canny_high 200 200",
        ),
        ("adapt_instruct_pix2pix", {"weight": (0.5, 0.50000001)}, "--weight 0.5 0.50000001 is not possible"),
        ("train_autoencoder_flax", {"validation_prompt": ("a",)}, "--validation_prompt has no place here"),
        ("train_autoencoder_flax", {"validation_image": ("a",)}, "--validation_image has no place here"),
        (
            "train_codi_flax",
            {"learning_rate": 0.0, "lr_scheduler": "polynomial"},
            "--learning_rate 0.0 is not possible: it must be above 1e-07, where --lr_scheduler polynomial ends",
        ),
        ("cache_latents", {"encode_batch_size": 10**9}, "--encode_batch_size 1000000000 is not possible"),
    ],
)
def test_messages(name: str, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert re.match(message, outcome(name, tmp_path, **flags))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("generate", {"seed": 2**62, "guidance_scale": 0.0, "lora_scale": -0.5}),
        ("train_codi_flax", {"max_grad_norm": math.inf, "learning_rate": 0.0}),
        ("coyo_1m_dataset_preprocess", {"canny_low": (20, 100), "canny_high": (60, 250)}),
    ],
)
def test_what_is_unusual_but_possible(name: str, flags: dict[str, Any], tmp_path: Path) -> None:
    assert outcome(name, tmp_path, **flags) == ""


# ---- Flags that are on or off


def switches(name: str) -> list[str]:
    return [flag for flag, kind in typing.get_type_hints(OF[name].Args).items() if kind is bool]


def parse(name: str, folder: Path, *words: str) -> Any:
    values = needed(name, folder).items()
    least = [f"--{key}={value}" for key, value in values if not isinstance(value, tuple)]
    return command_line.parse(OF[name].Args, [*least, *(["--models", "a=b"] if name == "evaluate" else []), *words])


@pytest.mark.parametrize("name", [name for name in OF if switches(name)])
@pytest.mark.parametrize(("on", "off"), [("--{}", "--no_{}"), ("--{} True", "--{} False"), ("--{}=true", "--{}=no")])
def test_all_spellings_of_all_switches(name: str, on: str, off: str, tmp_path: Path) -> None:
    for spelling, value in ((on, True), (off, False)):
        words = " ".join(spelling.format(flag) for flag in switches(name)).split()
        args = parse(name, tmp_path, *words)
        assert {flag: getattr(args, flag) for flag in switches(name)} == dict.fromkeys(switches(name), value)
        hyphens = [word.replace("_", "-") for word in words]
        assert dataclasses.replace(parse(name, tmp_path, *hyphens)) == args
