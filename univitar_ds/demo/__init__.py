"""The demo (`make demo`): renders scenes and trains a model on them, in one folder."""

__all__ = ["end_to_end", "synthetic"]
