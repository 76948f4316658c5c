"""Evaluation of an encoder: zero-shot classification and retrieval, or the accuracy of a head, on held-out sources."""

__all__ = [
    "collected",
    "configured",
    "during_training",
    "embed",
    "measure",
    "report",
    "results",
    "retrieval",
    "run",
    "scores",
    "zero_shot",
]
