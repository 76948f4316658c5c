"""One optimizer update, and pure functions for its settings and for the detection of bad steps."""

__all__ = ["classification", "curriculum", "feature_snapshot", "guard", "peak_flops", "train_step"]
