import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codi_jax.io.state_dict import from_state_dict, to_flax_layout, to_torch_layout
from codi_jax.models.config import WeightsError
from codi_jax.models.names import torch_name


def test_torch_name():
    for name, path in {
        "down_blocks.0.resnets.1.conv1.weight": ("down_blocks_0", "resnets_1", "conv1", "kernel"),
        "mid_block.attentions.0.transformer_blocks.11.attn1.to_out.0.bias": (
            "mid_block", "attentions_0", "transformer_blocks_11", "attn1", "to_out_0", "bias",
        ),
        "time_embedding.linear_1.weight": ("time_embedding", "linear_1", "kernel"),
        "text_model.encoder.layers.0.layer_norm1.weight": ("text_model", "encoder", "layers_0", "layer_norm1", "scale"),
        "text_model.embeddings.token_embedding.weight": ("text_model", "embeddings", "token_embedding", "embedding"),
        "controlnet_mid_block.weight": ("controlnet_mid_block", "kernel"),
    }.items():  # fmt: skip
        assert torch_name(path) == name
    # Flax's CLIP has the index as a level of its own.
    assert torch_name(("encoder", "layers", "3", "mlp", "fc1", "kernel")) == "encoder.layers.3.mlp.fc1.weight"


@pytest.mark.parametrize("module", [np, jnp])
def test_layouts(module: object):
    for leaf, shape, torch_shape in (
        ("kernel", (3, 2, 4, 5), (5, 4, 3, 2)),
        ("kernel", (4, 5), (5, 4)),
        ("embedding", (4, 5), (4, 5)),
        ("scale", (4,), (4,)),
    ):
        array = module.arange(np.prod(shape)).reshape(shape)
        assert to_torch_layout(leaf, array).shape == torch_shape
        np.testing.assert_array_equal(to_flax_layout(leaf, to_torch_layout(leaf, array)), array)


def test_from_state_dict_takes_plain_arrays():
    abstract = {"linear_1": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    params = from_state_dict(abstract, {"linear_1.weight": np.arange(6.0).reshape(3, 2)})
    np.testing.assert_array_equal(params["linear_1"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(WeightsError, match="The state dict does not fit"):
        from_state_dict(abstract, {})
