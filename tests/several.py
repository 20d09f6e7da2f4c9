"""Runs of several processes on this machine."""

import os
import socket
import subprocess
import sys

_PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(code: list[str], index: int, address: str, **more: str) -> subprocess.Popen:
    given = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    environment = os.environ | given | {"JAX_PROCESS_ID": str(index)} | more
    return subprocess.Popen([sys.executable, *code], env=environment, **_PIPES)


def start_all(code: list[str], count: int, **more: str) -> list[subprocess.Popen]:
    """The processes of one run; a single one is told of no others."""
    if count == 1:
        return [subprocess.Popen([sys.executable, *code], env=os.environ | more, **_PIPES)]
    address = free_address()
    return [start(code, index, address, JAX_NUM_PROCESSES=str(count), **more) for index in range(count)]


def end_of(started: list[subprocess.Popen], timeout: float = 60) -> list[tuple[int, str]]:
    """The statuses and the last lines of what they say."""
    try:
        texts = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, err.strip().rpartition("\n")[2]) for process, (_, err) in zip(started, texts)]
