"""Optimizers besides AdamW: Muon, which needs whole matrices, and those of plugins, which are elementwise."""

__all__ = ["elementwise", "matrices", "muon"]
