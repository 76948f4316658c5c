"""Helpers of the commands of `univitar-ds`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(
    commands, name: str, run, help_text: str, description: str = "", *, leaves_files: bool = True
) -> argparse.ArgumentParser:
    """Adds a command to `commands`; `run` is called with its arguments.

    Args: leaves_files: whether its results are in files as well, so that it succeeds even if stdout fails.
    """
    parser = commands.add_parser(
        name,
        help=help_text,
        description=description or help_text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, leaves_files=leaves_files)
    return parser


def add_overrides(
    parser: argparse.ArgumentParser, help_text: str = "dotted keys of the run file, such as stages.0.lr=5e-4"
) -> None:
    """The help for overrides: any key of the run file."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help_text)


def shown(text: str) -> str:
    """Text for a terminal: characters that are not printable are escaped.

    Names come from outside. They may contain bytes that are not UTF-8, which cannot be printed, and control
    characters, which would control the terminal.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def expand(text: str) -> Path:
    """A path, expanded as in a run file, see `config/paths.py`. Raises: ConfigError."""
    return Path(expand_place(text))


def expand_place(text: str) -> str:
    """The same for a path that may be an s3:// address."""
    from univitar_ds.config import paths  # needs pydantic, which `--help` does not need

    return paths.expand(text)


def positive(text: str) -> int:
    """An integer of at least 1, as a type of argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
