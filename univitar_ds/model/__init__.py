"""The encoder, the text tower and their joint model."""

__all__ = [
    "activations",
    "build",
    "classification",
    "config",
    "contrastive",
    "distill_heads",
    "dropping",
    "encoder",
    "flops",
    "from_stored",
    "libraries",
    "towers",
    "transfer",
    "weights",
]
