"""The blocks of the encoder: layers, attention, dropping, recomputation, and parallelism over ranks."""

__all__ = [
    "activations",
    "attention",
    "dropping",
    "layers",
    "rank_group",
    "recompute",
    "sequence_parallel",
    "tensor_parallel",
]
