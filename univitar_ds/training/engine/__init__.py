"""DeepSpeed behind a small interface. No other package imports DeepSpeed."""

__all__ = ["determinism", "engine", "optim"]
