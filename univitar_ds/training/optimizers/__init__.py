"""Optimizers beside AdamW: Muon, which needs whole matrices, and those of plugins, which update each weight alone."""

__all__ = ["elementwise", "matrices", "muon"]
