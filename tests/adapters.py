"""LoRA of PEFT and diffusers in small models, and how they are compared with ours."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from oracle import make_pair, make_torch, nchw, to_params
from published import TINY_SD15, TINY_SDXL, TINY_TEXT

from codi_jax.models.lora import (
    DEFAULT_TARGETS,
    init_lora,
    lora_layers,
    nested,
)

# Few layers, but every kind that can be adapted: strided convolutions, enlargements, shortcuts, 1 × 1 projections.
SD15 = {**TINY_SD15, "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8}
ONE_BLOCK = {
    **SD15,
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None,
}
SDXL = {
    **TINY_SDXL,
    "layers_per_block": 1,
    "block_out_channels": [16, 24],
    "norm_num_groups": 8,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TEXT_2 = {**TINY_TEXT, "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 20, "num_hidden_layers": 2}
PARTS = {
    "sd-1.x": {"unet": SD15, "text_encoder": TINY_TEXT},
    "sdxl": {"unet": SDXL, "text_encoder": TINY_TEXT, "text_encoder_2": TEXT_2},
}
PIPELINES = {"sd-1.x": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
TARGETS = [*DEFAULT_TARGETS, "fc1", "fc2"]
FAST_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def torch_parts(family):
    return {
        part: make_torch("unet" if part == "unet" else "text_encoder", config) for part, config in PARTS[family].items()
    }


def pipeline(family, parts):
    kinds = {"vae": None, "tokenizer": None, "scheduler": None}
    if family == "sd-1.x":
        kinds |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        kinds |= {"tokenizer_2": None}
    return PIPELINES[family](**kinds, **parts)


@functools.lru_cache(maxsize=1)
def parameters():
    """Family -> part -> our parameters of the model of `torch_parts`."""
    return {
        family: {
            part: make_pair("unet" if part == "unet" else "text_encoder", config)[2] for part, config in parts.items()
        }
        for family, parts in PARTS.items()
    }


def adapt(model, **config):
    """Puts a random adapter into a PyTorch model, and returns its state dict."""
    config = {"r": 4, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False} | config
    model.add_adapter(peft.LoraConfig(**config))
    return peft.get_peft_model_state_dict(model)


def adapter_file(folder, family, **config):
    """Writes an adapter as diffusers' training scripts do; returns the adapted PyTorch models."""
    parts = torch_parts(family)
    states = {f"{part}_lora_layers": adapt(model, **config) for part, model in parts.items()}
    PIPELINES[family].save_lora_weights(folder, **states, **_collate_lora_metadata(parts))
    return parts


def merged_by_diffusers(path, family, models):
    """The parameters after diffusers has loaded and fused a LoRA file."""
    pipe = pipeline(family, torch_parts(family))
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(components=list(PARTS[family]))
    pipe.unload_lora_weights()
    modules = {part: SimpleNamespace(abstract_params=lambda tree=tree: tree) for part, tree in models.items()}
    return {part: to_params(modules[part], getattr(pipe, part)) for part in models}


def random_lora(params, ranks=(3,), alphas=(1.25,), targets=None):
    """A LoRA that has these ranks and α in turn, without the compilations that `init_lora` takes."""
    rng, layers = np.random.default_rng(0), {}
    trees = [jax.eval_shape(lambda r=r: init_lora(jax.random.key(0), params, r, target_modules=targets)) for r in ranks]
    for i, path in enumerate(lora_layers(trees[0])):
        layer = lora_layers(trees[i % len(trees)])[path]
        layers[path] = {
            key: jnp.asarray(0.1 * rng.normal(size=layer[key].shape), jnp.float32) for key in ("down", "up")
        }
        layers[path]["alpha"] = jnp.asarray(alphas[i % len(alphas)], jnp.float32)
    return nested(layers)


def assert_trees_close(ours, theirs, base):
    """Compares merged parameters; in every tree something must have changed."""
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), theirs, base)
    assert all(any(jax.tree.leaves(tree)) for tree in changed.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def write(path, tensors, metadata=None):
    tensors = {key: torch.as_tensor(np.asarray(value)).clone().contiguous() for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def unet_inputs(config):
    rng = np.random.default_rng(0)
    sample, text = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 8, 8, 4), (2, 5, config["cross_attention_dim"]))
    )
    added = None
    if "addition_embed_type" in config:
        added = {"text_embeds": jnp.asarray(rng.normal(size=(2, 20)), jnp.float32), "time_ids": jnp.ones((2, 6))}
    return sample, jnp.array([3, 900]), text, added


def call_torch_unet(model, sample, timesteps, text, added):
    added = added and {key: torch.tensor(np.asarray(value)) for key, value in added.items()}
    return model(
        nchw(sample), torch.tensor(np.asarray(timesteps)), torch.tensor(np.asarray(text)), added_cond_kwargs=added
    ).sample
