"""What the commands of `univitar-ds` share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(
    commands, name: str, run, help_text: str, description: str = "", *, leaves_files: bool = True
) -> argparse.ArgumentParser:
    """A command of `commands`; `run` is what its arguments are given to.

    Args: leaves_files: whether its results are in files as well, so that it has done its work where stdout fails.
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
    """What may follow: any key of the run file."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help_text)


def shown(text: str) -> str:
    """Text for a terminal: what is no printable character becomes its escape.

    Names come from outside. They may hold bytes that are no UTF-8, which cannot be printed at all, and control
    characters, which would act on the terminal.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def expand(text: str) -> Path:
    """A path as it is meant in a run file too, see `config/paths.py`. Raises: ConfigError."""
    return Path(expand_place(text))


def expand_place(text: str) -> str:
    """The same where an s3:// address may be, too."""
    from univitar_ds.config import paths  # needs pydantic, which `--help` can do without

    return paths.expand(text)


def positive(text: str) -> int:
    """A number of at least 1, as argparse wants it read."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
