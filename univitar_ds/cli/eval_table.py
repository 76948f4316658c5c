"""The command `univitar-ds eval table`."""

from __future__ import annotations

import argparse

from univitar_ds.cli.common import add_command, expand, shown_lines
from univitar_ds.screen import show

TABLE = "table"


def add_table(commands) -> None:
    """Adds the command to `commands`; `main.parse` takes its two words together."""
    parser = add_command(
        commands,
        f"eval {TABLE}",
        _run,
        "collect the results of many evaluations in one table",
        "Collects the results of many evaluations: a row for each figure, a column for each model. Results are files\n"
        "that `eval TASK MODEL --json` has printed or `eval RUN --out FILE` has written, such as those of\n"
        "slurm/eval_array.sbatch. A result that is not there yet is shown as -.\n\n"
        "  univitar-ds eval table evals/ --out evals/table.md\n"
        "  univitar-ds eval table evals/*.json --out all.csv      one line for each figure, with all digits",
        leaves_files=False,
    )
    parser.add_argument("results", nargs="+", type=expand, metavar="FILE", help="JSON files, or folders with them")
    parser.add_argument("--out", type=expand, metavar="FILE", help="also write the table there; as CSV to *.csv")


def _run(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.collected import collect, render, write_table

    found = collect(arguments.results)
    if arguments.out is not None:
        write_table(found, arguments.out)
    show(shown_lines(render(found)))
