"""Whole networks in forward mode, against finite differences and against reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import TINY_CONTROLNETS, TINY_SD15, TINY_SDXL, TINY_VAE

from codi_jax.models.controlnet import ControlNet, ControlNetConfig
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig

RNG = np.random.default_rng(0)
SIDE = 12  # 288 pixels in a batch of two: the first resolution takes the convolution for many, the others that for few
SMALL_SDXL = {
    **TINY_SDXL,
    "block_out_channels": [32, 48],
    "down_block_types": TINY_SDXL["down_block_types"][:2],
    "up_block_types": TINY_SDXL["up_block_types"][1:],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "layers_per_block": 1,
}


def conditions(config: dict) -> dict:
    inputs = {
        "sample": RNG.standard_normal((2, SIDE, SIDE, 4)),
        "timesteps": np.asarray([7.0, 607.0]),
        "encoder_hidden_states": RNG.standard_normal((2, 5, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type"):
        ids = RNG.uniform(0, 1024, (2, 6))
        inputs["added_cond"] = {"text_embeds": RNG.standard_normal((2, 20)), "time_ids": ids}
    return inputs


def unet(config: dict, **options):
    return UNet2DCondition(UNetConfig.from_dict(config), jnp.float64, **options), conditions(config)


def controlnet():
    config = TINY_CONTROLNETS["sd-1.x"]
    image = RNG.uniform(size=(2, 4 * SIDE, 4 * SIDE, 3))
    return ControlNet(ControlNetConfig.from_dict(config), jnp.float64), {**conditions(config), "controlnet_cond": image}


def vae():
    return AutoencoderKL(VAEConfig.from_dict(TINY_VAE), jnp.float64), {"pixels": RNG.standard_normal((2, 16, 16, 3))}


NETWORKS = {
    "unet": lambda: unet({**TINY_SD15, "layers_per_block": 1}),
    "sdxl, in a loop, recomputed": lambda: unet(SMALL_SDXL, scan_layers=True, remat=True),
    "controlnet": controlnet,
    "vae": vae,
}


LARGE = ["sdxl, in a loop, recomputed"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in NETWORKS])
def test_tangents_agree_with_finite_differences_and_with_cotangents(name: str) -> None:
    """In float64 but for the scores of attention and a VAE's latents, which are always float32."""
    with jax.enable_x64(True):
        module, inputs = NETWORKS[name]()
        params = jax.tree.map(lambda p: RNG.standard_normal(p.shape) / max(p.size, 1) ** 0.25, module.abstract_params())
        arguments = {"params": params, **inputs}
        direction = jax.tree.map(lambda x: RNG.standard_normal(np.shape(x)), arguments)

        def apply(arguments: dict) -> jax.Array:
            """All of the outputs in one vector."""
            rest = {name: value for name, value in arguments.items() if name != "params"}
            out = module.apply({"params": arguments["params"]}, **rest)
            out = out[0] if isinstance(module, UNet2DCondition) else out  # without the intermediate features
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(out)])

        def both(arguments: dict, direction: dict):
            out, tangent = jax.jvp(apply, (arguments,), (direction,))
            (gradient,) = jax.vjp(apply, arguments)[1](out)
            return out, tangent, gradient

        out, tangent, gradient = jax.jit(both)(arguments, direction)
        step = 1e-4
        ahead, behind = (
            jax.jit(apply)(jax.tree.map(lambda x, d, s=s: x + s * d, arguments, direction)) for s in (step, -step)
        )
        scale = float(jnp.abs(tangent).max())
        np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), atol=1e-3 * scale)
        by_rows = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
        np.testing.assert_allclose(by_rows, jnp.vdot(out, tangent), rtol=1e-4)
