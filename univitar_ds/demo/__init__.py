"""The demo (`make demo`): rendered scenes and a training run on them, in one folder."""

__all__ = ["end_to_end", "synthetic"]
