"""The command `univitar-ds doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from univitar_ds.cli.common import add_command, add_overrides, positive, shown
from univitar_ds.screen import show

_COLOURS = {"ok": "\x1b[32m", "failed": "\x1b[31m", "skipped": "\x1b[2m"}
_PLAIN = "\x1b[0m"


def add_doctor(commands) -> None:
    """Adds the command `doctor` to `commands`."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        "check the machines, the network, the disks and the run file before a run",
        "Check what a run needs, on this machine or on all nodes of a job. Print a table, with a remedy for each row\n"
        "that failed:\n"
        "  univitar-ds doctor --config photos\n"
        "  srun univitar-ds doctor --config photos       in a job, with the tasks of the run; slurm/preflight.sbatch\n"
        "  torchrun --nproc-per-node 8 -m univitar_ds doctor --config photos\n"
        "No file is left on a disk. Exit status: 0 if no row failed, 1 if one did, 2 if ranks are missing.",
        leaves_files=False,
        announced=True,
    )
    parser.add_argument(
        "--config",
        metavar="RUN",
        help="a run file, the name of a shipped recipe, or a run's folder: sources, models and folder are checked too",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="limit of the time of each check without progress, and of the wait for other ranks (default 120)",
    )
    add_overrides(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    from univitar_ds.doctor.run import LIMIT_S, clean, examine
    from univitar_ds.errors import ConfigError

    if arguments.overrides and arguments.config is None:
        raise ConfigError(f"{arguments.overrides[0]} overrides a key of a run file; name the run file with --config")
    report = examine(arguments.config, arguments.overrides, arguments.timeout or LIMIT_S)
    if report.main:
        show(json.dumps(report.to_json(), indent=2) if arguments.json else table(report, colours=_has_colours()))
    code = 1 if report.failed else 0
    if report.hung or len(report.nodes) > 1:  # a waiting thread would keep the process alive
        clean()
        sys.stdout.flush()
        os._exit(code)
    return code


def table(report, *, colours: bool) -> str:
    """Returns the report as text. Control characters in names are escaped."""
    lines = []
    for state, word, text in report.lines():
        painted = f"{_COLOURS[state]}{word}{_PLAIN}" if colours and state else word
        lines.append(painted + shown(text))
    return "\n".join(lines)


def _has_colours() -> bool:
    try:
        terminal = sys.stdout.isatty()
    except (ValueError, AttributeError):  # closed, or the replacement that a notebook installs
        return False
    return terminal and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
