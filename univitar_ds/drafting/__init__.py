"""Drafts the run file of `univitar-ds init` from a look at the data and at the machine."""

__all__ = ["draft", "machine"]
