"""The encoder, the text tower and their joint model."""

__all__ = [
    "config",
    "contrastive",
    "distill_heads",
    "dropping",
    "encoder",
    "flops",
    "libraries",
    "towers",
    "transfer",
    "weights",
]
