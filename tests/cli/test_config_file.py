"""Flags from files: the same as on the command line."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_commands import OF, needed

from codi_jax.cli import config_file
from codi_jax.cli.command_line import parse
from codi_jax.cli.flags import Scope
from codi_jax.training import starting
from codi_jax.training.flags import RunFlags
from codi_jax.training.starting import LoopFlags

CODI = OF["train_codi_flax"].Args


def parsed(tmp_path: Path, text: str, *words: str, args_class: Any = RunFlags) -> Any:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return parse(args_class, ["--config", str(tmp_path / "run.yaml"), *words])


@pytest.mark.parametrize("name", OF)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    args = OF[name].Args(**needed(name, tmp_path))
    assert parsed(tmp_path, config_file.dump(args.values_within(Scope.PROCESS)), args_class=OF[name].Args) == args


def test_values_of_every_kind(tmp_path: Path) -> None:
    args = CODI(
        pretrained_model_name_or_path="a: b # c", learning_rate=1e-12, max_grad_norm=float("inf"), streaming=True,
        validation_prompt=("yes", "", "null", "2026-11-30", "a\nb", "ü"), validation_sampling_steps=(), seed=2**40,
        ccache=Path("~/x y"), caption_column="", tracker_project_name="0x10", train_shards_path_or_url="{0..9}.tar",
    )  # fmt: skip
    assert parsed(tmp_path, config_file.dump(args.values_within(Scope.PROCESS)), args_class=CODI) == args


def test_as_people_write_them(tmp_path: Path) -> None:
    text = "# Mine.\nlearning-rate: 1e-4\nstreaming: Yes\nmax_train_samples: null\nval_image_url: x.png\nscale_lr:\n"
    args = parsed(tmp_path, text)
    assert args == RunFlags(learning_rate=1e-4, streaming=True, validation_image=("x.png",))
    assert parsed(tmp_path, '{"resolution": 64, "random_flip": true}') == RunFlags(resolution=64, random_flip=True)


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    text = "validation_image: [a.png, b.png]\nvalidation_prompt: [a, b]\nstreaming: true\nresolution: 64"
    args = parsed(tmp_path, text, "--val_image_url", "c.png", "--no_streaming", "--resolution=32")
    assert args == RunFlags(validation_image=("c.png",), validation_prompt=("a", "b"), resolution=32)
    (tmp_path / "other.yaml").write_text("resolution: 16\nseed: 3")
    both = parsed(tmp_path, "resolution: 64\nstreaming: true", f"--config={tmp_path / 'other.yaml'}")
    assert both == RunFlags(resolution=16, streaming=True, seed=3)


def test_a_run_repeats_another(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Args(LoopFlags):
        betas: tuple[float, float] = (0.9, 0.999)

    args = starting.start(Args(output_dir=str(tmp_path / "first"), hub_token="secret", betas=(0.5, 1e-7)))
    again = parse(Args, ["--output_dir", str(tmp_path / "second"), "--config", str(tmp_path / "first" / "config.yaml")])
    assert again == dataclasses.replace(args, output_dir=str(tmp_path / "second"), hub_token=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolutoin: 64", "there is no flag resolutoin: did you mean resolution?"),
        ("weather: fine", "there is no flag weather"),
        ("3: 4", "there is no flag 3"),
        ("resolution: [1, 2]", "resolution must be one text or number"),
        ("streaming: [true]", "streaming must be true or false"),
        ("streaming: maybe", "streaming must be true or false"),
        ("validation_prompt: [[a]]", r"validation_prompt must be texts or numbers, \[a, b\]"),
        ("learning_rate: {a: 1}", "learning_rate must be one text or number"),
        ("resolution 64", r"is not a file of flags \(it must have one flag a line, such as resolution: 512\)"),
        ("a: [", r"is not a file of flags \(while parsing"),
        ("a: !!python/object/apply:os.system [ls]", "there is no flag a"),
        ("[" * 100_000, "is not a file of flags"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run\.yaml:? {message}"):
        parsed(tmp_path, text)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse(RunFlags, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse(RunFlags, ["--config"])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.yaml is not a file of flags"):
        parse(RunFlags, ["--config", str(tmp_path / "bytes.yaml")])


def test_a_bomb_is_not_written_out(tmp_path: Path) -> None:
    """Ten times ten times … ten: as text, it would fill the memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ValueError, match="there is no flag a0"):
        parsed(tmp_path, "\n".join(lines))
    nested = "[" * 3 + ", ".join(["*x"] * 9) + "]" * 3
    for flag in ("streaming", "resolution", "validation_prompt"):
        with pytest.raises(ValueError, match=f"{flag} must be"):
            parsed(tmp_path, f"caption_column: &x a\n{flag}: {nested}")


def test_the_negative_of_a_switch_is_no_flag_of_a_file(tmp_path: Path) -> None:
    """Read as the switch itself, it would mean the opposite."""
    with pytest.raises(ValueError, match=r"run\.yaml: there is no flag no_streaming: did you mean streaming\?"):
        parsed(tmp_path, "no_streaming: true")
