"""A run's folder, ``--output_dir``: its name, its lock, and the run's arguments."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from codi_jax.cli import config_file
from codi_jax.cli.flags import Flags, Scope
from codi_jax.io.atomic import write_text

CONFIG_NAME = "config.yaml"
_LOCK_NAME = ".lock"

_held: dict[Path, int] = {}  # file descriptors of folders locked by this process


def fill_in(output_dir: str) -> str:
    """The folder with ``{timestamp}`` replaced by the time, the same in all processes."""
    if "{timestamp}" not in output_dir:
        return output_dir
    now = int(time.time())
    if jax.process_count() > 1:
        now = int(multihost_utils.broadcast_one_to_all(np.int32(now)))
    return output_dir.replace("{timestamp}", time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now)))


def lock(output_dir: Path) -> None:
    """Locks a folder against other runs until `unlock` or the end of this process, which may lock it again itself.

    If the file system has no locks, as for some object stores, this does nothing.

    Raises:
      ValueError: if another process holds the lock, naming that process.
      OSError: if the folder cannot be written.
    """
    key = output_dir.resolve()
    if key in _held:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(output_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(output_dir, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 1000).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise ValueError(
            f"{output_dir} is in use by another run ({owner}): wait until it has ended, or choose another --output_dir."
        ) from None
    except OSError:
        os.close(file)
        return
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n".encode())
    _held[key] = file


def unlock(output_dir: Path) -> None:
    """Unlocks a folder that this process has locked."""
    if (file := _held.pop(output_dir.resolve(), None)) is not None:
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
        os.close(file)


def arguments(flags: Flags) -> str:
    """The text of ``config.yaml``: the flags, without secrets, as ``--config`` reads them."""
    return config_file.dump(flags.values_within(Scope.PROCESS))


def write_arguments(flags: Flags, output_dir: Path) -> None:
    """Writes ``config.yaml``.

    Raises:
      OSError: if the folder cannot be written.
    """
    try:
        write_text(output_dir / CONFIG_NAME, arguments(flags))
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def check_arguments(flags: Flags, output_dir: Path) -> None:
    """Compares flags with those of the run whose files are in the folder, except flags that do not affect it.

    Raises:
      ValueError: naming the first flag that differs, or ``config.yaml`` if it is damaged.
    """
    path = output_dir / CONFIG_NAME
    # If it is alone in its folder, it is from a run that was later refused for its model or data.
    if not path.exists() or {file.name for file in output_dir.iterdir()} <= {CONFIG_NAME, _LOCK_NAME}:
        return
    try:
        earlier = config_file.load(path)
    except ValueError as error:
        remedy = "choose another --output_dir, or remove that file to use this one"
        raise ValueError(f"{error} It has the arguments of an earlier run: {remedy}.") from None
    given = config_file.parse(config_file.dump(flags.values_within(Scope.RESUME)))
    operational = {name for name, scope in flags.scopes().items() if scope > Scope.RESUME}
    for name in sorted((earlier.keys() | given.keys()) - operational):
        if earlier.get(name) != given.get(name):
            raise ValueError(
                f"{output_dir} holds another run, with --{name} {_shown(earlier.get(name))} instead of "
                f"{_shown(given.get(name))}: choose another --output_dir."
            )


def _shown(value: str | list[str] | None) -> str:
    return " ".join(value) if isinstance(value, list) else "without a value" if value is None else value


def _unwritable(output_dir: Path, error: OSError) -> OSError:
    return OSError(f"--output_dir {output_dir} cannot be written ({error.strerror}): choose another.")
