"""Runs code of the documentation in the current folder: ``python documented_code.py CODE.json``.

The file holds a list of [module, arguments] for commands, and of texts for Python. All of them run in one process:
most of a short command's time goes into importing.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import codi_jax.training.run
from codi_jax.io import processes


def serve_no_page() -> None:
    """A page that is opened does not wait for visitors."""
    import gradio

    def launch(page: Any, **_: Any) -> None:
        page.block_thread = lambda: None

    gradio.Blocks.launch = launch


def main(file: Path) -> None:
    def fail(explanation: str, *_: Any) -> None:
        raise RuntimeError(explanation)

    processes.end = fail
    # Compiling a sampler takes longer than the step; what it draws is not looked at here.
    codi_jax.training.run._validate = lambda *_: {}
    for code in json.loads(file.read_text()):
        if isinstance(code, str):
            exec(compile(code, "documentation", "exec"), {"__name__": "__main__"})
            continue
        module, arguments = code
        if module == "codi_jax.app":
            serve_no_page()
        sys.argv = [module, *arguments]
        print("running", *sys.argv, file=sys.stderr, flush=True)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise RuntimeError(f"{module} ended with {end.code}") from end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
