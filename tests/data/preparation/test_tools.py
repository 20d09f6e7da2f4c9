"""The smaller tools: a subset of LAION, and latents cached before training."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import SIZE, saved_pipeline
from picture_folders import write_folder
from test_coyo import contents, images, rows_of, summary

from codi_jax.data import latent_encoding
from codi_jax.models import sharding
from codi_jax.training.batches import load_batches, open_training_data
from codi_jax.training.teacher import load_teacher, open_teacher
from dataset_tools import cache_latents, laion_subset
from training_scripts import train_controlnet_flax as controlnet
from training_scripts import train_text_to_image_flax as text_to_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def subset(target: Path, source: Path, **changes) -> list[str]:
    options = {"resolution": 32, "num_proc": 1, "shard_size": 7, "max_train_samples": 12}
    laion_subset.main(laion_subset.Args(**options | {"input": str(source), "train_data_dir": str(target)} | changes))
    return [row["text"] for row in rows_of(target)]


def test_a_subset_of_a_table(tmp_path: Path):
    """Random, the same for the same seed whatever the processes, of rows that pass; images and captions alone."""
    source = images(tmp_path / "in", 30)
    table = {
        "image": [str(source / f"{number:04}.jpg") for number in range(30)],
        "text": [f"picture {number}" for number in range(30)],
        "aesthetic": [6.0 + number % 2 for number in range(30)],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    texts = subset(tmp_path / "one", tmp_path / "in.parquet", min_aesthetic_score=7)
    assert len(set(texts)) == 12
    assert all(int(text.split()[1]) % 2 for text in texts)
    assert texts != sorted(texts, key=lambda text: int(text.split()[1]))
    assert set(summary(tmp_path / "one")["rejected"]) == {"aesthetic score below 7"}
    assert subset(tmp_path / "two", tmp_path / "in.parquet", min_aesthetic_score=7, num_proc=2) == texts
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert subset(tmp_path / "other", tmp_path / "in.parquet", min_aesthetic_score=7, seed=1) != texts
    in_order = subset(tmp_path / "order", tmp_path / "in.parquet", shuffle=False)
    assert in_order == [f"picture {number}" for number in range(12)]
    assert rows_of(tmp_path / "order")[0].keys() == {"image", "text", "id"}


@pytest.mark.parametrize(("script", "task"), [(text_to_image, "none"), (controlnet, "column")])
def test_training_finds_the_latents(tmp_path: Path, tmp_path_factory, monkeypatch, script, task: str):
    """Of a model on disk, in two parts; training with the same flags computes nothing."""
    model = saved_pipeline("text-to-image", tmp_path_factory.mktemp("models"))
    data = write_folder(tmp_path / "data", 6, size=(SIZE, SIZE), condition_size=(SIZE, SIZE))
    shared = {
        "pretrained_model_name_or_path": str(model), "train_data_dir": str(data), "resolution": SIZE,
        "cache_dir": str(tmp_path / "cache"), "center_crop": True,
    }  # fmt: skip
    for part in (1, 0):
        cache_latents.main(cache_latents.Args(**shared, task=task, num_parts=2, part=part, encode_batch_size=2))

    def refuse(*_: object) -> None:
        raise AssertionError("the cache was not found")

    monkeypatch.setattr(latent_encoding.LatentEncoder, "encode", refuse)
    args = script.Args(**shared, cache_latents=True, train_batch_size=2, output_dir=str(tmp_path / "run"))
    model = load_teacher(open_teacher(args), args, sharding.make_mesh(1))
    loader = load_batches(args, model, open_training_data(args))
    assert {"moments", "context"} <= next(loader).keys()
    loader.close()


def test_streams_cannot_be_cached(tmp_path: Path):
    flags = {"pretrained_model_name_or_path": "m", "train_data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="a stream cannot be cached"):
        cache_latents.main(cache_latents.Args(**flags, streaming=True))
    with pytest.raises(ValueError, match="--part 3 is not possible: it must be between 0 and 1"):
        cache_latents.main(cache_latents.Args(**flags, num_parts=2, part=3))
