"""Evaluation tasks for any model on any data: `univitar-ds eval zero-shot|retrieval|knn|linear`."""

__all__ = ["reading", "run", "templates"]
