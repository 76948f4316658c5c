"""DeepSpeed behind a small interface. No other package imports DeepSpeed."""

__all__ = ["backward_hooks", "compiled_ops", "determinism", "engine", "node_sharding", "optim", "zero3"]
