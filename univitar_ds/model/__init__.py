"""The encoder, the text tower and their joint model."""

__all__ = [
    "build",
    "classification",
    "config",
    "contrastive",
    "distill_heads",
    "encoder",
    "flops",
    "from_stored",
    "libraries",
    "packed",
    "placement",
    "towers",
    "transfer",
    "weights",
]
