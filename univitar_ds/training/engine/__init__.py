"""DeepSpeed behind a small interface. No other package imports DeepSpeed."""

__all__ = ["backward_hooks", "determinism", "engine", "node_sharding", "optim", "zero3"]
