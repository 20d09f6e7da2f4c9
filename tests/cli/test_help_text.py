"""The help of every command: what matters on one screen, and everything by topic."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import OF, ROOT

from codi_jax.cli.command_line import parse
from codi_jax.cli.help_text import flags_of


def help_of(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *topic: str) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        parse(OF[name].Args, ["--help", *topic], "program")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", OF)
def test_every_flag_is_named_and_explained(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    overview, everything = (help_of(name, monkeypatch, capsys, *topic) for topic in ((), ("all",)))
    flags = flags_of(OF[name].Args)
    assert {flag.field for flag in flags} == {field.name for field in dataclasses.fields(OF[name].Args)}
    for flag in flags:
        assert flag.names[0] in re.findall(r"[\w-]+", overview)
        assert flag.text.endswith(".")
        assert "".join(flag.text.split()) in "".join(everything.split())
        assert all(each in everything for each in flag.names)


def test_what_matters_for_codi_is_on_one_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shown = help_of("train_codi_flax", monkeypatch, capsys)
    assert len(shown.splitlines()) < 60
    assert max(map(len, shown.splitlines())) <= 120
    explained, others = shown.split("all others, by topic:")
    assert explained.count("\n  --") == 10
    assert "--pretrained_model_name_or_path TEXT" in explained
    assert "(required)" in explained
    assert "(default: 1e-05)" in explained  # the script's, not that of the group
    assert "\n  optimizer    --scale_lr" in others
    assert "--learning_rate" not in others
    assert "--no_" not in others


def test_a_topic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shown = help_of("train_lcm_distil_instruct_pix2pix_sdxl", monkeypatch, capsys, "data")
    assert "--original_image_column, --conditioning_image_column TEXT" in shown
    assert "--streaming, --no_streaming\n" in shown
    assert "--learning_rate" not in shown
    assert "{lanczos,bicubic," in shown
    with pytest.raises(ValueError, match=r"--help weather is not possible: use one of all, model, data, method, "):
        parse(OF["train_codi_flax"].Args, ["--help", "weather"])


def test_the_reader_may_stop_early(tmp_path: Path) -> None:
    """As ``head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    script = ROOT / "training_scripts" / "train_codi_flax.py"
    ran = subprocess.run([sys.executable, script, "-h"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, "")
