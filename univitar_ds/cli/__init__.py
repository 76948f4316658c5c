"""The command-line interface `univitar-ds`, with one file per group of subcommands."""

__all__ = ["main"]
