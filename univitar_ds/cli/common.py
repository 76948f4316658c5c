"""Options and parsers that the commands of `univitar-ds` share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(
    commands,
    name: str,
    run,
    help_text: str,
    description: str = "",
    *,
    leaves_files: bool = True,
    announced: bool = False,
) -> argparse.ArgumentParser:
    """Adds a command to `commands`, the subparsers of argparse. Returns the command's parser.

    Args: run: called with the parsed arguments, returns the exit status or None; description: text of `--help`, by
        default `help_text`; leaves_files: whether the command also writes its results to files, so that it succeeds
        even if stdout cannot be written; announced: whether it works for long before it prints, so that the phases of
        its start are logged (`startup`).
    """
    parser = commands.add_parser(
        name,
        help=help_text,
        description=description or help_text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser, leaves_files=leaves_files, announced=announced)
    return parser


def add_overrides(
    parser: argparse.ArgumentParser, help_text: str = "dotted keys of the run file, such as stages.0.lr=5e-4"
) -> None:
    """Adds the arguments KEY=VALUE, which override keys of the run file."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help_text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the option --weights, which selects the trained or the averaged (EMA) weights of a run."""
    parser.add_argument(
        "--weights",
        choices=("trained", "averaged"),
        help="weights of a run (default: averaged if the run has optimizer.ema_decay)",
    )


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an S3 store: endpoint, profile and region."""
    parser.add_argument(
        "--s3-endpoint", metavar="URL", help="address of a store other than AWS, e.g. http://127.0.0.1:9000"
    )
    parser.add_argument("--s3-profile", metavar="NAME", help="a profile of ~/.aws/config")
    parser.add_argument("--s3-region", metavar="NAME", help="region of the store, such as eu-central-1")


def add_table(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a table: its columns, and the folder of its files."""
    parser.add_argument("--image-key", metavar="NAME", help="column of images or videos, or of their paths, in a table")
    parser.add_argument(
        "--caption-key", metavar="NAME", action="append", default=[], help="column of captions; may be repeated"
    )
    parser.add_argument("--label-key", metavar="NAME", help="column of labels")
    parser.add_argument("--split-key", metavar="NAME", help="column of splits")
    parser.add_argument(
        "--images", type=expand, metavar="FOLDER", help="folder of the files of a table or JSON of COCO"
    )


def shown(text: str) -> str:
    """Returns `text` with escapes for characters that are not printable.

    Names of files and keys may contain bytes that are not UTF-8, which cannot be printed, and control characters, which
    would control the terminal.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_lines(text: str) -> str:
    """Returns `text` with the same escapes as `shown`, except that line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))


def expand(text: str) -> Path:
    """Returns a path with ~ and variables expanded as in a run file (`config.paths`).

    Raises: ConfigError if it cannot be expanded.
    """
    return Path(expand_place(text))


def expand_place(text: str) -> str:
    """Returns a path or s3:// address as text, expanded as `expand` does. Raises: ConfigError as `expand`."""
    from univitar_ds.config import paths  # needs pydantic, which `--help` does not need

    return paths.expand(text)


def positive(text: str) -> int:
    """Parses an integer of at least 1, for argparse. Raises: ArgumentTypeError or ValueError for any other text."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
