"""Shows a plan, and ends the process that made it."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from codi_jax.io.atomic import write_json
from codi_jax.planning.plan import Plan, describe

DOES_NOT_FIT = 3
"""The exit status of a plan that does not fit."""


def report(plan: Plan, file: Path) -> NoReturn:
    """Prints a plan, writes it as JSON, and ends the process: with status 3 if it does not fit.

    At once: a compiler that is still at work would keep the process for hours.

    Args:
      plan: the plan.
      file: the file to write.

    Raises:
      OSError: if it cannot be written.
    """
    file = file.expanduser()
    write_json(file, plan.to_json())
    sys.stdout.write(f"{describe(plan)}\n\nwrote {file}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if plan.fits else DOES_NOT_FIT)
