"""The ControlNet against PyTorch diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel as TorchControlNet
from oracle import assert_close, make_pair, nchw, nhwc, torch_shapes
from published import TINY_CONTROLNETS, TINY_SD15, TINY_UNETS

from codi_jax.models.config import ConfigError
from codi_jax.models.controlnet import ControlNet, ControlNetConfig, controlnet_from_unet
from codi_jax.models.published import CONTROLNETS
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig


def inputs(config: dict) -> dict:
    rng = np.random.default_rng(0)
    out = {
        "sample": rng.standard_normal((2, 8, 4, 4)),
        "timesteps": np.asarray([7, 607]),
        "encoder_hidden_states": rng.standard_normal((2, 5, config["cross_attention_dim"])),
        "controlnet_cond": rng.uniform(size=(2, 32, 16, 3)),
    }
    if config.get("addition_embed_type"):
        out["added_cond"] = {"text_embeds": rng.standard_normal((2, 20)), "time_ids": rng.uniform(0, 99, (2, 6))}
    return jax.tree.map(lambda x: jnp.asarray(x, None if x.dtype.kind == "i" else jnp.float32), out)


def run_torch(model: torch.nn.Module, batch: dict, scale: float) -> list[np.ndarray]:
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), batch)
    down, mid = model(
        nchw(batch["sample"]),
        tensors["timesteps"],
        tensors["encoder_hidden_states"],
        nchw(batch["controlnet_cond"]),
        conditioning_scale=scale,
        added_cond_kwargs=tensors.get("added_cond"),
        return_dict=False,
    )
    return [nhwc(x) for x in (*down, mid)]


@pytest.mark.parametrize("family", TINY_CONTROLNETS)
def test_residuals_equal_diffusers(family: str) -> None:
    model, module, params = make_pair("controlnet", TINY_CONTROLNETS[family])
    batch = inputs(TINY_CONTROLNETS[family])
    down, mid = jax.jit(module.apply)({"params": params}, **batch, conditioning_scale=0.7)
    theirs = run_torch(model, batch, 0.7)
    assert len(down) + 1 == len(theirs)
    for ours, wanted in zip((*down, mid), theirs, strict=True):
        assert_close(ours, wanted)


def test_a_controlnet_without_mid_block_equals_diffusers_with_it_taken_out() -> None:
    """diffusers cannot build one, but its forward pass skips a mid block that is not there."""
    config = TINY_CONTROLNETS["sd-1.x"]
    model, _, params = make_pair("controlnet", config)
    model.mid_block = None
    midless = ControlNet(ControlNetConfig.from_dict({**config, "mid_block_type": None}))
    params = {name: tree for name, tree in params.items() if name != "mid_block"}
    batch = inputs(config)
    down, mid = jax.jit(midless.apply)({"params": params}, **batch)
    for ours, wanted in zip((*down, mid), run_torch(model, batch, 1.0), strict=True):
        assert_close(ours, wanted)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_full_size_parameters_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in TorchControlNet(**CONTROLNETS[name]).state_dict().items()}
    assert torch_shapes(ControlNet(ControlNetConfig.from_dict(CONTROLNETS[name]))) == theirs


@pytest.mark.parametrize("name", CONTROLNETS)
def test_config_round_trip_is_complete(name: str) -> None:
    with torch.device("meta"):
        theirs = {k: v for k, v in TorchControlNet(**CONTROLNETS[name]).config.items() if not k.startswith("_")}
    config = ControlNetConfig.from_dict(CONTROLNETS[name])
    ours = config.to_dict()
    del ours["_class_name"]
    assert ours == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}


@pytest.mark.parametrize("family", ["sd-1.x", "sdxl", "bk-tiny", "guidance-embedding"])
def test_a_new_controlnet_changes_nothing_and_shares_the_encoder(family: str) -> None:
    config = TINY_UNETS[family]
    model, unet, unet_params = make_pair("unet", config)
    controlnet, params = controlnet_from_unet(unet, unet_params, jax.random.key(0), (4, 8, 12))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, controlnet.abstract_params())
    assert params["down_blocks_0"] is unet_params["down_blocks_0"]
    batch = inputs(config)
    down, mid = jax.jit(controlnet.apply)({"params": params}, **batch)
    assert all(not np.any(x) for x in (*down, mid))
    if family in ("sd-1.x", "sdxl"):  # diffusers makes none without mid block, nor from a guidance-distilled UNet
        theirs = TorchControlNet.from_unet(model, conditioning_embedding_out_channels=(4, 8, 12))
        assert torch_shapes(controlnet) == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}


def test_a_condition_of_another_size_is_refused_in_words() -> None:
    _, module, params = make_pair("controlnet", TINY_CONTROLNETS["sd-1.x"])
    batch = inputs(TINY_CONTROLNETS["sd-1.x"])
    batch["controlnet_cond"] = batch["controlnet_cond"][:, ::2]
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\), but these latents need \(2, 32, 16, 3\)"):
        jax.eval_shape(module.apply, {"params": params}, **batch)


def test_another_family_and_unsupported_pooling_are_refused() -> None:
    with pytest.raises(ConfigError, match="UNet2DConditionModel, not of a ControlNetModel"):
        ControlNetConfig.from_dict({**TINY_SD15, "_class_name": "UNet2DConditionModel"})
    with pytest.raises(ConfigError, match="global_pool_conditions"):
        ControlNetConfig.from_dict({**TINY_CONTROLNETS["sd-1.x"], "global_pool_conditions": True})


def test_a_controlnet_of_another_architecture_is_refused_by_the_unet() -> None:
    unet = UNet2DCondition(UNetConfig.from_dict(TINY_UNETS["bk-base"]))
    controlnet = ControlNet(ControlNetConfig.from_dict(TINY_CONTROLNETS["sd-1.x"]))
    batch = inputs(TINY_CONTROLNETS["sd-1.x"])

    def both(unet_params: dict, params: dict) -> jax.Array:
        down, mid = controlnet.apply({"params": params}, **batch)
        image = batch.pop("controlnet_cond")
        del image
        return unet.apply({"params": unet_params}, **batch, down_residuals=down, mid_residual=mid)

    with pytest.raises(ValueError, match="6 residuals, but the UNet has 4"):
        jax.eval_shape(both, unet.abstract_params(), controlnet.abstract_params())


def test_the_config_of_diffusers_former_flax_class_is_read() -> None:
    """Its keys, as diffusers 0.38 wrote them: two more than the PyTorch class has."""
    former = {"_class_name": "FlaxControlNetModel", "_diffusers_version": "0.38.0", "sample_size": 32, "dropout": 0.0}
    kept = (
        "attention_head_dim", "block_out_channels", "conditioning_embedding_out_channels", "cross_attention_dim",
        "down_block_types", "layers_per_block",
    )  # fmt: skip
    config = {key: TINY_CONTROLNETS["sd-1.x"][key] for key in kept}
    assert ControlNetConfig.from_dict({**config, **former}) == ControlNetConfig.from_dict(config)
