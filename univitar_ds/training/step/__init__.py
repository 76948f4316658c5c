"""One optimizer update, and pure functions for its settings and for the detection of bad steps."""

__all__ = [
    "classification",
    "counts",
    "curriculum",
    "distillation",
    "feature_snapshot",
    "guard",
    "kept_packs",
    "pack_share",
    "peak_flops",
    "recomputation",
    "train_step",
    "upload",
]
