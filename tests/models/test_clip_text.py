"""CLIP's text encoders against PyTorch transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, make_pair, torch_shapes
from published import TINY_TEXT
from transformers import CLIPTextConfig as TorchConfig
from transformers import CLIPTextModel as TorchCLIP
from transformers import CLIPTextModelWithProjection as TorchCLIPProjected

from codi_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from codi_jax.models.config import ConfigError
from codi_jax.models.published import TEXT_ENCODERS

PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
VARIANTS = {
    "quick-gelu": TINY_TEXT,
    "gelu": {**TINY_TEXT, "hidden_act": "gelu"},
    "projected": {**TINY_TEXT, **PROJECTED},
    # Files of before transformers 4.31: pooled where the highest id stands, here in the middle of the text.
    "eos-2": {**TINY_TEXT, **PROJECTED, "eos_token_id": 2},
}
# Padded with the end-of-text token, as SD 1.x does, and with another token behind it, as SD 2.x and SDXL do.
IDS = jnp.asarray([[97, 5, 6, 98, 98, 98, 98], [97, 11, 7, 3, 8, 98, 0]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_transformers(variant: str) -> None:
    model, module, params = make_pair("text_encoder", VARIANTS[variant])
    ours = jax.jit(module.apply)({"params": params}, IDS)
    theirs = model(torch.from_numpy(np.array(IDS)), output_hidden_states=True)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    for layer in (0, 1, 2):  # transformers 5 puts the normalized state last; [-2] is what SDXL reads
        assert_close(ours.hidden_states[layer], theirs.hidden_states[layer])
    assert len(ours.hidden_states) == len(theirs.hidden_states) == TINY_TEXT["num_hidden_layers"] + 1
    assert_close(ours.pooled, theirs.text_embeds if "architectures" in VARIANTS[variant] else theirs.pooler_output)


def test_pooling_takes_the_first_end_of_text() -> None:
    """The trap: the pooled state must not change with what is behind the first end-of-text token."""
    _, module, params = make_pair("text_encoder", TINY_TEXT)
    other_padding = IDS.at[0, 5:].set(3)
    run = jax.jit(module.apply)
    np.testing.assert_array_equal(
        run({"params": params}, IDS).pooled[0], run({"params": params}, other_padding).pooled[0]
    )


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_full_size_parameters_are_those_of_transformers(name: str) -> None:
    config = dict(TEXT_ENCODERS[name])
    projected = "architectures" in config
    with torch.device("meta"):
        model = (TorchCLIPProjected if projected else TorchCLIP)(TorchConfig(**{**config, "architectures": None}))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # Published files have a text_model level, which newer releases of transformers 5 dropped from the plain encoder.
    prefix = "" if projected or hasattr(model, "text_model") else "text_model."
    ours = torch_shapes(CLIPTextModel(CLIPTextConfig.from_dict(config)))
    assert ours == {prefix + key: shape for key, shape in theirs.items()}


def test_bfloat16_stays_near_float32() -> None:
    _, module, params = make_pair("text_encoder", TINY_TEXT)
    exact = jax.jit(module.apply)({"params": params}, IDS).last_hidden_state
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)({"params": params}, IDS).last_hidden_state
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), exact, 3e-2)


def test_the_config_that_transformers_writes_is_read() -> None:
    for projected in (False, True):
        written = TorchConfig(**TINY_TEXT).to_dict()
        written["architectures"] = ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
        config = CLIPTextConfig.from_dict(written)
        assert config.with_projection == projected
        assert CLIPTextConfig.from_dict(config.to_dict()) == config
        assert TorchConfig(**config.to_dict()).to_dict()["hidden_size"] == TINY_TEXT["hidden_size"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "T5EncoderModel"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CLIPTextConfig.from_dict({**TINY_TEXT, **change})


def test_too_many_tokens_are_refused_in_words() -> None:
    _, module, params = make_pair("text_encoder", TINY_TEXT)
    with pytest.raises(ValueError, match="17 tokens, but the text encoder has positions for 16"):
        jax.eval_shape(module.apply, {"params": params}, jnp.zeros((1, 17), jnp.int32))
