"""The command `univitar-ds`: one file per group of commands."""

__all__ = ["main"]
