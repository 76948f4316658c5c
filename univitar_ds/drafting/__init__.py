"""Drafts the run file of `univitar-ds init` from the data and the machine."""

__all__ = ["draft", "machine"]
