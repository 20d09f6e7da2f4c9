"""LoHa, LoKr, Tucker decompositions and whole differences: against PEFT, which has them too, and in files."""

import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapters import SD15, parameters, write
from oracle import make_torch

from codi_jax.io.lora_files import load_lora, save_lora
from codi_jax.io.lycoris import weight_difference
from codi_jax.io.state_dict import to_state_dict
from codi_jax.models.config import WeightsError
from codi_jax.models.lora import lora_interceptor, merge_lora

LINEAR, CONVOLUTION, POINT = (12, 8), (12, 8, 3, 3), (12, 8, 1, 1)
LAYERS = ["to_q", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]  # dense, and convolutions of both windows


def layer_of(shape: tuple[int, ...]) -> torch.nn.Module:
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    return torch.nn.Conv2d(shape[1], shape[0], shape[2], padding="same")


def randomized(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def tensors_of(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors of one layer that PEFT adapts, by LyCORIS's names."""
    return {
        name.split(".")[0]: tensor.detach().numpy()
        for name, tensor in layer.named_parameters()
        if name.startswith(("hada_", "lokr_"))
    }


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION, POINT])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=4, alpha=3, target_modules=["0"]),
        peft.LoHaConfig(r=4, alpha=3, target_modules=["0"], use_effective_conv2d=True),
        peft.LoKrConfig(r=2, alpha=3, target_modules=["0"], decompose_factor=2),
        peft.LoKrConfig(r=1, alpha=3, target_modules=["0"], decompose_both=True, decompose_factor=4),
        peft.LoKrConfig(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True),
        peft.LoKrConfig(r=64, alpha=3, target_modules=["0"]),  # larger than the factors: both are whole
    ],
    ids=["loha", "loha-core", "lokr", "lokr-both", "lokr-core", "lokr-whole"],
)
def test_differences_equal_peft(shape: tuple[int, ...], config: peft.PeftConfig):
    model = peft.get_peft_model(torch.nn.Sequential(layer_of(shape)), config)
    layer = model.base_model.model[0]
    randomized(layer)
    wanted = layer.get_delta_weight("default").detach().numpy()
    tensors = tensors_of(layer)
    is_whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
    made = weight_difference(tensors, shape, 3.0)
    np.testing.assert_allclose(made * (3 / config.r if is_whole else 1), wanted, rtol=1e-5, atol=1e-6)


def test_the_kronecker_product_by_its_definition():
    """ΔW[(i, k), (j, l)] = W₁[i, j] W₂[k, l] (Yeh et al., 2023, equation 4), in float64."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((3, 2)), rng.standard_normal((4, 5))
    wanted = np.einsum("ij,kl->ikjl", first, second).reshape(12, 10)
    made = weight_difference({"lokr_w1": first, "lokr_w2": second}, (12, 10), None)
    np.testing.assert_allclose(made, wanted, rtol=1e-6)


def test_a_core_between_two_factors_by_its_definition():
    """ΔW[o, i, h, w] = Σ up[o, p] core[p, q, h, w] down[q, i], times α / r."""
    rng = np.random.default_rng(0)
    up, core, down = rng.standard_normal((12, 4)), rng.standard_normal((4, 4, 3, 3)), rng.standard_normal((4, 8))
    tensors = {"up": up[..., None, None], "lora_mid": core, "down": down[..., None, None]}
    made = weight_difference(tensors, CONVOLUTION, 2.0)
    wanted = np.zeros(CONVOLUTION)
    for p in range(4):
        for q in range(4):
            wanted += up[:, p, None, None, None] * core[p, q][None, None] * down[q, None, :, None, None]
    np.testing.assert_allclose(made, wanted * 2 / 4, rtol=1e-5, atol=1e-6)


def test_alpha_is_the_rank_by_default():
    rng = np.random.default_rng(0)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {name: rng.standard_normal((12, 4) if name.endswith("a") else (4, 8)) for name in names}
    default = weight_difference(tensors, LINEAR, None)
    np.testing.assert_allclose(weight_difference(tensors, LINEAR, 4.0), default)
    np.testing.assert_allclose(weight_difference(tensors, LINEAR, 1.0), default / 4)


# ---- Files


@pytest.fixture(scope="module")
def models():
    return parameters()


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=3, alpha=1.5, target_modules=LAYERS),
        peft.LoKrConfig(r=1, alpha=1.5, target_modules=LAYERS, decompose_factor=4),
    ],
    ids=["loha", "lokr"],
)
def test_files_in_the_naming_of_the_trainers(config: peft.PeftConfig, models, tmp_path: Path):
    """Merged into the UNet with a strength of 0.7, as PEFT's differences are added by hand."""
    unet = make_torch("unet", SD15)
    wanted = {name: tensor.numpy().copy() for name, tensor in unet.state_dict().items()}
    adapted = peft.inject_adapter_in_model(config, unet)
    randomized(adapted)
    state: dict[str, torch.Tensor] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            prefix, tensors = f"lora_unet_{name.replace('.', '_')}", tensors_of(module)
            state |= {f"{prefix}.{key}": torch.from_numpy(value.copy()) for key, value in tensors.items()}
            is_whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
            state[f"{prefix}.alpha"] = torch.tensor(1.5)
            scale = config.r / 1.5 if is_whole else 1.0
            wanted[f"{name}.weight"] += 0.7 * scale * module.get_delta_weight("default").detach().numpy()
    assert len(state) > 20
    loras = load_lora(write(tmp_path / "style.safetensors", state), models["sd-1.x"])
    assert loras.keys() == {"unet"}
    merged = dict(to_state_dict(merge_lora(models["sd-1.x"]["unet"], loras["unet"], 0.7)))
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def test_whole_differences(models, tmp_path: Path):
    """Of a kernel and its bias, as extracted from a fine-tuned model."""
    rng = np.random.default_rng(0)
    before = dict(to_state_dict(models["sd-1.x"]["unet"]))
    weight = rng.standard_normal(before["conv_in.weight"].shape).astype(np.float32)
    bias = rng.standard_normal(before["conv_in.bias"].shape).astype(np.float32)
    state = {"lora_unet_conv_in.diff": torch.from_numpy(weight), "lora_unet_conv_in.diff_b": torch.from_numpy(bias)}
    loras = load_lora(write(tmp_path / "diff.safetensors", state), models["sd-1.x"])
    after = dict(to_state_dict(merge_lora(models["sd-1.x"]["unet"], loras["unet"], 0.5)))
    np.testing.assert_allclose(after.pop("conv_in.weight"), before.pop("conv_in.weight") + weight / 2, rtol=1e-5)
    np.testing.assert_allclose(after.pop("conv_in.bias"), before.pop("conv_in.bias") + bias / 2, rtol=1e-5)
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


def test_what_does_not_fit_is_named(models, tmp_path: Path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    small = {f"{name}.hada_w{n}_{side}": torch.ones(4, 4) for n in (1, 2) for side in "ab"}
    with pytest.raises(
        WeightsError, match=r"does not fit unet\.mid_block\.attentions\.0\.proj_in \(it makes a difference"
    ):
        load_lora(write(tmp_path / "small.safetensors", small), models["sd-1.x"])
    half = {f"{name}.hada_w1_a": torch.ones(4, 4)}
    with pytest.raises(WeightsError, match=r"does not fit .* \('hada_w1_b'\)"):
        load_lora(write(tmp_path / "half.safetensors", half), models["sd-1.x"])
    nan = {f"{name}.diff": torch.full((4, 4), math.nan)}
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        load_lora(write(tmp_path / "nan.safetensors", nan), models["sd-1.x"])


def test_they_are_merged_not_written_or_run_alongside(models, tmp_path: Path):
    bias = {"lora_unet_conv_in.diff_b": torch.ones(SD15["block_out_channels"][0])}
    loras = load_lora(write(tmp_path / "bias.safetensors", bias), models["sd-1.x"])
    with pytest.raises(WeightsError, match="can be read but not written"):
        save_lora(tmp_path / "again.safetensors", loras)
    with pytest.raises(WeightsError, match="merge them into the model's weights"):
        lora_interceptor(loras["unet"])
