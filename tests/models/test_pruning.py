"""Pruned UNets against PyTorch's pruned by the reference rule, and against what is published."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from oracle import assert_close, make_pair, nchw, nhwc, prune_sd, torch_shapes
from published import TINY_SD15, TINY_SD21, TINY_SDXL

from codi_jax.io.weights import load_model, save_model
from codi_jax.models import pruning
from codi_jax.models.config import ConfigError
from codi_jax.models.pruning import LEVELS, KeptBlocks, feature_pairs, prune
from codi_jax.models.published import CROSS_DOWN, CROSS_UP, DOWN, SD15_UNET, SD21_UNET, SDXL_UNET, UNETS, UP
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

# The two lowest resolutions are of one width, as in SD: else the lowest could not go. All others differ.
FOUR = {
    **TINY_SD15,
    "sample_size": 16,
    "block_out_channels": [16, 32, 48, 48],
    "down_block_types": [CROSS_DOWN] * 3 + [DOWN],
    "up_block_types": [UP] + [CROSS_UP] * 3,
}
FOUR_V2 = {**FOUR, **{key: TINY_SD21[key] for key in ("use_linear_projection", "upcast_attention")}}
FOUR_V2["attention_head_dim"] = [2, 4, 8, 8]
DEEP_XL = {**TINY_SDXL, "transformer_layers_per_block": [1, 2, 10]}
TEACHERS = {"sd": FOUR, "sd-2": FOUR_V2, "sdxl": DEEP_XL}


def level(name: str) -> KeptBlocks:
    return KeptBlocks.from_dict(name, LEVELS[name])


def unet(config: dict[str, Any]) -> UNet2DCondition:
    return UNet2DCondition(UNetConfig.from_dict(config))


def prune_sdxl(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """As many transformer blocks as in the published configurations."""
    down, up = {"ssd_1b": ((2, 2, 4, 4), (4, 4, 10, 2, 1, 1)), "vega": ((1, 1, 2, 2), (2, 2, 2, 1, 1, 1))}[name]
    for blocks, depths in ((model.down_blocks, down), (model.up_blocks, up)):
        attentions = [attention for block in blocks if hasattr(block, "attentions") for attention in block.attentions]
        for attention, depth in zip(attentions, depths, strict=True):
            attention.transformer_blocks = attention.transformer_blocks[:depth]
    model.mid_block.resnets, model.mid_block.attentions = model.mid_block.resnets[:1], torch.nn.ModuleList()
    return model


def inputs(config: dict[str, Any]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    given = {
        "sample": rng.standard_normal((2, 16, 16, 4)),
        "timesteps": np.array([7, 607]),
        "encoder_hidden_states": rng.standard_normal((2, 5, config["cross_attention_dim"])),
    }
    if "addition_embed_type" in config:
        sizes = rng.uniform(0, 1024, (2, 6))
        given["added_cond"] = {"text_embeds": rng.standard_normal((2, 20)), "time_ids": sizes}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32), given)


def run_torch(model: torch.nn.Module, batch: dict[str, jax.Array]) -> np.ndarray:
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), batch)
    added = tensors.get("added_cond")
    out = model(nchw(batch["sample"]), tensors["timesteps"], tensors["encoder_hidden_states"], added_cond_kwargs=added)
    return nhwc(out.sample)


@pytest.mark.parametrize(
    ("family", "name"), [("sd", "bk_base"), ("sd", "bk_small"), ("sd-2", "bk_tiny"), ("sdxl", "ssd_1b")]
)
def test_predictions_equal_pytorch_pruned_by_the_reference_rule(family: str, name: str, tmp_path: Any) -> None:
    """And diffusers loads the folder: its configuration is complete, which that of the reference code never was."""
    config = TEACHERS[family]
    model, module, params = make_pair("unet", config)
    student, student_params = prune(module, params, level(name))
    batch = inputs(config)
    ours, _ = jax.jit(student.apply)({"params": student_params}, **batch)
    whole = run_torch(model, batch)
    theirs = run_torch((prune_sdxl if family == "sdxl" else prune_sd)(model, name), batch)
    assert_close(ours, theirs)
    assert np.abs(theirs - whole).max() > 0.05 * np.abs(whole).max(), "nothing is gone"
    save_model(tmp_path, None, student, student_params)
    loaded, info = TorchUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    np.testing.assert_array_equal(run_torch(loaded.eval(), batch), theirs)


def test_the_names_of_the_seed_are_base_and_tiny() -> None:
    for own, other in (("sd_small", "bk_base"), ("sd_tiny", "bk_tiny")):
        assert level(own).resolutions == level(other).resolutions
        assert level(own).mid == level(other).mid


# The parameters of nota-ai/bk-sdm-*, segmind/small-sd, tiny-sd, SSD-1B ("1.3 B") and Segmind-Vega ("745 M", of which
# 247 M in the down blocks, 31 M in the mid block and 460 M in the up blocks).
COUNTS = {
    "bk_base": 579_384_964, "bk_small": 482_346_884, "bk_tiny": 323_384_964, "sd_small": 579_384_964,
    "sd_tiny": 323_384_964, "ssd_1b": 1_331_334_404, "vega": 745_225_604,
}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    teacher = unet(SDXL_UNET if name in ("ssd_1b", "vega") else SD15_UNET)
    student, params = prune(teacher, teacher.abstract_params(), level(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[name]
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, student.abstract_params())


SMALL_V2 = {**SD21_UNET, "layers_per_block": 1, "mid_block_type": None}
TINY_V2 = {
    **UNETS["tiny-sd"],
    **{
        key: SD21_UNET[key]
        for key in ("sample_size", "cross_attention_dim", "use_linear_projection", "upcast_attention")
    },
    "attention_head_dim": [5, 10, 20],
}
SSD_1B = {
    **SDXL_UNET,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = {**SSD_1B, "transformer_layers_per_block": [1, [1, 1], [2, 2]]}
VEGA["reverse_transformer_layers_per_block"] = [[2, 2, 2], [1, 1, 1], 1]


@pytest.mark.parametrize(
    ("teacher", "name", "published"),
    [
        (SD15_UNET, "sd_small", UNETS["small-sd"]),
        (SD15_UNET, "sd_tiny", UNETS["tiny-sd"]),
        (SD15_UNET, "bk_small", {**UNETS["small-sd"], "mid_block_type": None}),
        (SD21_UNET, "bk_small", SMALL_V2),
        (SD21_UNET, "bk_tiny", TINY_V2),
        (SDXL_UNET, "ssd_1b", SSD_1B),
        (SDXL_UNET, "vega", VEGA),
    ],
)
def test_keys_and_shapes_are_those_of_the_published_students(teacher: dict, name: str, published: dict) -> None:
    student, _ = prune(unet(teacher), unet(teacher).abstract_params(), level(name))
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in TorchUNet(**published).state_dict().items()}
    assert torch_shapes(student) == theirs
    ours, wanted = student.config.to_dict(), UNetConfig.from_dict(published).to_dict()
    if not name.startswith(("ssd", "vega")):  # which write one number for each attention where one for all will do
        assert ours == wanted


def test_all_blocks_may_be_kept() -> None:
    for config in (FOUR, DEEP_XL, {**FOUR, "layers_per_block": [1, 2, 2, 3]}, {**FOUR, "mid_block_type": None}):
        teacher = unet(config)
        student, params = prune(teacher, teacher.abstract_params(), pruning.whole(teacher.config))
        assert student.config == teacher.config
        assert params == teacher.abstract_params()


def test_a_pruned_teacher_is_pruned_again() -> None:
    """Depths of its own for every attention, some of them no longer the first ones."""
    teacher = unet({**SSD_1B, "block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2]})
    table = {
        "resolutions": [
            {"down": [0], "up": [0, 2]},
            {"down": {1: [1]}, "up": {0: [1], 2: [0]}},
            {"down": {0: [0, 3]}, "up": {0: [2], 2: [7, 9]}},
        ],
        "mid": "drop",
    }
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), teacher.abstract_params())
    with pytest.raises(ConfigError, match=r"layer 1 of down_blocks.1 takes 64 channels, and what stays gives it 32"):
        prune(teacher, params, KeptBlocks.from_dict("mine", table))
    table["resolutions"][1]["down"] = {0: [1]}
    student, pruned = prune(teacher, params, KeptBlocks.from_dict("mine", table))
    assert student.config.transformer_layers_per_block == (1, 1, 2)
    assert student.config.reverse_transformer_layers_per_block == ((1, 2), 1, 1)
    ours = pruned["up_blocks_0"]["attentions_1"]["transformer_blocks_1"]
    assert ours is params["up_blocks_0"]["attentions_2"]["transformer_blocks_9"]
    assert (
        pruned["down_blocks_1"]["attentions_0"]["transformer_blocks_0"]
        is (params["down_blocks_1"]["attentions_0"]["transformer_blocks_1"])
    )
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(lambda leaf: leaf.shape, student.abstract_params())


DOWN_4, UP_4 = [f"down_blocks_{i}" for i in range(4)], [f"up_blocks_{i}" for i in range(4)]
OF_TINY = [("down_blocks_0", "down_blocks_0"), ("down_blocks_1", "down_blocks_1")]
UP_OF_TINY = [("up_blocks_0", "up_blocks_1"), ("up_blocks_1", "up_blocks_2"), ("up_blocks_2", "up_blocks_3")]


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("bk_base", [(tap, tap) for tap in [*DOWN_4, "mid_block", *UP_4]]),
        ("bk_small", [(tap, tap) for tap in [*DOWN_4, *UP_4]]),
        ("bk_tiny", [*OF_TINY, ("down_blocks_2", "down_blocks_2/before_downsampler"), *UP_OF_TINY]),
        ("sd_tiny", [*OF_TINY, ("down_blocks_2", "up_blocks_0"), *UP_OF_TINY]),
    ],
)
def test_the_blocks_that_are_compared(name: str, pairs: list[tuple[str, str]]) -> None:
    teacher = unet(FOUR)
    assert feature_pairs(teacher.config, level(name)) == tuple(pairs)
    student, _ = prune(teacher, teacher.abstract_params(), level(name))

    def shapes(module: UNet2DCondition) -> dict[str, tuple[int, ...]]:
        _, intermediates = jax.eval_shape(module.apply, {"params": module.abstract_params()}, **inputs(FOUR))
        return {tap: value.shape for tap, value in intermediates.items()}

    ours, theirs = shapes(student), shapes(teacher)
    assert [ours[a] for a, _ in pairs] == [theirs[b] for _, b in pairs]


PLAIN = {"down": [0], "up": [0, 2]}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another family": (
        DEEP_XL,
        LEVELS["bk_base"],
        "mine is for UNets of 4 resolutions, and this one has 3: take ssd_1b",
    ),
    "no layer": (
        FOUR,
        {"resolutions": [{"down": [2], "up": [0, 2]}] * 4},
        r"keeps layer 2 of down_blocks.0, which has 2",
    ),
    "pruned already": (
        {**FOUR, "layers_per_block": 1},
        LEVELS["bk_small"],
        r"keeps layer 2 of up_blocks.3, which has 2, from 0 to 1",
    ),
    "no mid block": (
        {**FOUR, "mid_block_type": None},
        LEVELS["bk_base"],
        "keeps the mid block, and this UNet has none",
    ),
    "no transformer block": (
        FOUR,
        {"resolutions": [{"down": {0: [1]}, "up": [0, 2]}, PLAIN, PLAIN, PLAIN]},
        r"keeps transformer block 1 in layer 0 of down_blocks.0, which has 1 of them",
    ),
    "no attention": (
        FOUR,
        {"resolutions": [PLAIN, PLAIN, PLAIN, {"down": {0: [0]}, "up": [0, 2]}]},
        r"keeps transformer block 0 in layer 0 of down_blocks.3, which has 0 of them",
    ),
    "skip connections": (
        FOUR,
        {"resolutions": [PLAIN, {"down": [0], "up": [0, 1, 2]}, PLAIN, PLAIN]},
        r"leaves 2 skip connections to up_blocks.2, those of down_blocks.1 and the one into it, and keeps 3 layers",
    ),
    "a skip connection of another width": (
        FOUR,
        {"resolutions": [PLAIN, PLAIN, {"down": [0], "up": [0, 1]}, PLAIN]},
        r"layer 1 of up_blocks.1 takes 48 channels and a skip connection of 48, and what stays gives it 48 .* of 32",
    ),
    "a middle resolution": (FOUR, {"resolutions": [PLAIN, None, PLAIN, PLAIN]}, "only the lowest resolutions can go"),
    "nothing": (FOUR, {"resolutions": [None] * 4}, "only the lowest resolutions can go"),
    "a lowest resolution of its own width": (
        FOUR,
        {"resolutions": [PLAIN, PLAIN, None, None], "mid": "drop"},
        r"layer 0 of up_blocks.2 takes 48 channels and a skip connection of 32, and what stays gives it 32",
    ),
    "no tap": (FOUR, {**LEVELS["bk_small"], "features": {"mid_block": "mid_block"}}, "the student has no mid_block"),
    "no tap of the teacher": (FOUR, {**LEVELS["bk_base"], "features": {"up_blocks_0": "u0"}}, "the teacher has no u0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_a_sentence(case: str) -> None:
    config, table, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as error:
        feature_pairs(UNetConfig.from_dict(config), KeptBlocks.from_dict("mine", table))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "a level has resolutions"),
        ({"resolutions": [PLAIN], "middle": "drop"}, "a level has resolutions"),
        (
            {"resolutions": [PLAIN], "mid": "first_resnet"},
            "mid = 'first_resnet' is not possible: it is one of keep, first",
        ),
        ({"resolutions": PLAIN}, "resolutions is a list"),
        ({"resolutions": [PLAIN], "features": ["up_blocks_0"]}, "features maps intermediates to intermediates"),
        ({"resolutions": [{"down": [0]}]}, "the layers of down and of up"),
        ({"resolutions": [{"down": [0], "up": [2, 0]}]}, r"rising numbers, such as .*: \[2, 0\]"),
        ({"resolutions": [{"down": [], "up": [0]}]}, "rising numbers"),
        ({"resolutions": [{"down": 0, "up": [0]}]}, "rising numbers"),
        ({"resolutions": [{"down": ["0"], "up": [0]}]}, "rising numbers"),
        ({"resolutions": [{"down": [0, 0], "up": [0, 1, 2]}]}, "rising numbers"),
        ({"resolutions": [{"down": {0: []}, "up": [0, 1]}]}, "rising numbers"),
        ({"resolutions": [{"down": {0: 1}, "up": [0, 1]}]}, "rising numbers"),
    ],
)
def test_a_table_that_is_none_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"mine: .*{message}"):
        KeptBlocks.from_dict("mine", table)


def test_a_folder_whose_config_does_not_fit_its_weights_is_refused(tmp_path: Any) -> None:
    """What the reference code left behind: weights of a pruned UNet under the configuration of the whole one."""
    _, module, params = make_pair("unet", FOUR)
    student, student_params = prune(module, params, level("bk_tiny"))
    save_model(tmp_path, "unet", student, student_params)
    (tmp_path / "unet" / "config.json").write_text(json.dumps(module.config.to_dict()))
    with pytest.raises(ValueError, match=r"does not fit its config.json; check that they are from one model"):
        load_model(tmp_path, "unet")
