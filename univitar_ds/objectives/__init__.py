"""Contrastive losses over the embeddings of all ranks, and distillation losses."""

__all__ = ["distill", "ring", "sigmoid", "softmax"]
