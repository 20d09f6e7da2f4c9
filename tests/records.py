"""Records what reference implementations of metrics compute, for tests that cannot install them.

    pip install torch==2.13.0 torchvision==0.28.0 pytorch-fid==0.3.0 lpips==0.1.4
    python3 tests/records.py

torchvision from PyPI does not fit every build of torch, so it is not among the packages of the tests. The weights are
random: they follow from their names (`weights_of`), and only their shapes are recorded.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent / "evaluation"


def weights_of(shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Tensors of networks with batch normalizations, whose features keep their size from layer to layer."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.normal(size=shape)
        if name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 4:
            tensors[name] = noise * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            tensors[name] = 1 + 0.1 * noise
        else:
            tensors[name] = 0.1 * noise
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def images(count: int, size: int) -> np.ndarray:
    """Smooth random pictures, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    waves = rng.uniform(0, 12, (count, 3, 2)), rng.uniform(0, 6, (count, 3))
    phases = waves[0][..., 0, None, None] * x + waves[0][..., 1, None, None] * y + waves[1][..., None, None]
    return np.moveaxis(np.round(127.5 + 127.5 * np.sin(phases)), 1, -1).astype(np.uint8)


def record_inception() -> dict[str, Any]:
    """The features of pytorch-fid's network for pictures of 64 pixels, which it enlarges itself."""
    import torch
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_, **__: {}  # instead of downloading
    shapes: dict[str, list[int]] = {}
    original = torch.nn.Module.load_state_dict

    def load(module: Any, _: Any) -> None:
        """Loads random weights instead."""
        found = module.state_dict()
        shapes.update({name: list(t.shape) for name, t in found.items() if t.ndim})
        tensors = {name: torch.from_numpy(array) for name, array in weights_of(shapes).items()}
        original(module, {**found, **tensors})

    torch.nn.Module.load_state_dict = load
    try:
        model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    finally:
        torch.nn.Module.load_state_dict = original
    pixels = torch.from_numpy(images(3, 64)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = model(pixels)[0].squeeze(3).squeeze(2).numpy()
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(("fc.", "AuxLogits"))}
    return {"shapes": shapes, "features": np.round(features[:, ::16].astype(float), 6).tolist()}


def record_lpips(backbone: str) -> dict[str, Any]:
    """The package's distances of four pictures to one another, with random weights; those of its heads are positive."""
    import lpips
    import torch

    model = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, lpips=True, verbose=False).eval()
    names = {}  # in the classifier's own file, by the module's name
    for name in model.state_dict():
        parts = name.split(".")
        if name.startswith("net.slice"):
            names[name] = f"features.{parts[2]}.{parts[3]}"
        elif name.startswith("lin") and not name.startswith("lins"):
            names[name] = name
    shapes = {names[name]: list(each.shape) for name, each in model.state_dict().items() if name in names}
    tensors = {name: torch.from_numpy(array) for name, array in weights_of(shapes).items()}
    tensors = {name: each.abs() if name.startswith("lin") else each for name, each in tensors.items()}
    # Each head is in the state twice: as lin0, and in the list lins.
    model.load_state_dict({name: tensors[other] for name, other in names.items()}, strict=False)
    pixels = torch.from_numpy(images(4, 64)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        distances = model(pixels, pixels.roll(1, dims=0)).flatten().tolist()
    return {"shapes": shapes, "distances": distances}


def read(name: str) -> dict[str, Any]:
    """A record by name."""
    return json.loads((HERE / f"recorded_{name}.json").read_text())


if __name__ == "__main__":
    records = {"inception": record_inception(), "lpips": {name: record_lpips(name) for name in ("alex", "vgg")}}
    for name, record in records.items():
        (HERE / f"recorded_{name}.json").write_text(json.dumps(record) + "\n")
