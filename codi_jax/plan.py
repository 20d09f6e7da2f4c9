"""``python3 -m codi_jax.plan``: plans one command for several kinds of devices, none of which need be here."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from codi_jax.cli import command_line, commands
from codi_jax.cli.flags import Flags
from codi_jax.io.atomic import write_json
from codi_jax.planning.plan import table
from codi_jax.planning.report import DOES_NOT_FIT

_PROGRAM = "python3 -m codi_jax.plan"
_USAGE = f"{_PROGRAM} TARGET [TARGET ...] -- COMMAND"


@dataclass(frozen=True)
class Args(Flags):
    """Plans a command for several targets, and compares them in a table.

    The command follows behind --: a training script with its flags, or codi_jax.generate with its flags, as in
    "python3 -m codi_jax.plan h200 v5e:4x4 -- training_scripts/train_lcm_flax.py --pretrained_teacher_model MODEL".
    """

    targets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Devices to plan for: cpu, cpu:8, gpu (the one that is here), h100, h200:8, or a TPU slice such as v5e:4x4."""
    output: Path = Path("outputs/plans.json")
    """File for all plans, as JSON."""


def run(args: Args, command: Sequence[str]) -> int:
    """Plans the command for each target in a process of its own, since compilers read their options once.

    Args:
      args: the arguments.
      command: the command to plan, without ``python3``.

    Returns:
      The exit status: 0 if the command fits one of the targets, 3 if it fits none.

    Raises:
      ValueError: if there is no command or no target, or a plan fails.
      OSError: if the file cannot be written.
    """
    args.check()
    if not command or not args.targets:
        raise ValueError(f"there is nothing to plan: {_USAGE}.")
    plans = [_planned(target, command) for target in args.targets]
    write_json(args.output, {"command": list(command), "plans": plans})
    print(table(plans))
    print(f"wrote {args.output}")
    return 0 if any(each["fits"] for each in plans) else DOES_NOT_FIT


def _planned(target: str, command: Sequence[str]) -> dict[str, Any]:
    """The plan for one target."""
    print(f"planning for {target} ...", file=sys.stderr, flush=True)
    program = _arguments(command)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        file = Path(folder) / "plan.json"
        flags = ["--plan", target, "--plan_output", str(file)]
        done = subprocess.run([sys.executable, *program, *flags], stdout=subprocess.PIPE, check=False)
        if done.returncode not in (0, DOES_NOT_FIT) or not file.is_file():
            raise ValueError(f"there is no plan for {target}: see the message above.")
        return json.loads(file.read_text())


def _arguments(command: Sequence[str]) -> list[str]:
    """What follows ``python3`` to run a script, a module, or a command of ``codi-jax``."""
    first, *rest = command
    if first.endswith(".py"):
        return [first, *rest]
    if "." in first:
        return ["-m", first, *rest]
    found, rest = commands.find(command)
    return [*found.as_arguments, *rest]


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    behind = words.index("--") if "--" in words else len(words)
    sys.argv[1:] = words[:behind]
    command_line.run(Args, lambda args: sys.exit(run(args, words[behind + 1 :])), _PROGRAM)


if __name__ == "__main__":
    main()
