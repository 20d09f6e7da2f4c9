"""Files of LoRA in every naming, against PEFT and diffusers as the oracle."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from adapters import (
    PARTS,
    PIPELINES,
    SD15,
    adapt,
    adapter_file,
    assert_same,
    assert_trees_close,
    merged_by_diffusers,
    parameters,
    random_lora,
    torch_parts,
    write,
)
from diffusers.loaders import lora_conversion_utils
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from oracle import to_params
from published import TINY_SDXL

from codi_jax.io.hub import ModelFolder
from codi_jax.io.lora_files import load_lora, save_lora
from codi_jax.io.state_dict import to_state_dict
from codi_jax.models.config import WeightsError
from codi_jax.models.lora import (
    DEFAULT_TARGETS,
    apply_lora,
    lora_layers,
    merge_lora,
)
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

# PEFT, about patterns that are meant for the UNet and also given to the text encoder.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@pytest.fixture(scope="module")
def models():
    return parameters()


# Files in


def kohya_state(parts, alpha):
    """The adapter's tensors under kohya's names, as diffusers writes them, with another α."""
    state = {}
    for part, model in parts.items():
        names = {f"{part}.{key}": value for key, value in peft.get_peft_model_state_dict(model).items()}
        names = {key.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): x for key, x in names.items()}
        # diffusers leaves a dot behind the prefix of text encoders, which no program reads.
        converted = convert_state_dict_to_kohya(names)
        state |= {re.sub(r"^lora_te(\d?)[._]", r"lora_te\1_", key): value for key, value in converted.items()}
    return {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in state.items()}


@pytest.mark.parametrize("family", PARTS)
def test_kohya_file(family, models, tmp_path):
    parts = torch_parts(family)
    for model in parts.values():
        adapt(model)
    path = write(tmp_path / "kohya.safetensors", kohya_state(parts, alpha=1.5))
    loras = load_lora(path, models[family])
    assert loras.keys() == PARTS[family].keys()
    assert {float(layer["alpha"]) for lora in loras.values() for layer in lora_layers(lora).values()} == {1.5}
    ours = {part: merge_lora(models[family][part], lora) for part, lora in loras.items()}
    assert_trees_close(ours, merged_by_diffusers(path, family, models[family]), models[family])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_files_of_few_bits(dtype, models, tmp_path):
    parts = torch_parts("sd-1.x")
    for model in parts.values():
        adapt(model)
    few = {key: x if key.endswith("alpha") else x.to(dtype) for key, x in kohya_state(parts, 1.5).items()}
    path, full = tmp_path / "few.safetensors", tmp_path / "full.safetensors"
    safetensors.torch.save_file({key: x.contiguous() for key, x in few.items()}, path)
    safetensors.torch.save_file({key: x.float().contiguous() for key, x in few.items()}, full)
    ours, wanted = (load_lora(file, models["sd-1.x"]) for file in (path, full))
    assert_same(ours, wanted)


def test_a_file_without_alpha_has_alpha_r(models, tmp_path):
    parts = torch_parts("sd-1.x")
    for model in parts.values():
        adapt(model, rank_pattern={"to_q": 2})
    state = {key: x for key, x in kohya_state(parts, 1.0).items() if not key.endswith("alpha")}
    path = write(tmp_path / "kohya.safetensors", state)
    loras = load_lora(path, models["sd-1.x"])
    for layer in lora_layers(loras["unet"]).values():
        assert layer["alpha"] == layer["down"].shape[-1]
    ours = {part: merge_lora(models["sd-1.x"][part], lora) for part, lora in loras.items()}
    assert_trees_close(ours, merged_by_diffusers(path, "sd-1.x", models["sd-1.x"]), models["sd-1.x"])


def sgm_name(name):
    """kohya's name for a layer of SDXL, written down by hand for the published model (two layers in each block)."""
    patterns = {
        r"^conv_in$": lambda m: "input_blocks_0_0",
        r"^conv_out$": lambda m: "out_2",
        r"^time_embedding_linear_(\d)$": lambda m: f"time_embed_{2 * int(m[1]) - 2}",
        r"^add_embedding_linear_(\d)$": lambda m: f"label_emb_0_{2 * int(m[1]) - 2}",
        r"^down_blocks_(\d)_resnets_(\d)": lambda m: f"input_blocks_{3 * int(m[1]) + int(m[2]) + 1}_0",
        r"^down_blocks_(\d)_attentions_(\d)": lambda m: f"input_blocks_{3 * int(m[1]) + int(m[2]) + 1}_1",
        r"^down_blocks_(\d)_downsamplers_0_conv": lambda m: f"input_blocks_{3 * int(m[1]) + 3}_0_op",
        r"^mid_block_resnets_(\d)": lambda m: f"middle_block_{2 * int(m[1])}",
        r"^mid_block_attentions_0": lambda m: "middle_block_1",
        r"^up_blocks_(\d)_resnets_(\d)": lambda m: f"output_blocks_{3 * int(m[1]) + int(m[2])}_0",
        r"^up_blocks_(\d)_attentions_(\d)": lambda m: f"output_blocks_{3 * int(m[1]) + int(m[2])}_1",
        r"^up_blocks_(\d)_upsamplers_0": lambda m: f"output_blocks_{3 * int(m[1]) + 2}_2",
        r"_conv1$": lambda m: "_in_layers_2",
        r"_conv2$": lambda m: "_out_layers_3",
        r"_conv_shortcut$": lambda m: "_skip_connection",
        r"_time_emb_proj$": lambda m: "_emb_layers_1",
    }
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def test_names_of_sdxls_original_code(tmp_path):
    config = UNetConfig.from_dict({**TINY_SDXL, "transformer_layers_per_block": [1, 1, 2]})
    params = UNet2DCondition(config).abstract_params()
    every = [*DEFAULT_TARGETS[:14], "linear_1", "linear_2", "conv_in", "conv_out"]
    lora = random_lora(params, targets=every)
    save_lora(tmp_path / "a.safetensors", {"unet": lora}, naming="kohya")
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    renamed = {}
    for key, value in state.items():
        module, _, factor = key.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{sgm_name(module)}.{factor}"] = value
    assert not any("_blocks_" in key and "put_blocks" not in key and "transformer" not in key for key in renamed)
    assert_same(load_lora(write(tmp_path / "sgm.safetensors", renamed), {"unet": params})["unet"], lora)

    theirs, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(
        lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(renamed), SimpleNamespace(layers_per_block=2))
    )
    theirs = load_lora(write(tmp_path / "diffusers.safetensors", theirs), {"unet": params})["unet"]
    assert_same(jax.tree.map(jnp.zeros_like, theirs), jax.tree.map(jnp.zeros_like, lora))
    for path, layer in lora_layers(lora).items():
        np.testing.assert_array_equal(lora_layers(theirs)[path]["down"], layer["down"])

    # Files that name each layer twice, in both ways.
    both = {**{key: value * float("1e3") for key, value in renamed.items()}, **state}
    assert_same(load_lora(write(tmp_path / "both.safetensors", both), {"unet": params})["unet"], lora)


def older_unet_name(key):
    key = re.sub(r"(attn\d)\.(to_[qkv])\.lora_(\w)", r"\1.processor.\2_lora.\3", key)
    key = re.sub(r"(attn\d)\.to_out\.0\.lora_(\w)", r"\1.processor.to_out_lora.\2", key)
    return key.replace(".lora_", ".lora.").replace(".A.weight", ".down.weight").replace(".B.weight", ".up.weight")


def older_text_name(key):
    key = re.sub(r"\.(q|k|v)_proj\.lora_(\w)", r".to_\1_lora.\2", key)
    key = re.sub(r"\.out_proj\.lora_(\w)", r".to_out_lora.\1", key)
    return key.replace(".lora_", ".lora_linear_layer.").replace(".A.", ".down.").replace(".B.", ".up.")


OLDER_NAMES = {
    "attention processors": {"unet": older_unet_name, "text_encoder": older_text_name},
    "lora.down": {
        "unet": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        "text_encoder": lambda k: k.replace("lora_A", "lora_linear_layer.down").replace(
            "lora_B", "lora_linear_layer.up"
        ),
    },
    "name of the adapter": {
        part: lambda key: key.replace(".weight", ".default.weight") for part in ("unet", "text_encoder")
    },
    "text_model": {
        "unet": lambda key: key,
        "text_encoder": lambda key: key.replace("text_encoder.encoder", "text_encoder.text_model.encoder"),
    },
}


@pytest.mark.parametrize("rename", OLDER_NAMES.values(), ids=OLDER_NAMES)
def test_older_names_of_diffusers(rename, models, tmp_path):
    parts = torch_parts("sd-1.x")
    states = {part: adapt(model) for part, model in parts.items()}
    state = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
    # As newer releases of transformers 5 name it, whichever is installed.
    state = {key.replace("text_encoder.text_model.", "text_encoder."): value for key, value in state.items()}
    renamed = {rename[key.partition(".")[0]](key): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    ours = load_lora(write(tmp_path / "older.safetensors", renamed), models["sd-1.x"])
    assert_same(ours, load_lora(write(tmp_path / "peft.safetensors", state), models["sd-1.x"]))


def test_a_file_without_parts_is_of_the_unet_or_the_only_model(models, tmp_path):
    unet = {"unet": models["sd-1.x"]["unet"]}
    state = adapt(torch_parts("sd-1.x")["unet"])
    path = write(tmp_path / "plain.safetensors", state)
    prefixed = write(tmp_path / "prefixed.safetensors", {f"unet.{key}": value for key, value in state.items()})
    assert_same(load_lora(path, models["sd-1.x"]), load_lora(prefixed, unet))
    torch.save(state, tmp_path / "plain.bin")
    assert_same(load_lora(tmp_path / "plain.bin", unet), load_lora(path, unet))
    assert load_lora(path, {"controlnet": unet["unet"]}).keys() == {"controlnet"}


def test_file_of_peft_itself(models, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["to_q", "conv1"],
        init_lora_weights=False,
        use_rslora=True,
        rank_pattern={"conv1": 2},
    )
    model = peft.get_peft_model(torch_parts("sd-1.x")["unet"], config)
    model.save_pretrained(tmp_path)
    params = models["sd-1.x"]["unet"]
    lora = load_lora(tmp_path, {"unet": params})["unet"]
    theirs = to_params(SimpleNamespace(abstract_params=lambda: params), model.merge_and_unload())
    assert_trees_close({"unet": merge_lora(params, lora)}, {"unet": theirs}, {"unet": params})
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"no adapter_config\.json"):
        load_lora(tmp_path, {"unet": params})


# A row of W' in PyTorch, or of its convolution, for each output.
@pytest.mark.parametrize("targets", [["to_q", "to_out.0", "ff.net.2"], ["conv1", "proj_in", "conv_shortcut", "conv"]])
def test_dora_of_peft(targets, models, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(torch_parts("sd-1.x")["unet"], config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data = parameter.data * (1 + torch.rand(parameter.shape))
    model.save_pretrained(tmp_path)
    params = models["sd-1.x"]["unet"]
    lora = load_lora(tmp_path, {"unet": params})["unet"]
    with pytest.raises(WeightsError, match="DoRA and LyCORIS cannot run alongside the layers"):
        apply_lora(UNet2DCondition(UNetConfig.from_dict(SD15)), params, lora)
    with pytest.raises(WeightsError, match="DoRA or LyCORIS, which can be read but not written"):
        save_lora(tmp_path / "out.safetensors", {"unet": lora})
    theirs = to_params(SimpleNamespace(abstract_params=lambda: params), model.merge_and_unload())
    assert_trees_close({"unet": merge_lora(params, lora)}, {"unet": theirs}, {"unet": params})


def test_dora_in_diffusers_and_its_scale(models, tmp_path):
    unet = torch_parts("sd-1.x")["unet"]
    state = adapt(unet, use_dora=True, target_modules=["to_q", "conv1"])
    PIPELINES["sd-1.x"].save_lora_weights(tmp_path, state, **_collate_lora_metadata({"unet": unet}))
    unet.fuse_lora(lora_scale=0.6)
    unet.unload_lora()
    params = models["sd-1.x"]["unet"]
    theirs = to_params(SimpleNamespace(abstract_params=lambda: params), unet)
    ours = merge_lora(params, load_lora(tmp_path, {"unet": params})["unet"], 0.6)
    assert_trees_close({"unet": ours}, {"unet": theirs}, {"unet": params})


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("module", ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "conv_in"])
def test_dora_of_kohyas_and_onetrainers_names(of_inputs, module, models, tmp_path):
    """``dora_scale`` is [out, 1, …] or, as equation 5 of the paper has it, [1, in, …]."""
    rng = np.random.default_rng(0)
    params = models["sd-1.x"]["unet"]
    weight = dict(to_state_dict(params))[f"{module}.weight"].astype(np.float64)
    outputs, inputs, *window = weight.shape
    down, up = rng.normal(size=(2, inputs, *window)), rng.normal(size=(outputs, 2, *(1 for _ in window)))
    scale = 1 + rng.random((1, inputs) if of_inputs else (outputs, 1)).reshape(
        *((1, inputs) if of_inputs else (outputs, 1)), *(1 for _ in window)
    )
    key = f"lora_unet_{module.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(1.0), "dora_scale": scale}
    named = {f"{key}.{name}": np.asarray(x, np.float32) for name, x in tensors.items()}
    embeddings = {"bundle_emb.<cat>.clip_l": np.ones((2, 24), np.float32)}  # OneTrainer's
    path = write(tmp_path / "dora.safetensors", {**named, **embeddings})
    with pytest.warns(UserWarning, match=r"dora\.safetensors also has embeddings of <cat>, which are ignored"):
        lora = load_lora(path, models["sd-1.x"])
    changed = weight + 0.5 * np.einsum("or,ri->oi", up.reshape(outputs, 2), down.reshape(2, -1)).reshape(weight.shape)
    axes = tuple(axis for axis in range(weight.ndim) if axis != int(of_inputs))
    wanted = scale * changed / np.sqrt((changed**2).sum(axes, keepdims=True))
    ours = dict(to_state_dict(merge_lora(params, lora["unet"])))[f"{module}.weight"]
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    wrong = write(tmp_path / "wrong.safetensors", {**named, f"{key}.dora_scale": np.ones((1, 7), np.float32)})
    with pytest.raises(WeightsError, match=r"wrong\.safetensors has a DoRA magnitude \[1, 7\] for a kernel"):
        load_lora(wrong, models["sd-1.x"])


def test_names_with_a_point_behind_the_prefix(models, tmp_path):
    """As OneTrainer once wrote them."""
    lora = {"unet": random_lora(models["sd-1.x"]["unet"], targets=["to_q"])}
    state = safetensors.torch.load_file(save_lora(tmp_path / "a.safetensors", lora, naming="kohya"))
    dotted = {key.replace("lora_unet_", "lora_unet.", 1): value for key, value in state.items()}
    assert_same(load_lora(write(tmp_path / "b.safetensors", dotted), models["sd-1.x"]), lora)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "lora_adapter_metadata of .* is not valid JSON"),
        ("[" * 100_000, "lora_adapter_metadata of .* is not valid JSON .nested too deeply"),
        ("[]", "lora_adapter_metadata of .* holds a JSON list instead of an object"),
        ('{"unet.lora_alpha": "4"}', "α of unet.*to_k is '4', not a number"),
        ('{"unet.alpha_pattern": {"(a+)+x": 1}}', r"alpha_pattern '\(a\+\)\+x' .* does not name layers"),
        ('{"unet.alpha_pattern": {".*.*.*.*x": 1}}', "does not name layers"),
    ],
)
def test_metadata_that_makes_no_sense(metadata, message, models, tmp_path):
    path = write(tmp_path / "lora.safetensors", one_layer(), {"lora_adapter_metadata": metadata})
    with pytest.raises(WeightsError, match=message):
        load_lora(path, models["sd-1.x"])


def test_one_by_one_windows_of_linear_layers(models, tmp_path):
    """kohya wrote proj_in as a convolution where a model has a linear layer, and the other way round."""
    for family in PARTS:
        params = models[family]["unet"]
        lora = random_lora(params, alphas=(3.0,), targets=["proj_in"])
        state = safetensors.torch.load_file(save_lora(tmp_path, {"unet": lora}))
        flipped = {key: x[:, :, 0, 0] if x.ndim == 4 else x[:, :, None, None] for key, x in state.items()}
        assert_same(load_lora(write(tmp_path / "x.safetensors", flipped), {"unet": params})["unet"], lora)


def test_where_files_are_found(models, tmp_path, monkeypatch):
    params = {"unet": models["sd-1.x"]["unet"]}
    lora = {"unet": random_lora(params["unet"], targets=["to_q"])}
    save_lora(tmp_path / "a" / "style.safetensors", lora)
    assert_same(load_lora(tmp_path / "a", params), lora)
    save_lora(tmp_path / "a" / "other.safetensors", lora)
    with pytest.raises(
        WeightsError, match=r"holds other\.safetensors, style\.safetensors\): name the file, such as .*/a/other\.safe"
    ):
        load_lora(tmp_path / "a", params)
    assert_same(load_lora(tmp_path / "a" / "other.safetensors", params), lora)
    assert_same(load_lora(tmp_path / "a", params, "other.safetensors"), lora)
    assert_same(load_lora(tmp_path, params, "other.safetensors", subfolder="a"), lora)
    with pytest.raises(WeightsError, match=r"There is no nothing\.safetensors in"):
        load_lora(tmp_path / "a", params, "nothing.safetensors")
    with pytest.raises(WeightsError, match=r"There is no weight file .*typo\.safetensors"):
        load_lora(tmp_path / "typo.safetensors", params)
    asked = []
    monkeypatch.setattr(ModelFolder, "find", lambda folder, name: asked.append((folder, name)) or tmp_path / "a" / name)
    of_hub = ModelFolder("latent-consistency/lcm-lora", None, "v1", tmp_path, False)
    load_lora("latent-consistency/lcm-lora", params, "style.safetensors", revision="v1", cache_dir=tmp_path)
    load_lora("latent-consistency/lcm-lora/style.safetensors", params, revision="v1", cache_dir=tmp_path)
    assert asked == 2 * [(of_hub, "style.safetensors")]
    (tmp_path / "a" / "of").mkdir()
    (tmp_path / "a" / "style.safetensors").rename(tmp_path / "a" / "of" / "sd15.safetensors")
    load_lora("latent-consistency/lcm-lora/of/sd15.safetensors", params, revision="v1", cache_dir=tmp_path)
    assert asked[2:] == [(of_hub, "of/sd15.safetensors")]
    for missing in ("style.safetensors", f"{tmp_path}/a/b/c.safetensors", "./a/b/c.safetensors", "a/c.safetensors"):
        with pytest.raises(WeightsError, match="There is no weight file"):
            load_lora(missing, params)
    assert len(asked) == 3


# Files that do not fit


def one_layer(shape_down=(4, 24), shape_up=(16, 4)):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return {f"{name}.lora_A.weight": torch.ones(shape_down), f"{name}.lora_B.weight": torch.ones(shape_up)}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("lora_unet_conv_in.w_norm", "LyCORIS with norms"),
        ("lora_unet_conv_in.on_input", "IA³"),
        ("unet.conv_in.lora_B.bias", "LoRA with biases"),
    ],
)
def test_other_kinds_of_adapters_are_named(key, kind, models, tmp_path):
    path = write(tmp_path / "other.safetensors", {**one_layer(), key: torch.ones(4)})
    with pytest.raises(WeightsError, match=rf"other\.safetensors is {kind}.*, which codi_jax cannot read"):
        load_lora(path, models["sd-1.x"])


def test_unmatched_keys_are_counted_and_shown(models, tmp_path):
    sdxl = {"unet": random_lora(models["sdxl"]["unet"])}
    path = save_lora(tmp_path / "sdxl.safetensors", sdxl, naming="kohya")
    with pytest.raises(WeightsError) as error:
        load_lora(path, models["sd-1.x"])
    message = str(error.value)
    assert re.search(
        r"sdxl\.safetensors: \d+ of \d+ keys belong to no layer of unet, text_encoder: lora_unet_", message
    )
    assert "LoRA for another model" in message
    flux = write(tmp_path / "flux.safetensors", {"transformer.x_embedder.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(WeightsError, match=r"1 of 1 keys .*transformer\.x_embedder\.lora_A\.weight"):
        load_lora(flux, models["sd-1.x"])
    with pytest.raises(WeightsError, match="0 of 0 keys"):
        load_lora(write(tmp_path / "empty.safetensors", {}), models["sd-1.x"])


def test_every_part_must_be_given_or_left_out(models, tmp_path):
    adapter_file(tmp_path, "sd-1.x")
    unet = models["sd-1.x"]["unet"]
    with pytest.raises(WeightsError, match=r"keys belong to no layer of unet: text_encoder\."):
        load_lora(tmp_path, {"unet": unet})
    assert load_lora(tmp_path, {"unet": unet, "text_encoder": None}).keys() == {"unet"}


def test_shapes_of_another_family_are_named(models, tmp_path):
    path = write(tmp_path / "sd2.safetensors", one_layer(shape_down=(4, 32)))
    message = (
        r"sd2\.safetensors \(unet\) does not fit.*attn2\.to_k has down \[32, 4\] and up \[4, 16\] for .* \[24, 16\]"
    )
    with pytest.raises(WeightsError, match=message):
        load_lora(path, models["sd-1.x"])
    path = write(tmp_path / "ranks.safetensors", one_layer(shape_up=(16, 5)))
    with pytest.raises(WeightsError, match=r"has down \[24, 4\] and up \[5, 16\]"):
        load_lora(path, models["sd-1.x"])


def test_broken_files(models, tmp_path):
    down, up = one_layer()
    path = write(tmp_path / "half.safetensors", {down: torch.ones(4, 24)})
    with pytest.raises(WeightsError, match=r"only one of the two factors of unet\.down_blocks\.0.*attn2\.to_k"):
        load_lora(path, models["sd-1.x"])
    path = write(tmp_path / "nan.safetensors", {down: torch.ones(4, 24), up: torch.full((16, 4), torch.nan)})
    with pytest.raises(WeightsError, match=r"nan\.safetensors holds NaN"):
        load_lora(path, models["sd-1.x"])


# Files out


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_saved_file_in_diffusers(naming, family, models, tmp_path):
    # diffusers itself confuses the α of a kohya file whose layers have several.
    several = {"ranks": (3, 2), "alphas": (1.25, 5.0)} if naming == "diffusers" else {}
    loras = {part: random_lora(params, **several) for part, params in models[family].items()}
    path = save_lora(tmp_path / "lora.safetensors", loras, naming=naming)
    ours = {part: merge_lora(models[family][part], lora) for part, lora in loras.items()}
    assert_trees_close(ours, merged_by_diffusers(path, family, models[family]), models[family])


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_round_trip(naming, models, tmp_path):
    loras = {part: random_lora(params, (3, 1), (1.25, 0.5, 2.0)) for part, params in models["sdxl"].items()}
    path = save_lora(tmp_path / "new" / "folder", loras, naming=naming)
    assert path == tmp_path / "new" / "folder" / "pytorch_lora_weights.safetensors"
    assert_same(load_lora(path.parent, models["sdxl"]), loras)
    save_lora(path, loras, naming=naming, dtype=jnp.bfloat16)
    half = load_lora(path, models["sdxl"], dtype=jnp.bfloat16)
    assert_same(half, jax.tree.map(lambda x: x if x.ndim == 0 else x.astype(jnp.bfloat16), loras))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_keys_of_a_saved_file(models, tmp_path):
    loras = {part: random_lora(params) for part, params in models["sdxl"].items()}
    keys = safetensors.torch.load_file(save_lora(tmp_path, loras, naming="kohya")).keys()
    for key in (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha",
    ):
        assert key in keys
    one_text = {part: loras[part] for part in ("unet", "text_encoder")}
    keys = safetensors.torch.load_file(save_lora(tmp_path, one_text, naming="kohya")).keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys
    keys = safetensors.torch.load_file(save_lora(tmp_path, loras)).keys()
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys


def test_nothing_is_left_of_a_failed_save(models, tmp_path, monkeypatch):
    lora = {"unet": random_lora(models["sd-1.x"]["unet"], targets=["to_q"])}
    path = save_lora(tmp_path / "lora.safetensors", lora)
    before = path.read_bytes()
    large = jax.tree.map(lambda x: x + 1e6, lora)
    with pytest.raises(WeightsError, match=r"to_q\.lora_A\.weight is not finite in float16"):
        save_lora(path, large, dtype=jnp.float16)
    with pytest.raises(WeightsError, match="is not finite in float32"):
        save_lora(path, jax.tree.map(lambda x: x * jnp.nan, lora))
    with pytest.raises(WeightsError, match="LoRA for unet has no layers"):
        save_lora(path, {"unet": {}})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WeightsError, match=r"No space left on device\. Nothing was left"):
        save_lora(path, large)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
