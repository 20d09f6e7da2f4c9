"""The UNet against PyTorch diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from oracle import assert_close, make_pair, nchw, nhwc, torch_shapes
from published import TINY_SD15, TINY_SD21, TINY_SDXL, TINY_UNETS

from codi_jax.io.state_dict import to_state_dict
from codi_jax.models.config import ConfigError
from codi_jax.models.published import SD15_UNET, UNETS
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

make_pair = functools.partial(make_pair, "unet")


def inputs(config: dict, batch: int = 2, height: int = 16, width: int = 8, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    out = {
        "sample": normal(batch, height, width, config.get("in_channels", 4)),
        "timesteps": np.arange(7, 999, 600)[:batch],
        "encoder_hidden_states": normal(batch, 5, config["cross_attention_dim"]),
    }
    if dim := config.get("time_cond_proj_dim"):
        out["timestep_cond"] = normal(batch, dim)
    if config.get("addition_embed_type"):
        out["added_cond"] = {
            "text_embeds": normal(batch, 20),
            "time_ids": rng.uniform(0, 1024, (batch, 6)).astype("f4"),
        }
    return jax.tree.map(jnp.asarray, out)


def run_torch(model: torch.nn.Module, batch: dict, **residuals: torch.Tensor) -> np.ndarray:
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), batch)
    out = model(
        nchw(batch["sample"]),
        tensors["timesteps"],
        tensors["encoder_hidden_states"],
        timestep_cond=tensors.get("timestep_cond"),
        added_cond_kwargs=tensors.get("added_cond"),
        **residuals,
    )
    return nhwc(out.sample)


@pytest.mark.parametrize("family", TINY_UNETS)
def test_prediction_equals_diffusers(family: str) -> None:
    config = TINY_UNETS[family]
    model, module, params = make_pair(config)
    batch = inputs(config)
    prediction, _ = jax.jit(module.apply)({"params": params}, **batch)
    assert_close(prediction, run_torch(model, batch))


def test_odd_sizes_are_enlarged_to_their_skip_connections() -> None:
    model, module, params = make_pair(TINY_UNETS["four-blocks"])
    batch = inputs(TINY_UNETS["four-blocks"], height=13, width=10)
    assert_close(jax.jit(module.apply)({"params": params}, **batch)[0], run_torch(model, batch))


def test_residuals_enter_where_diffusers_adds_them() -> None:
    model, module, params = make_pair(TINY_SD15)
    batch = inputs(TINY_SD15)
    rng = np.random.default_rng(1)
    shapes = [(2, 16, 8, 32)] * 3 + [(2, 8, 4, c) for c in (32, 64, 64)]
    down = tuple(jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    mid = jnp.asarray(rng.standard_normal((2, 8, 4, 64), dtype=np.float32))
    ours, _ = jax.jit(module.apply)({"params": params}, **batch, down_residuals=down, mid_residual=mid)
    theirs = run_torch(
        model, batch, down_block_additional_residuals=[nchw(x) for x in down], mid_block_additional_residual=nchw(mid)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["sd-1.x", "bk-tiny", "sdxl"])
def test_intermediates_are_the_outputs_of_the_blocks(family: str) -> None:
    config = TINY_UNETS[family]
    model, module, params = make_pair(config)
    batch = inputs(config)
    seen = {}

    def record(name: str):
        def hook(_module, args, output):
            out = output[0] if isinstance(output, tuple) else output
            seen[name] = nhwc(out)
            if name.startswith("down_blocks") and _module.downsamplers is None:
                seen[f"{name}/before_downsampler"] = nhwc(out)

        return hook

    def record_input(name: str):
        return lambda _module, args: seen.__setitem__(name, nhwc(args[0]))

    for i, block in enumerate(model.down_blocks):
        block.register_forward_hook(record(f"down_blocks_{i}"))
        if block.downsamplers is not None:
            block.downsamplers[0].register_forward_pre_hook(record_input(f"down_blocks_{i}/before_downsampler"))
    for i, block in enumerate(model.up_blocks):
        block.register_forward_hook(record(f"up_blocks_{i}"))
    if model.mid_block is not None:
        model.mid_block.register_forward_hook(record("mid_block"))
    run_torch(model, batch)
    _, intermediates = jax.jit(module.apply)({"params": params}, **batch)
    assert intermediates.keys() == seen.keys()
    for name, tap in intermediates.items():
        assert_close(tap, seen[name])


@pytest.mark.parametrize("name", UNETS)
def test_full_size_parameters_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in TorchUNet(**UNETS[name]).state_dict().items()}
    assert torch_shapes(UNet2DCondition(UNetConfig.from_dict(UNETS[name]))) == theirs


@pytest.mark.parametrize(
    ("name", "count"), [("sd-1.5", 859_520_964), ("small-sd", 579_384_964), ("sdxl-base", 2_567_463_684)]
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    abstract = UNet2DCondition(UNetConfig.from_dict(UNETS[name])).abstract_params()
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count


@pytest.mark.slow
def test_bfloat16_stays_near_float32() -> None:
    _, module, params = make_pair(TINY_SDXL)
    batch = inputs(TINY_SDXL)
    exact, _ = jax.jit(module.apply)({"params": params}, **batch)
    half = module.clone(dtype=jnp.bfloat16)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    prediction, _ = jax.jit(half.apply)({"params": stored}, **batch)
    assert prediction.dtype == jnp.bfloat16
    assert_close(prediction, exact, 3e-2)


def loss(module: UNet2DCondition, params: dict, batch: dict) -> jax.Array:
    return jnp.mean(module.apply({"params": params}, **batch)[0] ** 2)


@pytest.mark.slow
def test_gradient_agrees_with_finite_differences() -> None:
    """Directional derivatives, in float64 but for the scores of attention, which are always float32."""
    config = {**TINY_SD15, "block_out_channels": [16, 32], "cross_attention_dim": 8}
    _, module, params = make_pair(config)
    batch = inputs(config, height=4, width=4)
    with jax.enable_x64(True):
        module = module.clone(dtype=jnp.float64)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        value = jax.jit(functools.partial(loss, module))
        gradient = jax.jit(jax.grad(functools.partial(loss, module)))(params, batch)
        rng = np.random.default_rng(0)
        for _ in range(3):
            direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), params)
            step = 1e-5
            ahead, behind = (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (step, -step))
            numeric = (value(ahead, batch) - value(behind, batch)) / (2 * step)
            exact = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), gradient, direction)))
            np.testing.assert_allclose(exact, numeric, rtol=1e-3)


def test_gradient_equals_pytorch() -> None:
    model, module, params = make_pair(TINY_SD15)
    batch = inputs(TINY_SD15)
    ours = dict(to_state_dict(jax.jit(jax.grad(functools.partial(loss, module)))(params, batch)))
    model.requires_grad_(True)
    text = torch.from_numpy(np.array(batch["encoder_hidden_states"]))
    prediction = model(nchw(batch["sample"]), torch.from_numpy(np.array(batch["timesteps"])), text).sample
    prediction.square().mean().backward()
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(
            ours[name], parameter.grad, atol=2e-4 * float(parameter.grad.abs().max()), err_msg=name
        )


@pytest.mark.slow
def test_remat_changes_neither_value_nor_gradient_nor_names() -> None:
    _, module, params = make_pair(TINY_SD21)
    batch = inputs(TINY_SD21)
    remat = module.clone(remat=True)
    assert jax.tree.structure(remat.abstract_params()) == jax.tree.structure(module.abstract_params())
    plain = jax.jit(jax.value_and_grad(functools.partial(loss, module)))(params, batch)
    recomputed = jax.jit(jax.value_and_grad(functools.partial(loss, remat)))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_change_neither_value_nor_gradient_nor_names(remat: bool) -> None:
    _, module, params = make_pair(TINY_SDXL)
    batch = inputs(TINY_SDXL)
    scanned = module.clone(scan_layers=True, remat=remat)
    assert jax.tree.structure(scanned.abstract_params()) == jax.tree.structure(module.abstract_params())
    plain = jax.jit(jax.value_and_grad(functools.partial(loss, module)))(params, batch)
    in_a_loop = jax.jit(jax.value_and_grad(functools.partial(loss, scanned)))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, in_a_loop)


def test_scanned_layers_are_compiled_once() -> None:
    _, module, params = make_pair(TINY_SDXL)
    batch = inputs(TINY_SDXL)

    def blocks(module: UNet2DCondition) -> int:
        return str(jax.make_jaxpr(functools.partial(loss, module))(params, batch)).count("name=geglu")

    assert blocks(module) == 5 * 2 + 6 * 3  # stacks of the second and of the third resolution
    assert blocks(module.clone(scan_layers=True)) == 5 + 6


@pytest.mark.slow
def test_scanned_layers_round_as_the_others() -> None:
    _, module, params = make_pair(TINY_SDXL)
    module, batch = module.clone(dtype=jnp.bfloat16), inputs(TINY_SDXL)
    with jax.disable_jit():  # operation by operation, since a compiler may round elsewhere
        plain, scanned = (module.clone(scan_layers=on).apply({"params": params}, **batch)[0] for on in (False, True))
    np.testing.assert_array_equal(plain, scanned)


def test_remat_stores_less() -> None:
    _, module, params = make_pair(TINY_SDXL)
    batch = inputs(TINY_SDXL, height=32, width=32)

    def stored(module: UNet2DCondition) -> int:
        _, residuals = jax.eval_shape(lambda p: jax.vjp(functools.partial(loss, module), p, batch), params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals) if hasattr(leaf, "size"))

    assert stored(module.clone(remat=True)) < 0.5 * stored(module)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 1000}, "num_class_embeds"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "SimpleCrossAttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"dropout": 0.1}, "dropout"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        ({"attention_head_dim": 5}, "attention_head_dim"),
        ({"block_out_channels": [32, 64.5]}, "block_out_channels"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        UNetConfig.from_dict({**TINY_SD15, **change}, where="some/unet/config.json")
    assert "some/unet/config.json" in str(error.value)


@pytest.mark.parametrize("name", UNETS)
def test_config_round_trip_is_complete(name: str) -> None:
    """What is written has every key of diffusers' own file, with the same value."""
    with torch.device("meta"):
        theirs = {k: v for k, v in TorchUNet(**UNETS[name]).config.items() if not k.startswith("_")}
    config = UNetConfig.from_dict(UNETS[name])
    ours = config.to_dict()
    assert ours.pop("_class_name") == "UNet2DConditionModel"
    assert ours == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    assert UNetConfig.from_dict(config.to_dict()) == config


def test_wrong_inputs_are_refused_in_words() -> None:
    _, module, params = make_pair(TINY_SD15)
    batch = inputs(TINY_SD15)
    with pytest.raises(ValueError, match=r"8 channels .* in_channels = 4"):
        jax.eval_shape(module.apply, {"params": params}, **{**batch, "sample": batch["sample"].repeat(2, -1)})
    with pytest.raises(ValueError, match="cross_attention_dim is 24"):
        jax.eval_shape(module.apply, {"params": params}, **{**batch, "encoder_hidden_states": jnp.zeros((2, 5, 32))})
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        jax.eval_shape(module.apply, {"params": params}, **batch, timestep_cond=jnp.zeros((2, 16)))
    with pytest.raises(ValueError, match="3 residuals"):
        jax.eval_shape(module.apply, {"params": params}, **batch, down_residuals=(jnp.zeros(()),) * 3)
    _, module, params = make_pair(TINY_SDXL)
    batch = inputs(TINY_SDXL)
    del batch["added_cond"]
    with pytest.raises(ValueError, match="text_embeds"):
        jax.eval_shape(module.apply, {"params": params}, **batch)


@pytest.mark.slow
def test_full_size_sd15_forward_pass_equals_diffusers() -> None:
    model, module, params = make_pair(SD15_UNET)
    batch = inputs(SD15_UNET, batch=1, height=64, width=64)
    theirs = run_torch(model, batch)
    del model
    ours, _ = jax.jit(module.apply)({"params": params}, **batch)
    error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    print(f"SD 1.5 UNet, 64 x 64 latents: max |Δ| = {error:.2e} of the output's max")
    assert_close(ours, theirs)


def test_shapes_are_traced_once_and_are_each_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[UNet2DCondition] = []
    real = UNet2DCondition.random_params
    monkeypatch.setattr(UNet2DCondition, "random_params", lambda self, key: [traced.append(self), real(self, key)][1])
    first, second = (UNet2DCondition(UNetConfig.from_dict({**TINY_SD15, "in_channels": n})) for n in (5, 6))
    shapes = first.abstract_params()
    shapes["conv_in"].clear()
    assert first.abstract_params()["conv_in"]["kernel"].shape == (3, 3, 5, 32)
    assert second.abstract_params()["conv_in"]["kernel"].shape == (3, 3, 6, 32)
    assert traced == [first, second]
