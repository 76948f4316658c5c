"""Conversion of models between formats, and the export of a run."""

__all__ = ["conversion", "export", "program"]
