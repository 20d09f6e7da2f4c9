"""DisBack beside DMD in two dimensions, where the whole distribution can be seen, and from a start that is far away.

The data are eight Gaussians on a circle. The teacher is a small network that denoises them; the generator starts as a
network that was trained on one Gaussian elsewhere, so that the teacher has never seen anything like its samples. DMD
moves it by the teacher's score from the first update on; DisBack first records how the teacher's score becomes the
generator's, and walks that path back. The losses and steps are those of `codi_jax.methods.disback`, on points in place
of latents.

    python3 benchmarks/disback_2d.py --output disback-2d.png

Takes about three minutes on 2 cores. Prints a table: updates of the generator until the energy distance (Székely and
Rizzo, 2013) between its samples and the data falls below some thresholds and stays there, for five seeds. The steps of
stage 1, which only train the fake score, are added in the column "with stage 1".
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from codi_jax.diffusion import losses, samplers
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import timesteps_for
from codi_jax.methods import disback
from codi_jax.methods.disback import DisbackFlags, DisbackSetup, DisbackState, target_index
from codi_jax.pipeline.conditions import Condition, Conditions, Frozen, Inputs
from codi_jax.pipeline.networks import Networks
from codi_jax.pipeline.prediction import predict
from codi_jax.training import optim

BATCH, SHOWN = 256, 2000
CHUNK = 10  # updates between two measurements
MODES = 8
RADIUS, SPREAD = 1.5, 0.12
SCHEDULE = NoiseSchedule.from_config(
    {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
)
Points = Float[Array, "b 1 1 2"]


@dataclass(frozen=True)
class PointConfig:
    """What the methods ask of a UNet's and a VAE's configuration."""

    in_channels: int = 2
    latent_channels: int = 2
    downscale: int = 1
    scaling_factor: float = 1.0
    time_cond_proj_dim: int | None = None
    embeds_image_guidance: bool = False


class PointDenoiser(nn.Module):
    """A denoiser of points, in place of the UNet: four dense layers on sines and cosines of place and time."""

    config: PointConfig = PointConfig()
    width: int = 128
    remat: bool = False  # not used

    @nn.compact
    def __call__(self, z: Points, t: Any, *_: Any) -> tuple[Points, dict[str, Array]]:
        times = jnp.broadcast_to(t, (len(z),))[:, None] * 2.0 ** jnp.arange(8)[None] * np.pi / 1000
        places = (z[:, 0, 0, :, None] * 2.0 ** jnp.arange(4)[None, None]).reshape(len(z), -1)
        waves = [wave(angles) for angles in (times, places) for wave in (jnp.sin, jnp.cos)]
        x = jnp.concatenate([z[:, 0, 0], *waves], axis=1)
        for width in (self.width,) * 3:
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(2)(x)[:, None, None], {}


@dataclass(frozen=True)
class Identity:
    """In place of a VAE."""

    config: PointConfig = PointConfig()


NETWORKS = Networks(PointDenoiser(), Identity())  # pyright: ignore[reportArgumentType]
CONTEXT = jnp.zeros((BATCH, 1, 1))


def data_points(key: Key[Array, ""], count: int) -> Points:
    """Samples of the data."""
    mode_key, noise_key = jax.random.split(key)
    angles = jax.random.randint(mode_key, (count,), 0, MODES) * (2 * np.pi / MODES)
    centers = RADIUS * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return (centers + SPREAD * jax.random.normal(noise_key, (count, 2)))[:, None, None]


def far_points(key: Key[Array, ""], count: int, center: tuple[float, float]) -> Points:
    """Samples of what the generator is trained on before."""
    return (jnp.asarray(center)[None] + 0.3 * jax.random.normal(key, (count, 2)))[:, None, None]


def trained_denoiser(points: Any, seed: int, steps: int = 3000) -> Any:
    """A denoiser's parameters, after plain denoising of these points."""

    def loss(params: Any, batch: Any, key: Key[Array, ""]) -> Any:
        points_key, t_key, noise_key = jax.random.split(key, 3)
        z0 = points(points_key, BATCH)
        t, noise = jax.random.randint(t_key, (len(z0),), 0, 1000), jax.random.normal(noise_key, z0.shape)
        conditions = Conditions(Condition(batch["context"]))
        found = predict(NETWORKS, {"unet": params}, SCHEDULE.add_noise(z0, noise, t), t, conditions)
        return jnp.mean(losses.mse(found, SCHEDULE.target(z0, noise, t))), {}

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = NETWORKS.unet.init(jax.random.key(seed), jnp.zeros((1, 1, 1, 2)), 0)["params"]
    state = optim.init_state(params, optimizer, jax.random.key(seed + 1))
    step = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, _: optim.step(s, loss, {"context": CONTEXT}, optimizer), state, length=steps
        )
    )
    return step(state)[0].params


@functools.partial(jax.jit, static_argnames="setup")
def generated(params: Any, key: Key[Array, ""], setup: DisbackSetup) -> Points:
    """Samples of a generator."""
    inputs = Inputs(None, Conditions(Condition(jnp.zeros((SHOWN, 1, 1)))))
    return setup.generator(params, Frozen({}, SCHEDULE), inputs, key)


@jax.jit
def sampled(params: Any, key: Key[Array, ""]) -> Points:
    """Samples of a score, in 50 steps of DDIM."""
    conditions = Conditions(Condition(jnp.zeros((SHOWN, 1, 1))))
    z = jax.random.normal(key, (SHOWN, 1, 1, 2))
    times = timesteps_for("ddim", SCHEDULE, 50)
    return samplers.sample(
        "ddim", lambda z, t: predict(NETWORKS, {"unet": params}, z, jnp.full(SHOWN, t), conditions), SCHEDULE, z, times
    )


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'|, zero for equal distributions."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=-1).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


@dataclass(frozen=True)
class Curve:
    """A run: distances to the data, measured every `CHUNK` updates, and samples at some of them."""

    distances: list[float]
    samples: dict[int, np.ndarray]

    def updates_until(self, threshold: float) -> int | None:
        """Updates after which the distance stays below a threshold; ``None`` if it does not."""
        above = [i for i, distance in enumerate(self.distances) if distance >= threshold]
        first = above[-1] + 1 if above else 0
        return first * CHUNK if first < len(self.distances) else None


def setup_of(flags: DisbackFlags, *, has_path: bool) -> DisbackSetup:
    """The method's setup; there is no text, so no null text."""
    setup = disback.configure(NETWORKS, flags, side=1, has_path=has_path)
    return replace(setup, needs_null_text=False)


def record_path(teacher: Any, start: Any, flags: DisbackFlags, seed: int) -> list[Any]:
    """Stage 1: the nodes from the teacher to the score of the start."""
    setup = disback.configure_degradation(NETWORKS, flags, side=1)
    optimizer = optax.adam(flags.guidance_lr or 1e-3)
    state = optim.init_state({"unet": teacher}, optimizer, jax.random.key(seed))
    frozen = Frozen({"unet": start}, SCHEDULE)

    @jax.jit
    def steps(state: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            return disback.degradation_step(state, frozen, {"context": CONTEXT}, setup=setup, optimizer=optimizer)

        return jax.lax.scan(step, state, length=flags.degradation_interval)[0]

    nodes = [teacher]
    for _ in range(flags.num_nodes):
        state = steps(state)
        nodes.append(state.params["unet"])
    return nodes


def train(nodes: list[Any], start: Any, flags: DisbackFlags, updates: int, seed: int, real: np.ndarray) -> Curve:
    """Stage 2 along a path; with the teacher alone it is plain DMD."""
    has_path = len(nodes) > 1
    setup = setup_of(flags, has_path=has_path)
    optimizer = optax.adam(flags.generator_lr or 1e-3), optax.adam(flags.guidance_lr or 1e-3)
    keys = jax.random.split(jax.random.key(seed), 3)
    state = DisbackState(
        optim.init_state({"unet": start}, optimizer[0], keys[0]),
        optim.init_state({"unet": nodes[-1]}, optimizer[1], keys[1]),
    )

    @jax.jit
    def chunk(state: Any, target: Any) -> Any:
        frozen = Frozen({}, SCHEDULE, target=target)

        def step(state: Any, _: None) -> Any:
            return disback.train_step(state, frozen, {"context": CONTEXT}, setup=setup, optimizer=optimizer)

        return jax.lax.scan(step, state, length=CHUNK * flags.dfake_gen_update_ratio)[0]

    distances, samples = [], {}
    for update in range(0, updates + 1, CHUNK):
        points = np.asarray(generated(state.generator.params, keys[2], setup))[:, 0, 0]
        distances.append(energy_distance(points[:500], real[:500]))
        samples[update] = points
        step = update * flags.dfake_gen_update_ratio
        number = target_index(step, flags, len(nodes) - 1) if has_path else 0
        state = chunk(state, nodes[::-1][number] if has_path else nodes[0])
    return Curve(distances, samples)


def draw(
    path: Path,
    nodes: list[Any],
    curves: dict[str, list[Curve]],
    real: np.ndarray,
    thresholds: Sequence[float],
    start: tuple[float, float],
) -> None:
    """The path, the generators on their way, and their distances."""
    last = CHUNK * (len(curves["DMD"][0].distances) - 1)
    moments = [round(last * share / CHUNK) * CHUNK for share in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.add_gridspec(4, len(moments), height_ratios=(1, 1, 1, 1.5))
    key = jax.random.key(9)
    chosen = np.linspace(0, len(nodes) - 1, len(moments)).round().astype(int)
    rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = [
        ("path", [(f"node {i}" if i else "teacher", np.asarray(sampled(nodes[i], key))[:, 0, 0]) for i in chosen])
    ]
    for name, runs in curves.items():
        rows.append((name, [(f"{moment} updates", runs[0].samples[moment]) for moment in moments]))
    for row, (name, panels) in enumerate(rows):
        for column, (title, points) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            axes.scatter(*real[:500].T, s=2, color="#bbbbbb", linewidths=0)
            axes.scatter(*points[:500].T, s=2, color=("#7f7f7f", "#d55e00", "#2f86c6")[row], linewidths=0)
            low, high = zip(*[(min(-3, 1.4 * x), max(3, 1.4 * x)) for x in start], strict=True)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], aspect="equal")
            axes.set_title(title, fontsize=8)
            if column == 0:
                axes.set_ylabel(name)
    axes = figure.add_subplot(grid[3, :])
    for (name, runs), color in zip(curves.items(), ("#d55e00", "#2f86c6"), strict=True):
        values = np.array([run.distances for run in runs])
        updates = np.arange(values.shape[1]) * CHUNK
        axes.plot(updates, values.mean(axis=0), color=color, label=name)
        axes.fill_between(updates, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    for threshold in thresholds:
        axes.axhline(threshold, color="#7f7f7f", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="updates of the generator", ylabel="energy distance to the data")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def _row(name: str, runs: list[Curve], threshold: float, recording: int) -> str:
    """A line of the table."""
    found = [run.updates_until(threshold) for run in runs]
    whole = [number for number in found if number is not None]
    is_whole = len(whole) == len(runs) > 1
    mean = f"{np.mean(whole):.0f} ± {np.std(whole, ddof=1):.0f}" if is_whole else "–"
    total = f"{np.mean(whole) + recording:.0f}" if is_whole else "–"
    ends = [run.distances[-1] for run in runs]
    numbers = ", ".join("never" if number is None else str(number) for number in found)
    end = f"{np.mean(ends):.4f} ± {np.std(ends):.4f}"
    return f"| {threshold} | {name} | {numbers} | {mean} | {total} | {end} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("disback-2d.png"), help="the picture")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--thresholds", type=float, nargs="+", default=(0.05, 0.03))
    parser.add_argument("--num_nodes", type=int, default=6)
    parser.add_argument("--degradation_interval", type=int, default=20)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--start", type=float, nargs=2, default=(4.0, -3.0), help="center of the first samples")
    parser.add_argument("--max_step_percent", type=float, default=0.98, help="noisiest time of the comparison")
    parser.add_argument("--dfake_gen_update_ratio", type=int, default=5)
    parser.add_argument("--generator_lr", type=float, default=5e-4)
    parser.add_argument("--guidance_lr", type=float, default=1e-3)
    args = parser.parse_args()
    flags = DisbackFlags(
        num_nodes=args.num_nodes,
        degradation_interval=args.degradation_interval,
        interval=args.interval,
        max_step_percent=args.max_step_percent,
        dfake_gen_update_ratio=args.dfake_gen_update_ratio,
        generator_lr=args.generator_lr,
        guidance_lr=args.guidance_lr,
        conditioning_timestep=999,
        real_guidance_scale=1.0,
    )
    real = np.asarray(data_points(jax.random.key(7), SHOWN))[:, 0, 0]
    teacher = trained_denoiser(data_points, 0)
    start = trained_denoiser(functools.partial(far_points, center=tuple(args.start)), 1)
    teacher_points = np.asarray(sampled(teacher, jax.random.key(3)))[:500, 0, 0]
    print(f"the teacher's own distance: {energy_distance(teacher_points, real[:500]):.4f}")
    curves: dict[str, list[Curve]] = {"DMD": [], "DisBack": []}
    nodes: list[Any] = []
    for seed in range(args.seeds):
        nodes = record_path(teacher, start, flags, seed)
        curves["DMD"].append(train([teacher], start, flags, args.updates, seed, real))
        curves["DisBack"].append(train(nodes, start, flags, args.updates, seed, real))
    recording = args.num_nodes * args.degradation_interval
    print("| below | method | updates | mean | with stage 1 | distance at the end |")
    print("| ---: | --- | --- | ---: | ---: | ---: |")
    for threshold in args.thresholds:
        for name, runs in curves.items():
            print(_row(name, runs, threshold, recording if name == "DisBack" else 0))
    draw(args.output, nodes, curves, real, args.thresholds, tuple(args.start))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
