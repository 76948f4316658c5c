"""Checkpoints of a run to and from the layout of the public release."""

__all__ = ["official"]
