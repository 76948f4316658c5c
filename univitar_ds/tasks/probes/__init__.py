"""Probes that are trained by gradient descent, with all learning rates at once on the same frozen features."""

__all__ = ["attentive", "sgd", "sweep", "token_store"]
