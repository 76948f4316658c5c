"""What an encoder has learned: zero-shot classes and retrieval on held-out sources."""

__all__ = ["report", "run"]
