"""The networks of a model together: what training adds to them, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from folders import SD_UNET
from pairs import Pairs
from published import TINY_VAE

from codi_jax.methods import codi, denoising
from codi_jax.models.clip_text import CLIPTextModel
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig
from codi_jax.models.vae import AutoencoderKL, VAEConfig
from codi_jax.pipeline.networks import (
    Networks,
    add_controlnet,
    init_controlnet,
    refuse_guidance_input,
    require_instruct_pix2pix,
    widen_params,
    widen_unet,
)


def test_a_new_controlnet_fits_the_vae_and_the_unet(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    networks = add_controlnet(ours.networks)
    assert networks.controlnet.config.conditioning_downscale == networks.vae.config.downscale
    controlnet = jax.eval_shape(lambda p: init_controlnet(networks, p, jax.random.key(0)), ours.params["unet"])
    shapes = (jax.tree.map(lambda x: x.shape, x) for x in (controlnet, networks.controlnet.abstract_params()))
    assert next(shapes) == next(shapes)
    assert isinstance(networks.text_encoder, CLIPTextModel)  # nothing else has changed
    assert dataclasses.replace(networks, controlnet=None) == ours.networks
    hash(networks)


@pytest.mark.parametrize(
    ("family", "task", "is_sdxl", "names"),
    [
        ("text-to-image", "text-to-image", False, "unet vae text_encoder"),
        ("controlnet", "text-to-image", False, "unet vae text_encoder controlnet"),
        ("instruct-pix2pix", "edit", False, "unet vae text_encoder"),
        ("inpainting", "inpaint", False, "unet vae text_encoder"),
        ("sdxl", "text-to-image", True, "unet vae text_encoder text_encoder_2"),
    ],
)
def test_what_networks_are(pairs: Pairs, family: str, task: str, is_sdxl: bool, names: str) -> None:
    networks = pairs(family).ours.networks
    assert (networks.task, networks.is_sdxl, networks.is_instruct_pix2pix) == (task, is_sdxl, task == "edit")
    assert set(networks.by_name()) == set(names.split())
    assert set(networks.text_encoders) == {name for name in names.split() if name.startswith("text_encoder")}
    assert Networks(None, networks.vae).task is None


def test_a_widened_unet_does_not_look_at_the_source_image_yet(pairs: Pairs) -> None:
    ours = pairs("text-to-image").ours
    unet, params = widen_unet(ours.networks.unet), widen_params(ours.params["unet"])
    shapes = (jax.tree.map(lambda x: x.shape, tree) for tree in (params, unet.abstract_params()))
    assert next(shapes) == next(shapes)
    assert dataclasses.replace(ours.networks, unet=unet).is_instruct_pix2pix
    kernel = params["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], ours.params["unet"]["conv_in"]["kernel"])
    assert not np.any(kernel[:, :, 4:])
    require_instruct_pix2pix(dataclasses.replace(ours.networks, unet=unet), "--flag")
    with pytest.raises(ValueError, match=r"--flag: its UNet has 4 input channels, but an Instruct.*'s has 8"):
        require_instruct_pix2pix(ours.networks, "--flag")


def test_options_reach_the_networks_that_have_them(pairs: Pairs) -> None:
    networks = pairs("controlnet").ours.networks
    changed = networks.with_options(scan_layers=True)
    assert (changed.unet.scan_layers, networks.unet.scan_layers) == (True, False)
    assert changed.vae == networks.vae
    recomputing = networks.recomputing("unet", "text_encoder_2")
    assert (recomputing.unet.remat, recomputing.controlnet.remat) == (True, False)
    assert recomputing.recomputing("unet", remat=False) == networks


def test_training_that_gives_a_network_no_guidance_refuses_one_that_takes_it() -> None:
    """The student of LCM as the start of CoDi or of plain training, which would never tell it the guidance."""
    takes, takes_none = (
        UNet2DCondition(UNetConfig.from_dict({**SD_UNET, "time_cond_proj_dim": width})) for width in (16, None)
    )
    refuse_guidance_input(takes_none, "so it is refused")
    message = r"the teacher takes its guidance as an input \(time_cond_proj_dim\), "
    with pytest.raises(ValueError, match=f"{message}so it is refused"):
        refuse_guidance_input(takes, "so it is refused")
    networks = Networks(takes, AutoencoderKL(VAEConfig.from_dict(TINY_VAE)))
    with pytest.raises(ValueError, match=f"{message}which CoDi does not give it"):
        codi.METHOD.configure(networks, codi.CodiFlags())
    for method in (denoising.TEXT_TO_IMAGE, denoising.CONTROLNET, denoising.INSTRUCT_PIX2PIX):
        with pytest.raises(ValueError, match=f"{message}which plain training does not give it"):
            method.configure(networks, method.flags())
