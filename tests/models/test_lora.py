"""LoRA in layers, against PEFT as the oracle."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapters import (
    FAST_COMPILATION,
    ONE_BLOCK,
    PARTS,
    SD15,
    SDXL,
    adapt,
    adapter_file,
    call_torch_unet,
    parameters,
    random_lora,
    torch_parts,
    unet_inputs,
    write,
)
from oracle import assert_close, make_pair, nhwc
from published import TINY_CONTROLNETS

from codi_jax.io.lora_files import load_lora
from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import WeightsError
from codi_jax.models.controlnet import ControlNet, ControlNetConfig
from codi_jax.models.layers import ResnetBlock2D
from codi_jax.models.lora import (
    apply_lora,
    init_lora,
    lora_layers,
    merge_lora,
    module_name,
)
from codi_jax.models.published import SDXL_UNET
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

# PEFT, about patterns that are meant for the UNet and also given to the text encoder.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@pytest.fixture(scope="module")
def models():
    return parameters()


@pytest.mark.parametrize("family", PARTS)
def test_unet_with_an_adapter(family, models, tmp_path):
    parts = adapter_file(
        tmp_path, family, rank_pattern={"conv1": 2, "attn2.to_k": 5}, alpha_pattern={"to_q": 7.5, "ff.net.2": 1.25}
    )
    lora = load_lora(tmp_path, models[family])["unet"]
    params, inputs = models[family]["unet"], unet_inputs(PARTS[family]["unet"])
    module = UNet2DCondition(UNetConfig.from_dict(PARTS[family]["unet"]))

    def predict(params, lora, scale):
        sample, timesteps, text, added = inputs
        return apply_lora(module, params, lora, sample, timesteps, text, added_cond=added, scale=scale)[0]

    predict = jax.jit(predict, compiler_options=FAST_COMPILATION)
    for scale in (1.0, 0.5):
        parts["unet"].set_adapters("default", scale)
        with torch.no_grad():
            theirs = nhwc(call_torch_unet(parts["unet"], *inputs))
        assert_close(predict(params, lora, scale), theirs, 1e-4)
        assert_close(predict(merge_lora(params, lora, scale), lora, 0.0), theirs, 1e-4)
    parts["unet"].disable_adapters()
    with torch.no_grad():
        assert_close(predict(params, lora, 0.0), nhwc(call_torch_unet(parts["unet"], *inputs)), 1e-4)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoder_with_an_adapter(part, models, tmp_path):
    config = PARTS["sdxl"][part]
    torch_model = adapter_file(tmp_path, "sdxl")[part]
    params, module = models["sdxl"][part], CLIPTextModel(CLIPTextConfig.from_dict(config))
    lora = load_lora(tmp_path, models["sdxl"])[part]
    ids = np.random.default_rng(0).integers(0, 97, (2, 16))
    ids[:, 10] = 98
    with torch.no_grad():
        theirs = torch_model(torch.tensor(ids), output_hidden_states=True)
    apply = jax.jit(lambda *args: apply_lora(module, *args), compiler_options=FAST_COMPILATION)
    for ours in (apply(params, lora, ids), apply(merge_lora(params, lora), {}, ids)):
        assert_close(ours.hidden_states[-2], theirs.hidden_states[-2], 1e-4)
        assert_close(ours.pooled, theirs.pooler_output if part == "text_encoder" else theirs.text_embeds, 1e-4)


@pytest.mark.slow
def test_gradient_is_that_of_peft_under_remat(tmp_path):
    model, module, params = make_pair("unet", ONE_BLOCK, remat=True)
    state, inputs = adapt(model), unet_inputs(SD15)
    prediction = call_torch_unet(model, *inputs)
    (100 * prediction**2).sum().backward()
    grads = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert grads.keys() == state.keys()
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 3})}
    lora = load_lora(write(tmp_path / "lora.safetensors", state, metadata), {"unet": params})["unet"]
    theirs = load_lora(write(tmp_path / "grads.safetensors", grads), {"unet": params})["unet"]

    def loss(lora, params):
        return jnp.sum(100 * apply_lora(module, params, lora, *inputs[:3])[0] ** 2)

    ours = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILATION)(lora, params)
    for path, layer in lora_layers(ours).items():
        for factor in ("down", "up"):
            assert_close(layer[factor], lora_layers(theirs)[path][factor], 1e-3)
        assert layer["alpha"] == 0


def test_scanned_layers_are_refused(models):
    params = models["sdxl"]["unet"]
    module = UNet2DCondition(UNetConfig.from_dict(PARTS["sdxl"]["unet"]), scan_layers=True)
    with pytest.raises(WeightsError, match="scan no layers"):
        jax.eval_shape(lambda *args: apply_lora(module, *args)[0], params, random_lora(params), *unet_inputs(SDXL)[:3])


def test_bfloat16(models):
    params = models["sd-1.x"]["unet"]
    lora = random_lora(params)
    module = UNet2DCondition(UNetConfig.from_dict(SD15), dtype=jnp.bfloat16, remat=True)
    half = jax.eval_shape(lambda *args: apply_lora(module, *args)[0], params, lora, *unet_inputs(SD15)[:3])
    assert half.dtype == jnp.bfloat16

    path = ("up_blocks_0", "resnets_0")
    (params,), (lora,) = ([tree[path[0]][path[1]]] for tree in (params, lora))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, params["conv1"]["kernel"].shape[2])), jnp.float32)
    out = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        block = nn.remat(ResnetBlock2D)(32, 8, 1e-5, True, True, dtype)
        args = (jax.tree.map(lambda x: x.astype(dtype), params), lora, x.astype(dtype), jnp.ones((1, 64), dtype))  # noqa: B023
        apply = jax.jit(lambda *args: apply_lora(block, *args), compiler_options=FAST_COMPILATION)  # noqa: B023
        out[dtype] = apply(*args)
        assert out[dtype].dtype == dtype
    assert_close(out[jnp.bfloat16].astype(jnp.float32), out[jnp.float32], 0.02)


def test_no_array_of_a_weights_size_is_made(models):
    params, inputs = models["sd-1.x"]["unet"], unet_inputs(SD15)
    lora = random_lora(params)
    module = UNet2DCondition(UNetConfig.from_dict(SD15))
    kernels = {leaf.shape for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"}

    def count(lora):
        jaxpr = jax.make_jaxpr(lambda p, lora: apply_lora(module, p, lora, *inputs[:3]))(params, lora)
        text = re.findall(r":\w+\[([\d,]+)\] = ", jaxpr.pretty_print(use_color=False))
        return sum(tuple(map(int, shape.split(","))) in kernels for shape in text)

    assert count(lora) == count({})


def test_interceptor_leaves_other_layers_alone():
    class Model(nn.Module):
        def setup(self):
            self.embed, self.dense = nn.Embed(5, 4), nn.Dense(4)

        def __call__(self, ids):
            return self.dense(self.embed(ids))

    module, ids = Model(), jnp.arange(5)
    params = module.init(jax.random.key(0), ids)["params"]
    lora = init_lora(jax.random.key(1), params, 2, target_modules=["dense"])
    assert lora.keys() == {"dense"}
    np.testing.assert_array_equal(apply_lora(module, params, lora, ids), module.apply({"params": params}, ids))
    with pytest.raises(WeightsError, match="embed match no dense or convolution"):
        init_lora(jax.random.key(1), params, 2, target_modules=["dense", "embed"])


def test_init_is_that_of_peft(models):
    unet = torch_parts("sd-1.x")["unet"]
    theirs = adapt(unet, init_lora_weights=True)
    layers = lora_layers(init_lora(jax.random.key(0), models["sd-1.x"]["unet"], rank=4, alpha=2.0))
    assert {f"{module_name(path)}.lora_A.weight" for path in layers} == {name for name in theirs if "lora_A" in name}
    for path, layer in layers.items():
        down = theirs[f"{module_name(path)}.lora_A.weight"]
        assert layer["down"].size == down.numel()
        bound = (4 / down.numel()) ** 0.5
        largest = max(float(abs(layer["down"]).max()), float(down.abs().max()))
        assert 0.9 * bound < largest <= bound
        assert not layer["up"].any()
        assert layer["alpha"] == 2
        assert {x.dtype for x in layer.values()} == {jnp.dtype("float32")}
    downs = [np.asarray(layer["down"]) for layer in layers.values()]
    assert len({down.tobytes() for down in downs}) == len(downs)


def test_default_targets_are_those_of_lcm_lora():
    params = UNet2DCondition(UNetConfig.from_dict(SDXL_UNET)).abstract_params()
    layers = lora_layers(jax.eval_shape(lambda: init_lora(jax.random.key(0), params, 64)))
    assert len(layers) == 788  # in latent-consistency/lcm-lora-sdxl
    controlnet = ControlNet(ControlNetConfig.from_dict(TINY_CONTROLNETS["sd-1.x"])).abstract_params()
    assert not any(path[0].startswith("controlnet") for path in lora_layers(random_lora(controlnet)))


def test_merge_shares_what_it_leaves_and_keeps_the_dtype(models):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models["sd-1.x"]["unet"])
    lora = jax.tree.map(jnp.ones_like, random_lora(params, ranks=(2,), targets=["to_q"]))
    merged = merge_lora(params, lora, scale=0.25)
    for path, leaf in jax.tree.leaves_with_path(merged):
        before = params
        for key in path:
            before = before[key.key]
        if path[-2].key == "to_q":
            assert leaf.dtype == jnp.bfloat16
            wanted = (before.astype(jnp.float32) + 0.25).astype(jnp.bfloat16)  # 0.25 · 1/2 · (1 + 1)
            np.testing.assert_array_equal(leaf, wanted)
        else:
            assert leaf is before


def test_a_lora_for_another_model_is_refused(models):
    module = UNet2DCondition(UNetConfig.from_dict(SD15))
    other = UNet2DCondition(UNetConfig.from_dict({**SD15, "cross_attention_dim": 32})).abstract_params()
    wide = random_lora(other, ranks=(2,), targets=["attn2.to_k"])
    message = r"attn2\.to_k has down \[32, 2\] and up \[2, 16\] for a kernel \[24, 16\].*SD 1\.x"
    with pytest.raises(WeightsError, match=message):
        apply_lora(module, models["sd-1.x"]["unet"], wide, *unet_inputs(SD15)[:3])
    with pytest.raises(WeightsError, match="to_k has down"):
        merge_lora(models["sd-1.x"]["unet"], wide)
    with pytest.raises(WeightsError, match=r"down_blocks\.1\.attentions.* is not a layer with a kernel"):
        merge_lora(models["sd-1.x"]["unet"], random_lora(models["sdxl"]["unet"]))
    with pytest.raises(WeightsError, match="rank = 0"):
        init_lora(jax.random.key(0), models["sd-1.x"]["unet"], 0)


def test_a_kernel_in_half_precision_is_rounded_once():
    """W + α/r·B A in float64, rounded to bfloat16; the sum of two rounded terms is another number."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((64, 48)), jnp.bfloat16)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 4), (4, 48)))
    lora = {"to_q": {"down": jnp.asarray(down), "up": jnp.asarray(up), "alpha": jnp.float32(2)}}
    merged = merge_lora({"to_q": {"kernel": kernel}}, lora)["to_q"]["kernel"]
    exact = np.asarray(kernel, np.float64) + 2 / 4 * down.astype(np.float64) @ up.astype(np.float64)
    assert merged.dtype == jnp.bfloat16
    expected = exact.astype(np.float32).astype(jnp.bfloat16)
    # A tie may fall to either side, after a product in float32.
    assert np.mean(np.asarray(merged) != expected) < 0.002
