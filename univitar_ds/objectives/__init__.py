"""Contrastive losses over the embeddings of all ranks, and losses of classification and distillation."""

__all__ = ["classification", "distill", "exchange", "mixing", "pairs", "sigmoid", "softmax"]
