"""The path from the teacher to a degraded score that DisBack records and walks back, on disk and on the device.

On disk it is a folder with ``node_00``, ``node_01``, … (UNets as diffusers writes them, the most degraded last) and
``path.json``, which is written when all nodes exist and identifies the path's models. On the device there is one node
at a time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from codi_jax.io import processes
from codi_jax.io.atomic import write_json
from codi_jax.io.checksums import folder_digest
from codi_jax.io.json_files import read_object
from codi_jax.io.weights import load_model, save_model
from codi_jax.models import sharding
from codi_jax.models.config import Params
from codi_jax.models.network import Network
from codi_jax.pipeline.conditions import Frozen

PATH_NAME = "path.json"
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class DegradationPath:
    """A path on disk.

    Attributes:
      folder: the folder of its nodes.
      identity: what the path was recorded for: the teacher, the generator, and the distance between nodes.
      nodes: names of the nodes, the most degraded last, and the SHA-256 of their weight files.
    """

    folder: Path
    identity: Mapping[str, Any]
    nodes: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """A value that changes when anything in the path does."""
        return hashlib.sha256(json.dumps([dict(self.identity), dict(self.nodes)]).encode()).hexdigest()

    def load(self, number: int, dtype: DTypeLike) -> Params:
        """The parameters of a node in host memory.

        Args:
          number: the node's index, from 0; -1 is the most degraded one.
          dtype: the parameters' dtype.

        Raises:
          ValueError: if its files are not the recorded ones.
        """
        name = list(self.nodes)[number]
        if folder_digest(self.folder / name, _WEIGHTS) != self.nodes[name]:
            raise ValueError(
                f"{self.folder / name} is damaged, or was replaced: record the path again with --stage degradation."
            )
        return load_model(self.folder, name, dtype=dtype, place=lambda _, array: array)[1]


def node_name(number: int) -> str:
    """The folder of a node."""
    return f"node_{number:02d}"


def write_node(folder: Path, number: int, module: Network, params: Params, dtype: DTypeLike) -> None:
    """Writes a node completely or not at all; until `finish_path`, the folder no longer counts as a path.

    All processes must call it.

    Raises:
      WeightsError: if it cannot be written.
    """
    if jax.process_index() == 0:
        (folder / PATH_NAME).unlink(missing_ok=True)
    save_model(folder, node_name(number), module, params, dtype=dtype)


def finish_path(folder: Path, num_nodes: int, identity: Mapping[str, Any]) -> None:
    """Writes ``path.json``, which turns the existing nodes into a path.

    All processes must call it; they continue when the file exists.

    Args:
      folder: the nodes' folder.
      num_nodes: the number of nodes.
      identity: see `DegradationPath`, JSON.
    """
    if jax.process_index() == 0:
        nodes = {node_name(i): folder_digest(folder / node_name(i), _WEIGHTS) for i in range(num_nodes)}
        write_json(folder / PATH_NAME, {**identity, "nodes": nodes})
    processes.wait_for_all("the path is written")


def open_path(folder: Path) -> DegradationPath:
    """Opens a recorded path.

    Raises:
      ValueError: if there is none, or some of its nodes are missing.
    """
    try:
        content = read_object(folder / PATH_NAME, "record the path again")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no finished path (no {PATH_NAME}): record one with --stage degradation, or give --path "
            "none for plain distribution matching."
        ) from None
    if not isinstance(nodes := content.pop("nodes", None), dict) or not nodes:
        raise ValueError(f"{folder / PATH_NAME} names no nodes: record the path again.")
    missing = [name for name in nodes if not any((folder / name).glob(_WEIGHTS))]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)} of its {len(nodes)} nodes: copy them back, or record the path again "
            "with --stage degradation."
        )
    return DegradationPath(folder, content, nodes)


def check_identity(path: DegradationPath, identity: Mapping[str, Any]) -> None:
    """Compares a path's identity with what a run needs; keys that the run does not name may have any value.

    Raises:
      ValueError: naming the difference.
    """
    if path.identity.get("teacher") != identity["teacher"]:
        raise ValueError(
            f"{path.folder} was recorded for another model, {path.identity.get('model')}: record a path for "
            f"{identity['model']} with --stage degradation."
        )
    for name, value in identity.items():
        if name != "model" and path.identity.get(name) != value:
            raise ValueError(
                f"{path.folder} was recorded with {name} = {path.identity.get(name)}, and this run has {value}: give "
                "the same flags, or record another path with --stage degradation."
            )


class MovingTarget:
    """Frozen trees whose target is one of several UNets in turn: a `codi_jax.training.loop.Moving`.

    One of them is on the device, and the next one in host memory, read ahead by a thread. When they change, two are on
    the device until the steps in flight have finished.

    Args:
      frozen: the trees that stay the same.
      unets: functions that read the UNets into host memory or onto the mesh.
      index_at: the index of the UNet that a step needs, by the number of steps before it.
      mesh: the mesh to put them on.
    """

    def __init__(
        self,
        frozen: Frozen,
        unets: Sequence[Callable[[], Params]],
        index_at: Callable[[int], int],
        mesh: Mesh,
    ) -> None:
        self._constant = sharding.put(mesh, frozen)
        self._unets, self._index_at, self._mesh = unets, index_at, mesh
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-node")
        self._ahead: tuple[int, Future[Params]] | None = None
        self._index: int | None = None
        self._current: Frozen | None = None

    def at(self, step: int) -> Frozen:
        """The frozen trees after this many steps; reads the target if it was not read ahead.

        Raises:
          ValueError: if the target cannot be read.
        """
        index = self._index_at(step)
        if self._current is not None and index == self._index:
            return self._current
        self._current = None  # otherwise three UNets would be on the device
        current = replace(self._constant, target=sharding.put(self._mesh, self._read(index)))
        self._current, self._index = current, index
        if index + 1 < len(self._unets):
            self._ahead = index + 1, self._reader.submit(self._unets[index + 1])
        return current

    def _read(self, index: int) -> Params:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._unets[index]()

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)
