"""The command `univitar-ds`: one file a group of commands."""

__all__ = ["main"]
