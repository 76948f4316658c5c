"""Optimizers besides AdamW: Muon, which needs whole matrices, and those of plugins, which update each element alone."""

__all__ = ["elementwise", "matrices", "muon"]
