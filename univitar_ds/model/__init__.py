"""The encoder, the text tower, and the models that training builds from them."""

__all__ = [
    "build",
    "classification",
    "config",
    "contrastive",
    "described",
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
