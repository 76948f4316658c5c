"""Counts of a run before it starts: pairs and packs of a step, and tokens of a sample."""

__all__ = ["batch", "samples"]
