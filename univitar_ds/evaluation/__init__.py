"""Evaluation of an encoder: zero-shot classification and retrieval on held-out sources."""

__all__ = ["report", "run"]
