"""Losses over the embeddings of all ranks, and of distillation."""

__all__ = ["distill", "ring", "sigmoid", "softmax"]
