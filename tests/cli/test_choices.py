import pytest

from codi_jax.cli.command_line import parse
from codi_jax.data.images import condition_for
from codi_jax.training.flags import ConditionFlags
from dataset_tools import cache_latents


@pytest.mark.parametrize(
    ("given", "name"),
    [("low_resolution", "super_resolution"), ("mask", "inpainting"), ("inpainting", "inpainting"), ("edit", "edit")],
)
def test_former_names_of_conditions_mean_those_of_today(given: str, name: str):
    assert parse(ConditionFlags, ["--task", given]) == ConditionFlags(task=name)
    model = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
    assert parse(cache_latents.Args, [*model, f"--task={given}"]).task == name


def test_the_help_shows_the_names_of_today_alone(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(ConditionFlags, ["--help"])
    shown = capsys.readouterr().out
    assert "{column,edit,canny,super_resolution,inpainting}" in shown
    assert "low_resolution" not in shown
    assert "column" in shown.partition("default: ")[2]


def test_another_name_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(ConditionFlags, ["--task", "depth"])
    shown = " ".join(capsys.readouterr().err.split())
    assert "'depth' is not one of column, edit, canny, super_resolution," in shown.replace("│ ", "").replace("│", "")
    with pytest.raises(ValueError, match="no condition is called 'depth': use one of canny, super_resolution, inpain"):
        condition_for("depth")
