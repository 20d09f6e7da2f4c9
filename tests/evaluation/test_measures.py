"""The metrics of ``--metrics``: which there are, what they need, and that they are of the right images."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from clip_folders import write_clip
from PIL import Image
from quick_features import quarters
from test_encoders import write_lpips
from torch.nn.functional import cosine_similarity
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from codi_jax.evaluation import measures
from codi_jax.evaluation.arguments import Args, MetricName
from codi_jax.evaluation.attributes import Reader
from codi_jax.evaluation.measures import build_measures
from codi_jax.evaluation.metrics import fid
from codi_jax.evaluation.report import METRICS
from codi_jax.evaluation.samples import Data, Samples, open_samples
from codi_jax.io.images import canny
from dataset_tools import avatars

ARGS = Args(models=(), data="data")


def pictures(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def data_of(samples: Samples) -> Data:
    """Samples in memory."""

    def read(numbers: Any) -> Samples:
        fields = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
        return Samples(
            **{
                name: part if part is None or not len(part) else
                part[list(numbers)] if isinstance(part, np.ndarray) else [part[i] for i in numbers]
                for name, part in fields.items()
            }
        )  # fmt: skip

    return Data("samples", len(samples.prompts), read)


def measured(args: Args, samples: Samples, made: np.ndarray) -> dict[str, float]:
    """The metrics of all images, which are observed in two parts."""
    data, half = data_of(samples), len(made) // 2
    built = build_measures(args, data)
    parts = [
        built.observe(made[part], data.read(range(len(made))[part])) for part in (slice(0, half), slice(half, None))
    ]
    return built.summarize({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "load_features", lambda: quarters)
    monkeypatch.setattr(measures, "inception_features", lambda weights, resizing: lambda x: 2 * quarters(x))


def test_every_metric_has_a_name_and_a_column() -> None:
    assert list(measures._METRICS) == list(get_args(MetricName))
    assert set(measures._OBSERVERS) == {metric.observed for metric in measures._METRICS.values()}
    assert set(measures._METRICS) <= {*METRICS, "attributes", "precision_recall"}


def test_the_right_edit_is_a_success() -> None:
    before, after = pictures(4), pictures(4, seed=1)
    variants = [np.stack(pair) for pair in zip(before, after, strict=True)]
    samples = Samples(["edit"] * 4, after, inputs=before, variants=variants, wanted=[1] * 4)
    right, unedited = (measured(ARGS, samples, made) for made in (after, before))
    assert set(right) == {"fid_lite", "kid_lite", "edit_success", "preservation", "psnr"}
    assert (right["edit_success"], unedited["edit_success"]) == (1, 0)
    assert right["psnr"] == 100
    assert right["fid_lite"] == pytest.approx(0, abs=1e-9)


def test_what_an_edit_leaves_is_measured_where_it_leaves_something() -> None:
    before, noise = pictures(2), pictures(2, seed=1)
    after = before.copy()
    after[0, :32] = noise[0, :32]
    after[1] = before[1] ^ 128  # nothing is left
    made = before.copy()
    made[0, 40] ^= 16
    made[1] = 0
    outside = (np.abs(after[0].astype(int) - before[0]) <= 8).all(axis=-1).sum()
    kept = measured(ARGS, Samples(["a", "b"], after, inputs=before), made)["preservation"]
    assert kept == pytest.approx(10 * np.log10(255**2 / (16**2 * 64 / outside)), rel=1e-6)


def test_inception_features_give_four_metrics() -> None:
    real = pictures(6) // 2
    args = dataclasses.replace(ARGS, inception_weights=Path("weights.pth"))
    right, inverted = (measured(args, Samples(["a"] * 6, real), made) for made in (real, 255 - real))
    assert right["fid"] == pytest.approx(0, abs=1e-9)
    assert (right["precision"], right["recall"]) == (1, 1)
    assert inverted["fid"] == pytest.approx(4 * inverted["fid_lite"])
    assert inverted["fid"] > 0.1
    assert "fid" not in measured(ARGS, Samples(["a"] * 6, real), real)
    assert "precision" not in measured(args, Samples(["a"] * 3, real[:3]), real[:3])  # fewer than neighbors
    with pytest.raises(ValueError, match="--metrics precision_recall needs at least 4 pictures"):
        build_measures(dataclasses.replace(args, metrics=("precision_recall",)), data_of(Samples(["a"] * 3, real[:3])))


def test_reference_moments_are_those_of_the_images(tmp_path: Path) -> None:
    """A folder, and the file that is written for it, give the FID of the images themselves."""
    real, made = pictures(8), pictures(5, seed=1)
    (tmp_path / "real" / "more").mkdir(parents=True)
    for i, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / "real" / ("more" if i % 2 else ".") / f"{i}.png")
    weights = {"inception_weights": Path("weights.pth"), "metrics": ("fid",)}
    file = tmp_path / "stats" / "real.npz"
    from_folder = measured(
        dataclasses.replace(ARGS, **weights, reference=tmp_path / "real", save_reference=file), Samples(["a"] * 5), made
    )
    from_file = measured(dataclasses.replace(ARGS, **weights, reference=file), Samples(["a"] * 5), made)
    assert from_folder == {"fid": pytest.approx(fid(2 * quarters(made), 2 * quarters(real)))}
    assert from_file == {"fid": pytest.approx(from_folder["fid"], abs=1e-9)}  # of traces of about 1
    with np.load(file) as saved:  # as pytorch-fid computes and names them
        np.testing.assert_allclose(saved["mu"], np.mean(2 * quarters(real), axis=0))
        np.testing.assert_allclose(saved["sigma"], np.cov(2 * quarters(real), rowvar=False))
    with pytest.raises(
        ValueError, match=r"--reference .*none has 0 images: give a folder with at least two, or an \.npz"
    ):
        build_measures(dataclasses.replace(ARGS, **weights, reference=tmp_path / "none"), data_of(Samples(["a"] * 5)))
    for other in ({"metrics": ("fid_lite",)}, {"reference": file}):
        args = dataclasses.replace(ARGS, **{**weights, "save_reference": file, "reference": tmp_path / "real", **other})
        with pytest.raises(
            ValueError, match="--save_reference needs fid, kid or precision_recall, and the real images"
        ):
            build_measures(args, data_of(Samples(["a"] * 5)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file .*stats\.npz: check --reference"),
        (b"PK\x03\x04", "has no mu and sigma, as pytorch-fid saves them"),
        ({"mu": np.zeros(3)}, "has no mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "mu and sigma do not fit each other"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "holds NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, "moments of 2 features, but there are 12"),
    ],
)
def test_damaged_moments_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    args = dataclasses.replace(ARGS, inception_weights=Path("w.pth"), metrics=("fid",), reference=file)
    with pytest.raises(ValueError, match=message):
        measured(args, Samples(["a"] * 4), pictures(4))


def test_clip_metrics_are_those_of_transformers(tmp_path: Path) -> None:
    """Cosines with the caption, with the input, and of the changes; without captions only the input's."""
    model = write_clip(tmp_path)
    args = dataclasses.replace(ARGS, clip=str(tmp_path), metrics=("clip_score", "clip_image", "clip_direction"))
    before, made = pictures(4), pictures(4, seed=1)
    pairs = [("a heart", "a red heart"), ("cat", "dog"), ("sun", "moon"), ("one", "two flags")]
    samples = Samples(["edit"] * 4, made, inputs=before, captions=pairs)
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)

    def embedded(images: np.ndarray) -> Any:
        return model.get_image_features(**processor(list(images), return_tensors="pt")).pooler_output.detach()

    def read(texts: list[str]) -> Any:
        return model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output.detach()

    x, y = embedded(before), embedded(made)
    a, b = (read([pair[i] for pair in pairs]) for i in (0, 1))
    changes = (each / each.norm(dim=1, keepdim=True) for each in (x, y, a, b))
    x1, y1, a1, b1 = changes
    found = measured(args, samples, made)
    assert found == {
        "clip_score": pytest.approx(100 * float(cosine_similarity(y, b).clamp(min=0).mean()), rel=1e-4),
        "clip_image": pytest.approx(float(cosine_similarity(x, y).mean()), rel=1e-4),
        "clip_direction": pytest.approx(float(cosine_similarity(y1 - x1, b1 - a1).mean()), rel=1e-4, abs=1e-6),
    }
    of_caption = measured(dataclasses.replace(args, metrics=("clip_score",)), Samples([p[1] for p in pairs]), made)
    assert of_caption == {"clip_score": pytest.approx(found["clip_score"], rel=1e-6)}
    with pytest.raises(ValueError, match="--metrics clip_direction needs edits with the columns original_prompt and"):
        build_measures(args, data_of(dataclasses.replace(samples, captions=[])))


def test_edges_are_measured_where_the_conditions_are_edges() -> None:
    made = pictures(2)
    edges = np.stack([np.repeat(canny(each)[..., None], 3, axis=-1) for each in made])
    assert measured(ARGS, Samples(["a"] * 2, made, conditions=edges), made)["edge_f1"] == 1
    assert "edge_f1" not in measured(ARGS, Samples(["a"] * 2, made, conditions=made // 2), made)


def test_lpips_is_of_the_real_image(tmp_path: Path) -> None:
    weights, heads = write_lpips("alex", tmp_path)
    args = dataclasses.replace(ARGS, lpips_weights=weights, lpips_heads=heads, metrics=("lpips",))
    real = pictures(3)
    assert measured(args, Samples(["a"] * 3, real), real)["lpips"] == pytest.approx(0, abs=1e-6)
    assert measured(args, Samples(["a"] * 3, real), real[::-1])["lpips"] > 0.01


@pytest.mark.parametrize("task", ["text", "edit"])
def test_attributes_are_read_where_the_data_names_them(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit counts if everything is as it should be; of captions the share."""
    avatars.main(avatars.Args(train_data_dir=str(tmp_path), task=task, max_train_samples=2, num_proc=1))
    data = open_samples(str(tmp_path))
    samples = data.read(range(2))
    assert samples.truth is not None
    wrong = {**samples.looks[1], "background": "none"}

    class Fake(Reader):
        def __init__(self) -> None:
            pass

        def read(self, pictures: np.ndarray) -> list[dict[str, str]]:
            return [dict(samples.looks[0]), wrong]

    monkeypatch.setattr(measures, "Reader", Fake)
    monkeypatch.setattr(measures, "READER", tmp_path)
    built = build_measures(dataclasses.replace(ARGS, metrics=("attributes",)), data)
    values = built.summarize(built.observe(samples.truth, samples))
    assert values["attribute_accuracy"] == pytest.approx((1 + 1 - 1 / len(wrong)) / 2)
    assert values.get("edit_accuracy") == (0.5 if task == "edit" else None)


@pytest.mark.parametrize(
    ("metric", "fields", "message"),
    [
        ("fid", {}, "--metrics fid needs --inception_weights"),
        ("lpips", {}, "--metrics lpips needs --lpips_weights"),
        ("dino", {}, "--metrics dino needs --dino"),
        ("clip_score", {}, "--metrics clip_score needs --clip"),
        ("psnr", {}, "--metrics psnr needs data with the real images"),
        ("fid_lite", {}, "--metrics fid_lite needs real images: --data with images, or --reference"),
        ("fid_lite", {"reference": Path("a.npz")}, "--metrics fid_lite needs a folder of images as --reference"),
        ("kid", {"reference": Path("a.npz"), "inception_weights": Path("w")}, "--metrics kid needs a folder of images"),
        ("attributes", {}, "--metrics attributes needs data with attributes"),
        ("edge_f1", {}, "--metrics edge_f1 needs data with edges as conditions"),
        ("edit_success", {}, "--metrics edit_success needs edits with variants"),
    ],
)
def test_what_a_metric_lacks_is_named(metric: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_measures(dataclasses.replace(ARGS, metrics=(metric,), **fields), data_of(Samples(["a", "b"])))


def test_captions_of_coco_and_of_other_files(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 7, "id": 1, "caption": " a dog \n"},
        {"image_id": 3, "id": 2, "caption": "a cat"},
        {"image_id": 7, "id": 3, "caption": "another"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    (tmp_path / "captions.txt").write_text("a dog\n\na cat\n")
    for file in ("captions.json", "captions.txt"):
        assert open_samples(str(tmp_path / file)).read([0, 1]) == Samples(["a dog", "a cat"])
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": [{"image_id": 1}]}))
    with pytest.raises(ValueError, match=r"instances\.json is not a file of COCO's captions"):
        open_samples(str(tmp_path / "instances.json"))


def test_pictures_with_captions_beside_them(tmp_path: Path) -> None:
    """Any data that training takes, cropped to one size where asked."""
    for i, size in enumerate([(40, 30), (30, 30)]):
        Image.fromarray(pictures(1, 64, i)[0]).resize(size).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    cropped = open_samples(str(tmp_path), 16).read([0, 1])
    assert cropped.prompts == ["picture 0", "picture 1"]
    assert cropped.truth is not None
    assert cropped.truth.shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="differ in size: give --resolution"):
        open_samples(str(tmp_path)).read([0, 1])
