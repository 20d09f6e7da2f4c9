"""A baked student against the student that it was made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
from consistency import condition_of, numpy_embedding, real_networks
from standins import EDITING

from codi_jax.methods import lcm
from codi_jax.methods.baking import bake_guidance
from codi_jax.methods.lcm import LcmFlags


@pytest.mark.parametrize("two", [False, True], ids=["one guidance", "two guidances"])
@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_a_baked_student_is_the_student(is_sdxl: bool, two: bool) -> None:
    networks, params = real_networks(is_sdxl=is_sdxl)
    weights = {"w_image_min": 0.0, "w_image_max": 2.0} if two else {}
    student = lcm.configure(networks, LcmFlags(unet_time_cond_proj_dim=16, **weights)).student.unet
    params = standins.random_params(student, 3)
    scales = (4.5, 1.7) if two else (4.5, None)
    baked, baked_params = bake_guidance(student, params, *scales)
    assert baked.config == networks.unet.config
    z, t, condition = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([19, 999]), condition_of(is_sdxl)
    z = jnp.concatenate([z, condition.image], axis=-1)
    embedding = np.concatenate([numpy_embedding(np.full(2, s - 1), 16) for s in scales if s is not None], 1)

    @jax.jit
    def predict(embedding: jax.Array) -> jax.Array:
        return student.apply({"params": params}, z, t, condition.context, embedding, condition.added_cond)[0]

    wanted = predict(jnp.asarray(embedding, jnp.float32))
    without = predict(jnp.zeros(embedding.shape))
    ours = baked.apply({"params": baked_params}, z, t, condition.context, added_cond=condition.added_cond)[0]
    largest = np.abs(np.asarray(wanted)).max()
    assert np.abs(np.asarray(wanted - without)).max() > 0.01 * largest, "the guidance changes nothing"
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * largest)


def test_guidance_that_the_student_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no guidance to bake in"):
        bake_guidance(EDITING.unet, {}, 4.0)
    student = lcm.configure(EDITING, LcmFlags()).student.unet
    with pytest.raises(ValueError, match="takes no image guidance"):
        bake_guidance(student, {}, 4.0, 1.5)
    of_both = lcm.configure(EDITING, LcmFlags(w_image_min=0.0, w_image_max=1.0)).student.unet
    with pytest.raises(ValueError, match="takes image guidance: give its scale"):
        bake_guidance(of_both, {}, 4.0)
