"""Probes that are trained by gradient descent: a head for each learning rate, at once on the same frozen features."""

__all__ = ["attentive", "sgd", "sweep"]
