"""Elastic checkpoints: written by any number of ranks, read by any other, or without a trainer."""

__all__ = ["atomic_dir", "offline", "sharded"]
