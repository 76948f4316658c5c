"""DeepSpeed behind a small interface. No other package imports DeepSpeed."""

__all__ = ["backward_hooks", "determinism", "elementwise", "engine", "fp8", "optim"]
