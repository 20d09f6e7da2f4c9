"""From URLs to a student: the seed's two commands, one after the other."""

import shlex
import sys
from pathlib import Path

import pytest
from folders import SIZE, saved_pipeline
from test_coyo import images

from codi_jax.cli import command_line
from dataset_tools import coyo_1m_dataset_preprocess as coyo
from training_scripts import train_codi_flax as codi


def run(module, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *shlex.split(words)])
    command_line.run(module.Args, module.main)


@pytest.mark.slow
def test_codi_trains_on_what_the_tool_makes(tmp_path: Path, tmp_path_factory, monkeypatch):
    """Their flags as written, but for the input, the sizes and the number of steps."""
    model = saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))
    source, data = images(tmp_path / "in", 8), tmp_path / "dataset"
    run(
        coyo,
        f'--train_data_dir="{data}" --cache_dir="{tmp_path}" --max_train_samples=6 --num_proc=2 '
        f"--input {source} --resolution {SIZE}",
        monkeypatch,
    )
    run(
        codi,
        f"--pretrained_model_name_or_path={model} --output_dir={tmp_path}/student --train_data_dir={data} "
        f"--load_from_disk --cache_dir={tmp_path}/cache --resolution={SIZE} --learning_rate=1e-5 --train_batch_size=2 "
        '--revision="non-ema" --from_pt --max_train_steps=2 --checkpointing_steps=10000 --dataloader_num_workers=2 '
        "--distill_learning_steps 50 --onestepode control --onestepode_control_params target "
        "--onestepode_sample_eps v_prediction --distill_loss consistency_x --validation_steps 0 --report_to none "
        "--validation_sampling_steps 1",
        monkeypatch,
    )
    assert (tmp_path / "student/model_index.json").is_file()
    assert len((tmp_path / "student/metrics.jsonl").read_text().splitlines()) >= 1
