"""The oracle: the same model in PyTorch diffusers or transformers, with the same random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import ControlNetModel as TorchControlNet
from diffusers import UNet2DConditionModel as TorchUNet
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel as TorchCLIPText
from transformers import CLIPTextModelWithProjection as TorchCLIPTextProjected

from codi_jax.io import state_dict
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.controlnet import ControlNet, ControlNetConfig
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "unet": (TorchUNet, UNet2DCondition, UNetConfig),
    "controlnet": (TorchControlNet, ControlNet, ControlNetConfig),
    "vae": (TorchVAE, AutoencoderKL, VAEConfig),
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a random value: norms away from one, biases and zero-initialized layers away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = noise / fan_in**0.5 + (1.0 if is_norm_scale else 0.0)
    return model.eval().requires_grad_(False)


def make_torch(kind: str, config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The PyTorch model of a configuration, randomly weighted."""
    if kind == "text_encoder":
        config = dict(config)
        projected = "WithProjection" in config.pop("architectures", [""])[0]
        model = (TorchCLIPTextProjected if projected else TorchCLIPText)(TorchCLIPTextConfig(**config))
    else:
        model = KINDS[kind][0](**config)
    return randomize(model, seed)


def make_pair(kind: str, config: dict[str, Any], seed: int = 0, **options: Any) -> tuple[torch.nn.Module, Any, Any]:
    """The PyTorch model, our module and our parameters, converted from the PyTorch state dict."""
    model = make_torch(kind, config, seed)
    if kind == "text_encoder":
        module = CLIPTextModel(CLIPTextConfig.from_dict(config), **options)
    else:
        _, module_class, config_class = KINDS[kind]
        module = module_class(config_class.from_dict(config), **options)
    return model, module, to_params(module, model)


def to_params(module: Any, model: torch.nn.Module) -> Any:
    """Our parameters from a PyTorch model of the same configuration."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    if "embeddings.token_embedding.weight" in state:  # transformers 5 has no text_model level in its plain encoder
        state = {f"text_model.{name}": value for name, value in state.items()}
    return state_dict.from_state_dict(module.abstract_params(), state, dtype=jnp.float32)


def torch_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the state dict that our module's parameters make; takes no memory."""
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), module.abstract_params())
    return {name: value.shape for name, value in state_dict.to_state_dict(zeros)}


def prune_sd(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Deletes modules as BK-SDM's reference code does for the level of this name, for any number of resolutions."""
    tiny = name.endswith("tiny")
    if tiny or name == "bk_small":
        model.mid_block = None
    for block in model.down_blocks:
        block.resnets = block.resnets[:1]
        if hasattr(block, "attentions"):
            block.attentions = block.attentions[:1]
    if tiny:
        model.down_blocks = model.down_blocks[:-1]
        model.down_blocks[-1].downsamplers = None
    for block in model.up_blocks:
        block.resnets = torch.nn.ModuleList([block.resnets[0], block.resnets[2]])
        if hasattr(block, "attentions"):
            block.attentions = torch.nn.ModuleList([block.attentions[0], block.attentions[2]])
    if tiny:
        model.up_blocks = model.up_blocks[1:]
    return model


def nchw(x: Any) -> torch.Tensor:
    """NHWC array to NCHW tensor."""
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    """NCHW tensor to NHWC array."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours: Any, theirs: Any, tolerance: float = 2e-4) -> None:
    """Compares to ``tolerance`` times the largest magnitude of the oracle's output."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    largest = np.abs(theirs).max()
    assert largest > 1e-3, "an output of zeros proves nothing"
    error = np.abs(ours - theirs).max() / largest
    assert error <= tolerance, f"max |Δ| is {error:.2e} of the output's max"
