"""Objectives: each a function of embeddings that returns a loss and its gradients. Knows no model and no data."""
