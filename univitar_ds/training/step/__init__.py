"""One optimizer update, and the pure functions that say what it is made of and whether it went wrong."""

__all__ = ["curriculum", "feature_snapshot", "guard", "peak_flops", "train_step"]
