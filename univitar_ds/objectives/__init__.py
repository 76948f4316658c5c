"""Contrastive losses over the embeddings of all ranks, and losses of classification and distillation."""

__all__ = ["chunks", "classification", "distill", "exchange", "mixing", "pairs", "sigmoid", "softmax"]
