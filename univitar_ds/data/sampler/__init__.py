"""Chooses the samples of every pack of every lane: a pure function of seed, lane, stage and shards."""

__all__ = ["bad_samples", "balance", "cursor", "lanes", "packing", "reader", "stream_config"]
