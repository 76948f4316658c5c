"""A block of the encoder: its layers, its attention, what it drops, and what it computes again in the backward pass."""

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
