"""``python3 -m codi_jax.evaluate``: compares models by metrics, plots and images, on one HTML page."""

import shlex
import sys

import jax

from codi_jax.cli import command_line
from codi_jax.evaluation.arguments import Args
from codi_jax.evaluation.comparison import compare
from codi_jax.evaluation.results import Report, markdown, verdict

_PROGRAM = "python3 -m codi_jax.evaluate"


def run(args: Args) -> Report:
    """Compares the models, writes the report and prints its table; see `codi_jax.evaluation.comparison.compare`."""
    report = compare(args, f"{_PROGRAM} {shlex.join(sys.argv[1:])}")
    if jax.process_index() == 0:
        print(markdown(report))
        if sentence := verdict(report):
            print(sentence)
        print(f"wrote {args.output_dir}/report.html")
    return report


def main() -> None:
    """The command line."""
    command_line.run(Args, run, _PROGRAM, save_memory="a smaller --batch_size")


if __name__ == "__main__":
    main()
