"""A method, a state and a loader that are as small as can be, to test the loop with.

``python tests/stand_in.py OUTPUT_DIR '{"flag": value, …}'`` trains with them in a process of its own, which ends itself
where it is told to, and prints the bits of the state that it ends with.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint.path import atomicity

from codi_jax.io import processes
from codi_jax.models import sharding
from codi_jax.training import loop, starting

EXAMPLES, WIDTH = 64, 8
OPTIMIZER = optax.adamw(1e-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    key: jax.Array


def init_state(width: int = WIDTH) -> State:
    keys = jax.random.split(jax.random.key(1))
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (WIDTH, width)), "bias": jnp.zeros(width)},
        "second": {"kernel": jax.random.normal(keys[1], (width, WIDTH)), "bias": jnp.zeros(WIDTH)},
    }
    # The average is the parameters themselves, the same arrays: the loop has to cope.
    return State(jnp.int32(0), params, OPTIMIZER.init(params), params, jax.random.key(7))


def frozen_trees() -> dict[str, Any]:
    return {"teacher": {"kernel": jax.random.normal(jax.random.key(2), (WIDTH, WIDTH))}, "scale": jnp.float32(1)}


def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
    x = batch["x"] / 127.5 - 1
    x = x + 0.1 * jax.random.normal(key, x.shape)
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    y = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    return frozen["scale"] * jnp.mean((y - x @ frozen["teacher"]["kernel"]) ** 2)


def make_train_step(accumulation: int = 1):
    def train_step(state: State, frozen: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(total, part_and_index):
            part, index = part_and_index
            value = jax.value_and_grad(loss)(state.params, frozen, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, value), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(one, zeros, (parts, jnp.arange(accumulation)))
        value, gradients = jax.tree.map(lambda x: x / accumulation, total)
        updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 0.1)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(1e-2)}
        return State(state.step + 1, params, opt_state, ema, state.key), metrics

    return train_step


class Loader:
    """Walks through the examples in an order of its own in every epoch."""

    samples_per_epoch = EXAMPLES

    def __init__(self, batch_size: int, on_batch: Callable[[int], None] = lambda number: None):
        self.on_batch = on_batch
        self.batch_size, self.position, self.given = batch_size, 0, 0
        self.x = np.random.default_rng(0).integers(0, 256, (EXAMPLES, WIDTH), dtype=np.uint8)

    def __next__(self) -> dict[str, np.ndarray]:
        places = np.arange(self.position, self.position + self.batch_size)
        orders = {epoch: np.random.default_rng(epoch).permutation(EXAMPLES) for epoch in set(places // EXAMPLES)}
        chosen = [orders[place // EXAMPLES][place % EXAMPLES] for place in places]
        self.position += self.batch_size
        self.given += 1
        self.on_batch(self.given)
        share = len(chosen) // jax.process_count()
        return {"x": self.x[chosen][jax.process_index() * share :][:share]}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def close(self) -> None:
        pass

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def run(output_dir: Path, *, train_step=None, loader=None, frozen=None, state=None, **flags: Any) -> State:
    """Trains with the stand-ins; the keywords are flags."""
    on_batch = flags.pop("on_batch", lambda number: None)
    validate, record, export = (flags.pop(name, None) for name in ("validate", "record", "export"))
    run_config = flags.pop("run_config", {"learning_rate": 1e-2})
    defaults = {"max_train_steps": 10, "checkpointing_steps": 4, "report_to": "none", "train_batch_size": 8}
    flags = starting.start(starting.LoopFlags(output_dir=str(output_dir), **(defaults | flags)), run_config)
    return loop.train(
        train_step or make_train_step(flags.gradient_accumulation_steps),
        state or init_state(),
        frozen or frozen_trees(),
        loader or Loader(starting.global_batch_size(flags), on_batch),
        flags,
        mesh=sharding.make_mesh(flags.fsdp),
        validate=validate,
        record=record,
        export=export,
        run_config=run_config,
    )


def fingerprint(state: State) -> str:
    """Every bit of a state."""
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return "".join(np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(state))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def signal_at_batch(number: int, which: signal.Signals) -> Callable[[int], None]:
    return lambda given: os.kill(os.getpid(), which) if given == number else None


def hang_at_batch(number: int) -> Callable[[int], None]:
    def hang(given: int) -> None:
        if given == number:
            time.sleep(600)

    return hang


def kill_in_save(number: int) -> None:
    """Ends the process while Orbax writes a checkpoint: all is written but its last step.

    That is the new name on a disk, and the file that says so on an object store.
    """
    for kind in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):

        async def kill(self, *args, finalize=kind.finalize, **kwargs):
            if self.get_final().name == f"checkpoint-{number}":
                os.kill(os.getpid(), signal.SIGKILL)
            return await finalize(self, *args, **kwargs)

        kind.finalize = kill


def main() -> None:
    processes.initialize()
    output_dir, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
    if number := flags.pop("kill_in_save", None):
        kill_in_save(number)
    on_batch = signal_at_batch(flags.pop("kill_at_batch", 0), signal.SIGKILL)
    if (number := flags.pop("hang_at_batch", 0)) and jax.process_index() == jax.process_count() - 1:
        on_batch = hang_at_batch(number)
    if (number := flags.pop("end_at_batch", 0)) and jax.process_index() == 1:
        on_batch = signal_at_batch(number, signal.SIGINT)
    state = run(output_dir, on_batch=on_batch, **flags)
    print(fingerprint(state))


if __name__ == "__main__":
    main()
