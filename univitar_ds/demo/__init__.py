"""`make demo`: rendered scenes, a training run on them, and the folder that holds both."""

__all__ = ["end_to_end", "synthetic"]
