"""Predicted counts of a run: pairs and packs of a step, checkpoints, and tokens of an item."""

__all__ = ["batch", "samples", "unpacked"]
