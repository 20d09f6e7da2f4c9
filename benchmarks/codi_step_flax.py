"""CoDi's training step with diffusers' former Flax models: the reference of `benchmarks/codi_step.py`.

It needs its own environment, since diffusers 0.38 was the last version with them:

    pip install "diffusers==0.38.0" "transformers==4.57.6" "jax==0.10.2" "flax==0.12.8" optax

`codi_step.py` starts it; it reads a file of arrays, and then does one step per line of input.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL, FlaxControlNetModel, FlaxUNet2DConditionModel
from flax.traverse_util import unflatten_dict
from transformers import CLIPTextConfig, FlaxCLIPTextModel

UNET_KEYS = (
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "cross_attention_dim", "attention_head_dim", "use_linear_projection",
)  # fmt: skip
CONTROLNET_KEYS = (
    "in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim",
    "attention_head_dim", "use_linear_projection", "conditioning_embedding_out_channels",
)  # fmt: skip
VAE_KEYS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "latent_channels", "norm_num_groups", "sample_size", "scaling_factor",
)  # fmt: skip


def chosen(config, keys):
    return {key: tuple(config[key]) if isinstance(config[key], list) else config[key] for key in keys if key in config}


def main() -> None:
    settings = json.loads(sys.argv[2])
    dtype = jnp.dtype(settings["dtype"])
    arrays = np.load(sys.argv[1])
    tree = unflatten_dict({name: jnp.asarray(arrays[name]) for name in arrays.files}, sep="/")
    unet = FlaxUNet2DConditionModel(**chosen(settings["unet"], UNET_KEYS), dtype=dtype)
    controlnet = FlaxControlNetModel(**chosen(settings["controlnet"], CONTROLNET_KEYS), dtype=dtype)
    frozen, params, batch = tree["unet"], tree["controlnet"], tree["batch"]
    encode = encoder(settings, dtype) if settings["encode"] else None
    alphas_cumprod, scale = tree["alphas_cumprod"], settings["scaling_factor"]
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=1e-2))
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "opt": optimizer.init(params)}

    def column(x):
        return x[:, None, None, None]

    def predict(control, z, t, context, image):
        down, mid = controlnet.apply({"params": control}, z, t, context, image, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet.apply({"params": frozen_now}, z, t, context, **residuals, return_dict=False)[0]

    def x0_eps(prediction, z, t):
        prediction = prediction.transpose(0, 2, 3, 1).astype(jnp.float32)
        a = column(jnp.sqrt(alphas_cumprod[t]))
        s = column(jnp.sqrt(1 - alphas_cumprod[t]))
        if settings["prediction_type"] == "epsilon":
            return (z - s * prediction) / a, prediction
        return a * z - s * prediction, a * prediction + s * z

    def f(z, x0, t):
        tau = column(10.0 * t)
        return 0.25 / (tau**2 + 0.25) * z + tau / jnp.sqrt(tau**2 + 0.25) * x0

    def loss(params, ema, batch, key):
        keys = jax.random.split(key, 4)
        moments, context = encode(batch) if encode else (batch["moments"], batch["context"])
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        z0 = (mean + jnp.exp(0.5 * logvar) * jax.random.normal(keys[0], mean.shape)) * scale
        n = jax.random.randint(keys[1], (len(z0),), 0, 50)
        t = (n + 1) * 20 - 1
        s = jnp.maximum(t - 20, 0)
        noise = jax.random.normal(keys[2], z0.shape)

        def to_z(x0, eps, t):
            return column(jnp.sqrt(alphas_cumprod[t])) * x0 + column(jnp.sqrt(1 - alphas_cumprod[t])) * eps

        def networks(control, z, t):
            # diffusers' Flax models take NCHW.
            return predict(control, z.transpose(0, 3, 1, 2), t, context, image)

        image = batch["conditioning"].transpose(0, 3, 1, 2).astype(jnp.float32) / 255
        z_t = to_z(z0, noise, t)
        x0, eps = x0_eps(networks(ema, z_t, t), z_t, t)
        z_s = to_z(x0, eps, s)
        online, _ = x0_eps(networks(params, z_t, t), z_t, t)
        target, _ = x0_eps(networks(ema, z_s, s), z_s, s)
        online, target = f(z_t, online, t), jax.lax.stop_gradient(f(z_s, target, s))
        return jnp.mean((online - target) ** 2) + jnp.mean((online - z0) ** 2)

    def step(state, frozen, batch, key):
        nonlocal frozen_now
        frozen_now = frozen
        value, grads = jax.value_and_grad(loss)(state["params"], state["ema"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, state["ema"], params)
        return {"params": params, "ema": ema, "opt": opt}, value

    frozen_now = frozen
    key = jax.random.wrap_key_data(tree["key"])
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, batch, key)
    program = lowered.compile(settings["compiler_options"])
    print(json.dumps({"compile": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, value = jax.block_until_ready(program(state, frozen, batch, key))
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": float(value)}), flush=True)


def encoder(settings, dtype):
    """Maps images and token ids to moments and text features, with random networks: only their time counts."""
    vae = FlaxAutoencoderKL(**chosen(settings["vae"], VAE_KEYS), dtype=dtype)
    vae_params = jax.tree.map(lambda x: x.astype(dtype), vae.init_weights(jax.random.key(0)))
    text = FlaxCLIPTextModel(CLIPTextConfig(**settings["text_encoder"]), dtype=dtype)
    text_params = jax.tree.map(lambda x: x.astype(dtype), text.params)

    def encode(batch):
        pixels = batch["pixels"].transpose(0, 3, 1, 2).astype(jnp.float32) / 127.5 - 1
        posterior = vae.apply({"params": vae_params}, pixels, method=vae.encode).latent_dist
        context = text.module.apply({"params": text_params}, batch["input_ids"], *text_inputs(batch["input_ids"]))[0]
        return jnp.concatenate([posterior.mean, posterior.logvar], -1), context

    return encode


def text_inputs(ids):
    return jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)


if __name__ == "__main__":
    main()
