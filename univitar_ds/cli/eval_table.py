"""The command `univitar-ds eval table`."""

from __future__ import annotations

import argparse

from univitar_ds.cli.common import add_command, expand, shown_lines
from univitar_ds.screen import show

TABLE = "table"


def add_table(commands) -> None:
    """Adds the command `eval table` to `commands`; `main.parse` joins its two words."""
    parser = add_command(
        commands,
        f"eval {TABLE}",
        _run,
        "collect the results of many evaluations in one table",
        "Collect the results of many evaluations: a row for each figure, a column for each model. Results are files\n"
        "with the output of `eval TASK MODEL --json` or `eval RUN --out FILE`, such as those of\n"
        "slurm/eval_array.sbatch. A missing result is shown as -. A damaged file is left out, with a warning and a\n"
        "line below the table; if no file is left, the exit status is 2.\n\n"
        "  univitar-ds eval table evals/ --out evals/table.md\n"
        "  univitar-ds eval table evals/*.json --out all.csv      one line for each figure, with all digits",
        leaves_files=False,
    )
    parser.add_argument("results", nargs="+", type=expand, metavar="FILE", help="JSON files, or folders with them")
    parser.add_argument(
        "--out", type=expand, metavar="FILE", help="also write the table to this file, as CSV if its name ends in .csv"
    )


def _run(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.collected import collect, render, write_table

    found = collect(arguments.results)
    if arguments.out is not None:
        write_table(found, arguments.out)
    show(shown_lines(render(found)))
