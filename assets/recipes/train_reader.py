"""Trains the network that reads attributes off avatars, and reports how often it is right.

    python3 assets/recipes/train_reader.py --output_dir runs/avatar-reader

The pictures are of both splits, unlike a model's: a judge must know what validation asks for. They are blurred, shifted
and disturbed at random, so that it also reads pictures that were not drawn but generated.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Dataset
from jaxtyping import Array, Float, Int, Key, UInt8
from tqdm import tqdm

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.data.avatars.looks import draw, random_look
from codi_jax.data.avatars.vocabulary import Look
from codi_jax.evaluation.attributes import Reader, labels, questions, shown_shares, shows
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.io.weights import save_model
from codi_jax.models.attribute_reader import AttributeReader, AttributeReaderConfig
from codi_jax.pipeline.conditions import to_signed

SIZE = 64


def batched(order: Int[np.ndarray, " n"], size: int) -> list[Int[np.ndarray, " b"]]:
    """Full batches of an order of pictures."""
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    """Trains the reader of attributes."""

    output_dir: Path
    """Folder of the network."""
    num_train: int = 30_000
    """Pictures to train on."""
    num_validation: int = 4_000
    """Held-out pictures."""
    epochs: int = 14
    """Rounds over the pictures."""
    batch_size: int = 64
    """Pictures in a step."""
    learning_rate: float = 2e-3
    """Peak of the learning rate, which rises and falls in one cycle."""
    seed: int = 0
    """Seed of parameters and order; the pictures are always the same."""


def drawn(start: int, count: int) -> tuple[UInt8[np.ndarray, "n h w 3"], list[Look]]:
    """Pictures and their looks, numbered from ``start``."""

    def one(row: dict[str, int]) -> dict[str, bytes]:
        return {"pixels": draw(random_look(np.random.default_rng(row["number"])), SIZE).tobytes()}

    numbers = range(start, start + count)
    rows = Dataset.from_dict({"number": list(numbers)}).map(one, num_proc=2, keep_in_memory=True, desc="drawing")
    pixels = np.stack([np.frombuffer(cell, np.uint8).reshape(SIZE, SIZE, 3) for cell in rows["pixels"]])
    return pixels, [random_look(np.random.default_rng(number)) for number in numbers]


def targets(looks: list[Look]) -> Int[np.ndarray, "n q"]:
    """For each question the number of the right answer; -1 if it does not apply."""
    answers = np.full((len(looks), len(questions())), -1, np.int32)
    for look, row in zip(looks, answers, strict=True):
        for number, question in enumerate(questions()):
            if question.kind in (None, look["kind"]) and question.attribute in look:
                row[number] = question.values.index(look[question.attribute])
    return answers


def disturbed(pixels: Float[Array, "b h w 3"], key: Key[Array, ""]) -> Float[Array, "b h w 3"]:
    """Each picture shifted by up to two pixels, half of them blurred, with a little noise and contrast."""
    shift_key, blur_key, noise_key, amount_key, contrast_key = jax.random.split(key, 5)
    count = len(pixels)
    padded = jnp.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    corners = jax.random.randint(shift_key, (count, 2), 0, 5)
    shifted = jax.vmap(lambda x, corner: jax.lax.dynamic_slice(x, (*corner, 0), (SIZE, SIZE, 3)))(padded, corners)
    small = jax.image.resize(shifted, (count, SIZE * 5 // 8, SIZE * 5 // 8, 3), "linear")
    blurred = jax.image.resize(small, shifted.shape, "cubic")
    share = jax.random.uniform(blur_key, (count, 1, 1, 1), minval=-1.0).clip(0)
    noise = jax.random.normal(noise_key, shifted.shape)
    amount = jax.random.uniform(amount_key, (count, 1, 1, 1), maxval=0.1)
    contrast = jax.random.uniform(contrast_key, (count, 1, 1, 1), minval=0.9, maxval=1.1)
    return jnp.clip(contrast * (share * blurred + (1 - share) * shifted) + amount * noise, -1, 1)


def loss(
    params: Any, network: AttributeReader, pixels: UInt8[Array, "b h w 3"], wanted: Int[Array, "b q"], key: Any
) -> Float[Array, ""]:
    """The cross-entropy of all questions that apply."""
    logits: Any = network.apply({"params": params}, disturbed(to_signed(pixels), key))
    total = jnp.zeros(())
    for number, question in enumerate(questions()):
        answer = wanted[:, number]
        error = optax.softmax_cross_entropy_with_integer_labels(logits[:, question.outputs], answer.clip(0))
        total += jnp.sum(jnp.where(answer >= 0, error, 0)) / len(answer)
    return total


def train(args: Args, network: AttributeReader) -> Any:
    """The trained parameters."""
    pixels, looks = drawn(0, args.num_train)
    wanted = targets(looks)
    rng = np.random.default_rng(args.seed)
    orders = [rng.permutation(len(pixels)) for _ in range(args.epochs)]
    batches = [rows for order in orders for rows in batched(order, args.batch_size)]
    optimizer = optax.adamw(
        optax.cosine_onecycle_schedule(len(batches), args.learning_rate), b2=0.99, weight_decay=1e-3
    )
    params = network.random_params(jax.random.key(args.seed))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, key: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, network, *batch, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    bar = tqdm(batches, desc="training", mininterval=10)
    for number, rows in enumerate(bar):
        key = jax.random.fold_in(jax.random.key(args.seed + 1), number)
        params, state, value = step(params, state, (pixels[rows], wanted[rows]), key)
        if number % 100 == 0:
            bar.set_postfix(loss=f"{float(value):.3f}")
    return params


def report(reader: Reader, pixels: UInt8[np.ndarray, "n h w 3"], looks: list[Look]) -> str:
    """How often each attribute is read right, and the most frequent confusions."""
    shown = reader.read(pixels)
    lines = [f"attribute accuracy: {shown_shares(shown, looks).mean():.4f}"]
    right, count, confused = Counter(), Counter(), Counter()
    for seen, look in zip(shown, looks, strict=True):
        for name, is_right in shows(seen, look).items():
            question = "kind" if name == "kind" else f"{look['kind']}, {name}"
            count[question] += 1
            right[question] += is_right
            if not is_right:
                confused[f"{question}: {look[name]} read as {seen.get(name, 'another kind')}"] += 1
    lines += [f"  {question}: {right[question] / number:.4f} of {number}" for question, number in count.items()]
    lines += ["most frequent confusions:", *(f"  {number} x {text}" for text, number in confused.most_common(12))]
    return "\n".join(lines)


def main(args: Args) -> None:
    args.check()
    keep_compiled_programs(Path("~/.cache/codi_jax/xla"))
    network = AttributeReader(AttributeReaderConfig(labels=labels()))
    params = train(args, network)
    save_model(args.output_dir, None, network, params, dtype="float16")
    text = report(Reader(args.output_dir), *drawn(10**6, args.num_validation))
    (args.output_dir / "confusion.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    command_line.run(Args, main)
