"""DeepSpeed behind a small interface: the only room that knows it."""

__all__ = ["determinism", "engine", "optim"]
