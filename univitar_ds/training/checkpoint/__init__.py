"""Elastic checkpoints: written by any number of ranks, and read by any number of ranks or by one process offline."""

__all__ = ["atomic_dir", "offline", "protocol", "s3_folder", "saves", "sharded", "staging", "whole_weights"]
