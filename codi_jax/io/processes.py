"""The processes of one run: how they join, check that they agree, and end together.

JAX connects them and lets them compute together, but reports failures poorly: a process that waits for another one is
silent for minutes and then aborts, and a process that has raised an error leaves the others waiting forever. Therefore
each process watches the others through the key-value store of JAX's coordination service, which process 0 hosts.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from codi_jax.cli import progress

_JOIN_SECONDS = "CODI_JAX_JOIN_TIMEOUT"
_JOIN_DEFAULT = 300
_FIRST_WORD, _NEXT_WORD = 10, 30  # seconds of waiting after which the missing processes are named
_MEETING_SECONDS = 600  # how long a process waits for the others to reach the same point
_A_DAY = 24 * 60 * 60 * 1000  # ms
_BEAT = 2.0  # seconds between two looks at the others
_SILENT = 60  # seconds without a sign of life after which a process counts as lost
_LAST_WORDS = 10.0  # seconds that process 0 gives the others to learn why the run ends
_ROOT = "codi_jax"

_numbers = itertools.count()  # for barriers: every process has the same ones in the same order


def initialize(silence: float | int = _SILENT) -> None:
    """Joins the other processes of the run, if any; call it before anything touches a device.

    Reads the variables that the launchers of TPU pods, Slurm, Open MPI and Kubernetes set, and
    ``JAX_COORDINATOR_ADDRESS`` (with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``). On a single host it does nothing.
    While it waits it names the missing processes, and it ends the process after ``CODI_JAX_JOIN_TIMEOUT`` seconds
    (default: 300). From then on an uncaught error in one process ends the others too, and only the first shows
    progress.

    Args:
      silence: seconds without a sign of life after which another process counts as lost, and this one ends.

    Raises:
      ValueError: if these variables contradict each other, or one of them is not a number.
    """
    if not jax.distributed.is_initialized():
        given = _given_processes()
        if not _has_several_processes():
            _require_alone(given)
            return
        limit = _number(_JOIN_SECONDS) if _JOIN_SECONDS in os.environ else _JOIN_DEFAULT
        with _reporting_missing_processes(given, limit):
            # JAX aborts at its own limit. Ours comes earlier, and ends the process with an explanation.
            jax.distributed.initialize(**given, initialization_timeout=limit + 60)
    if jax.process_index() != 0:
        progress.silence()
    _watch.start(silence)


def are_several() -> bool:
    """Whether this process is one of several, which end together."""
    return _watch.is_running


def agree(what: str, values: Mapping[str, Any], remedy: str) -> None:
    """Checks that all processes have the same values; every process must call it.

    Args:
      what: a noun for the values, for the message.
      values: JSON values by name; the name of a flag starts with ``--``.
      remedy: what to do if they differ, which ends the message.

    Raises:
      ValueError: naming the first value that differs, and the processes.
    """
    if not _watch.is_running:
        return
    given = json.dumps(dict(values), sort_keys=True, default=str)
    for index, text in sorted(_exchange(given, what).items()):
        other, first = json.loads(text), json.loads(given)
        for name in sorted(other.keys() | first.keys()):
            if other.get(name) != first.get(name):
                raise ValueError(
                    f"the processes of this run differ in their {what}: {name} is {json.dumps(first.get(name))} in "
                    f"{_named(_watch.index)} and {json.dumps(other.get(name))} in {_named(index)}: {remedy}."
                )


def code_version() -> str:
    """SHA-256 of the source of this package, and JAX's version: what all processes of a run must share."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"{digest.hexdigest()[:12]}, JAX {jax.__version__}"


def doing(what: str) -> None:
    """Notes what this process is at, for messages of all processes about one that hangs."""
    _watch.activity = what


def activities() -> str:
    """What each process was at last, in words."""
    if not _watch.is_running:
        return _watch.activity
    noted = _read("doing") | {_watch.index: _watch.activity}
    return "; ".join(f"{_named(index)}: {noted.get(index, 'has not said')}" for index in range(_watch.count))


def abort(message: str) -> NoReturn:
    """Ends this process at once from any thread, and the others of the run with it."""
    if _watch.is_running:
        _watch.end(message)
    _print(message)
    sys.stdout.flush()
    os._exit(1)


def wait_for_all(where: str) -> None:
    """Returns when all processes have called it; ``where`` names the place.

    This barrier does not use the devices, because an upload by one process may take longer than their collectives wait.
    """
    if _watch.is_running:
        _store().wait_at_barrier(f"{_ROOT}/{next(_numbers)}: {where}", _A_DAY)


def gather(value: Any) -> list[Any]:
    """A JSON value of each process, by their numbers; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - len(text))))
    return [json.loads(bytes(text[:size])) for text, size in zip(np.asarray(texts), sizes)]


def end(message: str) -> NoReturn:
    """Ends this process with a message and exit status 1, and the others of the run with it.

    A single process raises `SystemExit`. One of several exits at once: on its way out JAX would wait for the others,
    which wait for it.
    """
    if not _watch.is_running:
        sys.exit(message)
    _watch.end(message)


class _Watch:
    """Shows the others that this process is alive, and ends it when one of them has failed or is silent."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.activity = "starting"
        self._silence: float | int = _SILENT
        self._stopped = threading.Event()
        self._ending = threading.RLock()  # the first thread that ends the process has the word
        self._thread: threading.Thread | None = None
        self._beats: dict[int, tuple[str, float]] = {}  # for each process: the last one, and when it came

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, silence: float | int) -> None:
        # Not jax.process_count(), which sets the devices up.
        self._silence = silence
        state = _state()
        if self.is_running or state.num_processes == 1:
            return
        self.index, self.count = state.process_id, state.num_processes
        self._say("host", socket.gethostname())
        self._thread = threading.Thread(target=self._run, name="watch-processes", daemon=True)
        self._thread.start()
        sys.excepthook = self._end_with_error
        # Runs before JAX waits for the others to end: from then on silence does not mean failure.
        atexit.register(self._finish)

    def end(self, message: str) -> NoReturn:
        self._ending.acquire()
        failures = self._failures()
        if failures:
            message = self._because(failures)
        else:
            self._say("failed", message.strip().rpartition("\n")[2])
        self._exit(message)

    def _end_with_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Ends the run with an uncaught error: on its way out JAX would wait for the others, which wait for it."""
        if not self.is_running:
            sys.__excepthook__(kind, error, trace)
        else:
            self.end("".join(traceback.format_exception(kind, error, trace)))

    def _say(self, kind: str, text: str) -> None:
        _store().key_value_set(f"{_ROOT}/{kind}/{self.index}", text, allow_overwrite=True)

    def _run(self) -> None:
        said = ""
        for beat in itertools.count():
            try:
                self._say("alive", str(beat))
                if self.activity != said:
                    said = self.activity
                    self._say("doing", said)
                if failures := self._failures():
                    self._exit(self._because(failures))
                if self.index == 0 and (silent := self._silent()) is not None:
                    self.end(f"error: {_named(silent)} has been silent for {self._silence:g} s: see its output.")
            except jax.errors.JaxRuntimeError:
                return  # the service is gone; JAX itself ends the process
            if self._stopped.wait(_BEAT):
                return

    def _failures(self) -> dict[int, str]:
        return {index: text for index, text in _read("failed").items() if index != self.index}

    def _because(self, failures: Mapping[int, str]) -> str:
        index, text = min(failures.items())
        return f"error: {_named(index)} ended with «{text.removeprefix('error: ')}», so this process ends too."

    def _silent(self) -> int | None:
        finished, now = _read("finished"), time.monotonic()
        for index, beat in _read("alive").items():
            if self._beats.get(index, ("", 0.0))[0] != beat:
                self._beats[index] = beat, now
        late = (
            index for index, (_, since) in self._beats.items() if now - since > self._silence and index not in finished
        )
        return next(late, None)

    def _exit(self, message: str) -> NoReturn:
        self._ending.acquire()
        _print(message)
        sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say("ended", "")
            until = time.monotonic() + (_LAST_WORDS if self.index == 0 else 0)
            while time.monotonic() < until and len(_read("ended")) < self.count:
                time.sleep(0.1)
        os._exit(1)

    def _finish(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say("finished", "")
        self._stopped.set()


_watch = _Watch()


def _state() -> Any:
    """JAX's state of the processes, which has no public name; Orbax reads it too."""
    from jax._src import distributed

    return distributed.global_state


def _store() -> Any:
    """The key-value store that all processes share."""
    return _state().client


def _read(kind: str) -> dict[int, str]:
    """The values that the processes have written under a kind of key, by their numbers."""
    entries = _store().key_value_dir_get(f"{_ROOT}/{kind}/")
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _exchange(text: str, what: str) -> dict[int, str]:
    """A text of every process, by their numbers."""
    kind = f"meeting-{next(_numbers)}"
    _store().key_value_set(f"{_ROOT}/{kind}/{_watch.index}", text, allow_overwrite=True)
    try:
        _store().wait_at_barrier(f"{_ROOT}/{kind}", _MEETING_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        missing = sorted(set(range(_watch.count)) - _read(kind).keys())
        raise ValueError(
            f"waited {_MEETING_SECONDS} s to compare the {what} of the processes, but "
            f"{', '.join(map(_named, missing)) or 'some'} did not arrive: see their output."
        ) from error
    return _read(kind)


def _named(index: int) -> str:
    host = _read("host").get(index)
    return f"process {index}" + (f" ({host})" if host else "")


@contextlib.contextmanager
def _reporting_missing_processes(given: Mapping[str, Any], limit: int) -> Iterator[None]:
    """Names the missing processes during the block, repeatedly, and ends this process after ``limit`` s."""
    joined, began = threading.Event(), time.monotonic()
    others = _awaited(given)

    def speak() -> None:
        wait = min(_FIRST_WORD, limit)
        while not joined.wait(wait):
            waited = round(time.monotonic() - began)
            if waited >= limit:
                _print(
                    f"error: waited {waited} s for {others()}: check that all processes of the run were started, and "
                    f"that they reach each other; {_JOIN_SECONDS} sets another limit."
                )
                os._exit(1)  # the main thread is in JAX, and would abort there
            _print(f"waiting for {others()} ({waited} of {limit} s)")
            wait = min(_NEXT_WORD, limit - waited)

    threading.Thread(target=speak, name="wait-for-processes", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def _awaited(given: Mapping[str, Any]) -> Callable[[], str]:
    """Describes the processes that a joining process waits for, as far as its environment names them."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return lambda: "the other processes of this run"
    if given.get("process_id") == 0:
        return lambda: f"the other {given.get('num_processes', 1) - 1} processes, which join at {address}"

    def others() -> str:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (OSError, ValueError) as error:
            return f"process 0, which does not answer at {address} ({error})"
        return f"the processes that have not joined process 0 at {address} yet"

    return others


def _require_alone(given: Mapping[str, Any]) -> None:
    if given.get("num_processes", 1) > 1 or given.get("process_id", 0) > 0:
        variable = "JAX_NUM_PROCESSES" if "num_processes" in given else "JAX_PROCESS_ID"
        raise ValueError(
            f"{variable} is set and JAX_COORDINATOR_ADDRESS is not: set it to host:port of process 0. Otherwise every "
            "process would start a separate run in the same folder."
        )


def _has_several_processes() -> bool:
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    return (
        "JAX_COORDINATOR_ADDRESS" in env
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "," in hosts
        # JAX asks the metadata server which slice the machine belongs to.
        or (not hosts and _is_tpu_machine())
        # Not in a job of one task: there JAX would only use one device.
        or ("SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1)
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
    )


def _is_tpu_machine() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return importlib.util.find_spec("libtpu") is not None and bool(chips) and os.environ.get("JAX_PLATFORMS") != "cpu"


def _given_processes() -> dict[str, Any]:
    """The number and index of processes from the environment, where JAX only reads the coordinator's address."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {name: _number(variable) for name, variable in names.items() if variable in os.environ}


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ValueError(f"{variable} is {os.environ[variable]!r}: it must be a whole number.") from None
