"""DeepSpeed behind a small interface: the only package that uses it."""

__all__ = ["determinism", "engine", "optim"]
